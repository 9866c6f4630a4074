"""New queries on an old gallery: the map against numpy, the recalls against brute force, and two commits of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from treering.launch.cli import app
from treering.launch.recipe.load import read_recipe
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.store import Store
from treering.training.evaluate.compatibility import compatibility, text_map
from treering.training.evaluate.embed import Embedded
from treering.training.loop import train


def embedded(images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor, **changed: Any) -> Embedded:
    facts = {
        "numbers": list(range(len(images))),
        "captions": [f"caption {i}" for i in range(len(texts))],
        "labels": [{} for _ in images],
        "bad": [],
    }
    return Embedded(images, texts, owners, **{**facts, **changed})


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_map_is_the_least_squares_one_where_texts_abound() -> None:
    old, turn = unit(400, 8, seed=0), torch.linalg.qr(torch.randn(12, 12, generator=torch.manual_seed(1)))[0]
    new = F.normalize(old @ turn[:8] + 0.01 * unit(400, 12, seed=2), dim=-1)
    expected = np.linalg.lstsq(new.double().numpy(), old.double().numpy(), rcond=None)[0]
    found = text_map(new, old).numpy()
    cosines = ((new.numpy() @ found) * (new.numpy() @ expected)).sum(1)
    cosines /= np.linalg.norm(new.numpy() @ found, axis=1) * np.linalg.norm(new.numpy() @ expected, axis=1)
    assert cosines.min() > 0.999


def test_a_turned_space_serves_the_old_gallery_through_the_map_alone() -> None:
    owners = torch.arange(50)
    images = unit(50, 8, seed=3)
    texts = F.normalize(images + 0.3 * unit(50, 8, seed=4), dim=-1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.manual_seed(5)))[0]
    learnt = unit(300, 8, seed=6)
    old, new = embedded(images, texts, owners), embedded(images @ turn, texts @ turn, owners)
    found = compatibility(old, new, learnt, learnt @ turn)
    at_one = {name: scores["text_to_image@1"] for name, scores in found.scores.items()}
    brute = np.mean([int(np.argmax(images.numpy() @ t)) == i for i, t in enumerate(texts.numpy())])
    assert at_one["old"] == at_one["new"] == at_one["new_on_old"] == pytest.approx(brute)
    turned = (texts @ turn).numpy()
    brute = np.mean([int(np.argmax(images.numpy() @ t)) == i for i, t in enumerate(turned)])
    assert at_one["unmapped_on_old"] == pytest.approx(brute)
    assert brute < 0.3
    assert found.flips["new_on_old/text_to_image"]["negative_flips"] == 0


def test_flips_are_those_of_single_queries() -> None:
    owners = torch.arange(40)
    old = embedded(unit(40, 4, seed=7), unit(40, 4, seed=8) + 0, owners)
    new = embedded(unit(40, 6, seed=9), F.normalize(unit(40, 6, seed=9) + 0.8 * unit(40, 6, seed=10), dim=-1), owners)
    found = compatibility(old, new, unit(60, 4, seed=11), unit(60, 6, seed=12))
    assert "unmapped_on_old" not in found.scores

    def right(data: Embedded) -> np.ndarray:
        return np.argmax(data.images.numpy() @ data.texts.numpy().T, 1) == np.arange(40)

    before, after = right(old), right(new)
    flips = found.flips["new/image_to_text"]
    assert flips["positive_flips"] == pytest.approx(np.mean(~before & after))
    assert flips["negative_flips"] == pytest.approx(np.mean(before & ~after))
    with pytest.raises(ValueError, match="could not use the same samples"):
        compatibility(old, embedded(new.images, new.texts, owners, numbers=list(range(1, 41))), old.texts, new.texts)


def test_two_commits_of_a_run_are_compared(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tiny = [
        "data.batch=12",
        "model.embed_dim=16",
        "model.image={width: 16, depth: 1, heads: 2, patch: 12, resolution: 24}",
        "model.text={width: 8, depth: 1, heads: 2, context: 16}",
        "model.captioner=null",
        "objectives={contrastive: {}}",
        "schedule.warmup=12",
        "stages=[{samples: 24}, {grow: {embed_dim: 24, text.depth: 2}, samples: 24}]",
        "eval.suites=[]",
    ]
    train(read_recipe("emoji", tiny).recipe, tmp_path)
    before, *_ = Commits(Store(str(tmp_path / "commits"))).names()
    old = str(tmp_path / "commits" / before)
    arguments = ["eval", str(tmp_path), "--against", old, "--texts", "64"]
    arguments += ["--data", "samples://emoji/held_out"]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    compared = json.loads(found.stdout)
    assert compared["texts"] == 64
    assert set(compared["scores"]) == {"old", "new", "new_on_old"}
    assert set(compared["flips"]) == {
        f"{a}/{b}" for a in ("new", "new_on_old") for b in ("image_to_text", "text_to_image")
    }
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "new_on_old" in shown.stdout
    assert "lost" in shown.stdout
    # A model against itself: the map is the identity, and nothing flips.
    same = json.loads(CliRunner().invoke(app, ["eval", old, *arguments[2:], "--json"]).stdout)
    assert same["scores"]["new"] == same["scores"]["old"] == same["scores"]["unmapped_on_old"]
    assert all(flips["negative_flips"] == 0 for name, flips in same["flips"].items() if name.startswith("new/"))
