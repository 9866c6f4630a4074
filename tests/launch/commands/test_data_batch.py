"""The samples of a step as the run trained on them: after a bad sample, a rollback and a stage that grew."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from treering.launch.commands.data_batch import batch_of
from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.tests.support.made_up_shards import shard
from treering.tests.support.tiny_runs import SIZES
from treering.training import loop
from treering.training.loop import train

MORE = [
    *SIZES,
    "stages=[{samples: 120}, {samples: 120, grow: {image.resolution: 36}}]",
    "checkpoint={every: 60, keep: 9}",
    "recovery.bad_steps=3",
    "eval.suites=[]",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, tuple[str, ...]], Path]:
    """A run that goes back from step 9 to step 5, the keys of each step as it stands in the end, and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    keys: dict[int, tuple[str, ...]] = {}
    step, norm, broken = loop.Run.step, torch.nn.utils.get_total_norm, [False]

    def watched(run: loop.Run, batch: Any) -> None:
        broken[0] = run.state.cursor in (6, 7, 8)
        keys[run.state.step + 1] = batch.keys
        step(run, batch)

    recipe = folder / "own.yaml"
    resolved = read_recipe("emoji", MORE)
    recipe.write_text(resolved.annotated())
    (folder / "run").mkdir()
    shutil.copy(recipe, folder / "run" / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "step", watched)
        patch.setattr(torch.nn.utils, "get_total_norm", lambda g: norm(g) * (float("nan") if broken[0] else 1))
        train(resolved.recipe, folder / "run")
    return folder / "run", keys, recipe


def test_every_step_has_the_samples_it_was_trained_on(trained: tuple[Path, dict[int, tuple[str, ...]], Path]) -> None:
    out, keys, recipe = trained
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("rollback") == 1
    for step in (1, 5, 6, 10, 11, 20):
        found = batch_of(str(out), [], step, 3)
        assert tuple(sample.key for sample in found.samples) == keys[step], step
        assert [sample.rank for sample in found.samples] == [0] * 4 + [1] * 4 + [2] * 4
        assert sorted(sample.number for sample in found.samples) == list(range(found.batch * 12, found.batch * 12 + 12))
        assert all(sample.caption and sample.shard for sample in found.samples)
        assert (found.batch, found.stage) == (step - 1 + 4 * (step > 5), int(step > 10))
    # A recipe without a run knows of no rollback.
    assert [sample.key for sample in batch_of(str(recipe), [], 5, 1).samples] == list(keys[5])
    assert [sample.key for sample in batch_of(str(recipe), [], 10, 1).samples] == list(keys[6])


@pytest.mark.parametrize("step", [0, 21])
def test_steps_that_are_none(trained: tuple[Path, dict[int, tuple[str, ...]], Path], step: int) -> None:
    with pytest.raises(RecipeError, match=rf"--step {step} is not a step of the run; its steps are 1 to 20"):
        batch_of(str(trained[0]), [], step, 1)


def test_what_a_sample_replaces(tmp_path: Path) -> None:
    def picture(number: int) -> bytes:
        written = io.BytesIO()
        Image.new("RGB", (30, 30), (4 * number, 0, 0)).save(written, "PNG")
        return b"no picture" if number == 7 else written.getvalue()

    members = [m for n in range(60) for m in ((f"{n:03}.png", picture(n)), (f"{n:03}.txt", b"one %d" % n))]
    path = shard(tmp_path / "0.tar", members)
    source = [f"data.train=[{{source: {path}}}]", "data.max_bad_fraction=0.5", *MORE]
    found = [sample for step in range(1, 6) for sample in batch_of("emoji", source, step, 1).samples]
    replacing = [sample for sample in found if sample.replaces]
    assert (len(found), len(replacing)) == (60, 1)
    assert replacing[0].replaces[0].startswith("007: ")
    assert replacing[0].caption == f"one {int(replacing[0].key)}"
    assert "007" not in {sample.key for sample in found}
