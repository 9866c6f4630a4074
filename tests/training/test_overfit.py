"""CoCa on 64 pairs, half of them captions and half labels: the model learns every one by heart."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from treering.launch.recipe.load import read_recipe
from treering.tests.support.made_up_shards import shard
from treering.training.load import load
from treering.training.loop import train

SIDE = 24
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "white", "gray")
PLACES = {"top left": (0, 0), "top": (1, 0), "top right": (2, 0), "left": (0, 1), "right": (2, 1),
          "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2)}  # fmt: skip


def picture(colour: str, place: str) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE))
    x, y = (8 * at for at in PLACES[place])
    ImageDraw.Draw(image).rectangle((x, y, x + 7, y + 7), fill=colour)
    return image


@pytest.mark.slow
def test_64_pairs_are_learned_by_heart(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    truth = {f"a {colour} square {place}": picture(colour, place) for colour in COLOURS for place in PLACES}
    trained, scored = [], []
    for n, (caption, image) in enumerate(truth.items()):
        file = io.BytesIO()
        image.save(file, "PNG")
        own = {"labels": {"what": caption.removeprefix("a ")}} if n % 2 else {"captions": [caption]}
        trained += [(f"{n:02}.png", file.getvalue()), (f"{n:02}.json", json.dumps(own).encode())]
        scored += [(f"{n:02}.png", file.getvalue()), (f"{n:02}.txt", caption.encode())]
    source = {"source": str(shard(tmp_path / "train.tar", trained)), "labels": {"what": "a {}"}}
    whole = {"crop_scale": [1, 1], "crop_ratio": [1, 1]}
    recipe = read_recipe(
        "emoji",
        [
            f"data={json.dumps({'train': [source], 'batch': 64, 'augment': whole})}",
            "model={embed_dim: 32, image: {width: 64, depth: 2, heads: 2, patch: 8, resolution: 24}, "
            "text: {width: 64, depth: 1, heads: 2, context: 16}, captioner: {depth: 1}}",
            f"stages=[{{samples: {64 * 300}}}]",
            "schedule.warmup=640",
            "optimizer.lr=0.003",
            f"eval={{suites: [retrieval], data: {shard(tmp_path / 'scored.tar', scored)}}}",
        ],
    ).recipe
    end = train(recipe, tmp_path / "run")
    assert end.scores["retrieval/image_to_text@1"] == end.scores["retrieval/text_to_image@1"] == 1
    assert load(str(tmp_path / "run")).caption(list(truth.values())) == list(truth)
