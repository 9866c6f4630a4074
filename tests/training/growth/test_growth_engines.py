"""Growth through the real loop under every engine and world: the same tensors, and resumes that cross it to the bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES, Died, train_until
from treering.training import loop
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store
from treering.training.engines.zero_state import require
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.world import World

TINY = [
    *SIZES,
    "model.captioner.depth=1",
    "optimizer.ema=0.8",
    # A width that grows by a fraction, fading multipliers, and blocks: every path of a growth, twice.
    "stages=[{samples: 36}, {grow: {image.width: 24, text.width: 16, image.depth: 2, embed_dim: 24}, "
    "multiplier_fade: 60, samples: 24}, "
    "{grow: {text.depth: 2, image.mlp_ratio: 5.0, captioner.depth: 2}, samples: 24}]",
    "checkpoint={every: 1_000_000, keep: 20}",
    "eval.suites=[]",
]
ENGINES = {
    "ddp": "{kind: ddp}",
    "fsdp": "{kind: fsdp}",
    **{f"zero{stage}": f"{{kind: deepspeed, zero_stage: {stage}}}" for stage in (1, 2, 3)},
}
QUICK = {("fsdp", 2)}
MATRIX = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(ENGINES, (1, 2, 4))
]


def recipe(engine: str) -> Recipe:
    return read_recipe("emoji", [*TINY, f"engine={ENGINES[engine]}"]).recipe


def steps(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "grad_norm", "lr")} for row in rows if row["event"] == "step"]


def grown_state(engine: str, out: Path) -> dict[str, str]:
    """Continue `out` over its next growth and die there: a checksum of each whole tensor of the grown model."""
    found: dict[str, str] = {}
    real = loop.Run.enter

    def enter(run: loop.Run, stage: int) -> None:
        before = run.engine
        real(run, stage)
        if run.engine is not before:
            for path, held in run.engine.logical_state().items():
                whole = run.engine.whole(path.partition("/")[2], held).contiguous()
                found[path] = f"{tuple(whole.shape)} {hashlib.sha256(whole.numpy().tobytes()).hexdigest()}"
            found["multipliers"] = json.dumps(run.engine.multipliers, sort_keys=True)
            found["applied"] = str(run.engine.applied)
            raise Died

    loop.Run.enter = enter  # type: ignore[method-assign]
    try:
        with pytest.raises(Died):
            train(recipe(engine), out)
    finally:
        loop.Run.enter = real  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one plain process."""
    torch.set_num_threads(1)
    require(World(0, 1, torch.device("cpu")))  # ranks are forked: imported here, they need not import it
    out = tmp_path_factory.mktemp("whole")
    assert train(recipe("ddp"), out).finished
    return out


def cut_at(whole: Path, out: Path, step: int) -> Path:
    """A run folder whose newest commit is the one before the growth at `step`."""
    shutil.copytree(whole / "commits", out / "commits")
    for name in Commits(Store(str(out / "commits"))).names():
        if int(name.split("-")[1]) > step:
            shutil.rmtree(out / "commits" / name)
    return out


@pytest.mark.parametrize(("engine", "ranks"), MATRIX)
def test_the_grown_tensors_are_the_same_to_the_bit(
    engine: str, ranks: int, whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """Both growths, from commits of one plain process: weights, moments, averages, multipliers and the step count."""
    for step in (3, 5):
        expected = grown_state("ddp", cut_at(whole, tmp_path / f"plain{step}", step))
        found = on_ranks(
            ranks,
            lambda group, step=step: grown_state(engine, cut_once(group, whole, tmp_path / f"{step}", step)),
        )
        assert len(expected) > 100
        assert all(rank == expected for rank in found)


def cut_once(group: World, whole: Path, out: Path, step: int) -> Path:
    """`cut_at` by the first rank, for all."""
    if group.is_first:
        cut_at(whole, out, step)
    group.barrier()
    return out


@pytest.mark.parametrize(("engine", "ranks"), MATRIX)
def test_a_resume_that_crosses_growth_is_bit_identical(
    engine: str, ranks: int, whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """Killed in the first step after each growth, when the newest commit is the one before it."""

    for step in (3, 5):
        on_ranks(ranks, lambda group, step=step: train_until(step, recipe(engine), tmp_path / "resumed"))
    for name in ("straight", "resumed"):
        assert all(on_ranks(ranks, lambda group, name=name: train(recipe(engine), tmp_path / name).finished))
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert steps(resumed) == steps(straight)
    for row, true in zip(steps(straight), steps(whole), strict=True):
        assert row["loss"] == pytest.approx(true["loss"], rel=1e-5)
    ours, theirs = find_commit(str(resumed)), find_commit(str(straight))
    assert [event.event for event in ours.manifest.state.lineage] == ["start", "resume", "grow", "resume", "grow"]
    assert ours.manifest.state.multipliers == theirs.manifest.state.multipliers != {}
    mine, other = ours.tensors(), theirs.tensors()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[path], other[path]) for path in mine)
