"""docs/own_photos.md: its recipe and its commands, in the order of the page, on made-up photos and in small."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

import treering as package
from treering.launch.recipe.load import read_recipe
from treering.tests.support.open_clip_models import published
from treering.training.checkpoint.commits import find_commit

PAGE = (Path(__file__).parents[2] / "docs/own_photos.md").read_text(encoding="utf-8")
SHORT = ["data.batch=8", "stages=[{samples: 32}]", "schedule.warmup=8", "eval.every=null", "log.every=1"]


def test_the_page(treering: Callable[..., Any], here: Path, open_clip: ModuleType) -> None:
    (here / "photos").mkdir()
    for name, numbers in (("train", range(24)), ("val", range(24, 36))):
        lines = []
        for n in numbers:
            pixels = np.random.default_rng(n).integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / f"photos/{n}.jpg")
            lines += [f"{n}.jpg\ta photo of {n}\n", f"{n}.jpg\tnumber {n}\n"]
        (here / f"{name}.tsv").write_text("".join(lines))
    published(open_clip, here / "published", "ViT-B-32")
    block = PAGE[PAGE.index("    # Trains a small CLIP") : PAGE.index("With a GPU set")]
    (here / "own.yaml").write_text(textwrap.dedent(block))

    commands = re.findall(r"^    treering (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 12
    for command in commands:
        typed = re.sub(r"\s+#.*", "", command).replace(" > large.yaml", "")
        words = shlex.split(re.sub(r"open_clip:ViT\S+", "open_clip:local-dir:published", typed))
        done = treering(*words, *(SHORT if words[0] == "train" else []))
        assert done.returncode == 0, (command, done.stderr)
        if words[0] == "recipes":
            assert "command   treering train photos" in done.stdout

    assert find_commit(str(here / "runs/own")).manifest.state.samples == 32
    recipe = read_recipe(str(here / "own.yaml"), ["engine={precision: bf16}", "schedule={kind: cosine, warmup: 1_280}"])
    assert recipe.recipe.model.captioner
    model = package.load(here / "runs/own")
    photos = [here / "photos/1.jpg", here / "photos/2.jpg"]
    similarity = model.encode_image(photos, normalize=True) @ model.encode_text(["a dog on grass"], normalize=True).T
    assert similarity.shape == (2, 1)
    assert len(model.caption(photos)) == 2


def test_the_bundled_recipes(treering: Callable[..., Any], refused: Callable[..., str]) -> None:
    """The first lines of every recipe have command, machine, time and score, and a file that is printed is a recipe."""
    listed = treering("recipes").stdout
    for name in ("emoji", "photos"):
        about = listed[listed.index(f"{name}\n") :].split("\n\n")[0]
        assert [word in about for word in ("  command ", "  machine ", "  time ", "  score ")] == [True] * 4
        file = Path(package.__file__).parent / f"launch/recipes/{name}.yaml"
        assert treering("recipes", name).stdout == file.read_text()
    assert "'pets' is not a bundled recipe; these are: emoji, photos" in refused("recipes", "pets")
