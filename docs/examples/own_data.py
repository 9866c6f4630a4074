"""Trains on a data set of one's own: `python docs/examples/own_data.py [KEY=VALUE ...]`.

A data set is tar shards in the WebDataset convention: the members of one sample share a name, `00017.png` is its
picture, `00017.txt` its caption, `00017.json` whatever else is known of it. Any program may write them; here webdataset
does. For pictures in a folder and a table of captions, `treering data pack` is shorter (docs/data_tools.md).

The pictures are shapes in colours, and three combinations are kept for evaluation: each of their words is seen in
training, but not together. Takes a few seconds.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import webdataset
from PIL import Image, ImageDraw

import treering

COLOURS = {"red": "#c62828", "green": "#2e7d32", "blue": "#1565c0", "orange": "#ef6c00", "black": "#212121"}
SHAPES = ("circle", "square", "triangle", "ring")
HELD_OUT = {("red", "ring"), ("green", "circle"), ("blue", "triangle")}
RECIPE = """\
name: shapes
data:
  train: [{source: FOLDER/train.tar}]
  batch: 32
model:
  embed_dim: 64
  image: {width: 64, depth: 2, heads: 2, patch: 8, resolution: 32}
  text: {width: 64, depth: 1, heads: 2, context: 16}
objectives: {contrastive: {}}
optimizer: {lr: 1.0e-3}
stages: [{samples: 6400}]
schedule: {warmup: 640}
eval: {data: FOLDER/held_out.tar, suites: [retrieval]}
"""


def draw(colour: str, shape: str, chance: random.Random) -> bytes:
    """A picture of a shape somewhere on white, as PNG."""
    image = Image.new("RGB", (64, 64), "white")
    size = chance.randint(20, 40)
    left, top = chance.randint(0, 63 - size), chance.randint(0, 63 - size)
    box, pen, ink = (left, top, left + size, top + size), ImageDraw.Draw(image), COLOURS[colour]
    if shape == "circle":
        pen.ellipse(box, fill=ink)
    elif shape == "square":
        pen.rectangle(box, fill=ink)
    elif shape == "triangle":
        pen.polygon([(left, box[3]), (box[2], box[3]), (left + size // 2, top)], fill=ink)
    else:
        pen.ellipse(box, outline=ink, width=5)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def samples(pairs: list[tuple[str, str]], count: int, seed: int) -> Iterator[dict[str, object]]:
    """`count` samples, the pairs in turn. `labels` in the .json is what zero-shot suites read."""
    chance = random.Random(seed)
    for number in range(count):
        colour, shape = pairs[number % len(pairs)]
        yield {
            "__key__": f"{number:05d}",
            "png": draw(colour, shape, chance),
            "txt": f"a {colour} {shape}",
            "json": {"labels": {"colour": colour, "shape": shape}},
        }


def write_shards(folder: Path) -> None:
    """Write this example's samples as shards into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    seen = [pair for pair in pairs if pair not in HELD_OUT]
    for name, of, count in (("train", seen, 850), ("held_out", sorted(HELD_OUT), 3)):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as shard:
            for sample in samples(of, count, seed=len(of)):
                shard.write(sample)


def main(overrides: list[str]) -> None:
    """Write the shards, then train on them; `overrides` are recipe values such as `seed=1`."""
    folder = Path("shapes")
    write_shards(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    run = treering.train(recipe, overrides)

    model = treering.load(str(run), device="cpu")
    names = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    texts_ke = model.encode_text(names, normalize=True)
    for colour, shape in sorted(HELD_OUT):
        picture = model.preprocess(draw(colour, shape, random.Random(7)))
        nearest = int((model.encode_image(picture, normalize=True) @ texts_ke.T).argmax())
        print(f"never seen: a {colour} {shape}; nearest of {len(names)} captions: {names[nearest]}")


if __name__ == "__main__":
    main(sys.argv[1:])
