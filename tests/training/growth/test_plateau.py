"""When to grow: the rule against plain numpy on made-up losses, and runs whose stages end by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.flops import training_flops
from treering.tests.support.tiny_runs import SIZES, dies, lines
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store, StoreError
from treering.training.engines.base import StepResult
from treering.training.growth.plateau import expected, slopes
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.stages import StageConfig, steady_from
from treering.training.state import Decision
from treering.training.tally import Tally
from treering.training.world import World

TINY = [
    *SIZES,
    "model.captioner=null",
    "objectives={contrastive: {}}",
    # An exponent of 1 expects so much that the first window ends the stage; one of nearly 0 asks only for a fall.
    "stages=[{samples: 120, plateau: {window: 36, exponent: 1.0}}, "
    "{grow: {image.depth: 2}, rewarmup: 24, samples: 48, plateau: {window: 24, exponent: 1.0e-9}}, {samples: 12}]",
    "optimizer.lr=0.005",
    "checkpoint.every=24",
    "checkpoint.keep=20",
    "eval.suites=[]",
    "log.every=4",
]


def recipe(*overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, *overrides]).recipe


def measured(out: Path) -> list[dict[str, float]]:
    return [{k: row[k] for k in ("step", "loss", "slope", "expected", "ended")} for row in lines(out, "plateau")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(recipe("log.every=1"), out).finished
    return out


def test_the_slopes_are_those_of_plain_arithmetic() -> None:
    small, large = recipe().specs()[:2]
    random = np.random.default_rng(0)
    for falls in (2e-9, 1e-10, 0.0):
        lengths = random.uniform(4, 12, 50)
        flops = np.cumsum([32 * training_flops(small, length) for length in lengths])
        losses = 3 - falls * flops + random.normal(0, 0.02, 50)
        spent = 5e9 + flops[-1]
        found = slopes(list(zip(losses.tolist(), lengths.tolist(), strict=True)), small, large, 32, spent, 0.1)
        slope, _ = np.linalg.lstsq(np.stack([flops, np.ones(50)], 1), losses, rcond=None)[0]
        assert found.slope == pytest.approx(-slope, rel=1e-6)
        ratio = training_flops(large, lengths.mean()) / training_flops(small, lengths.mean())
        assert ratio > 1.2
        # The power law through today's loss and compute, at today's compute and at ratio^2 times as much.
        law = losses.mean() / spent**-0.1
        then = law * (ratio**2 * spent) ** -0.1
        assert found.expected == pytest.approx((losses.mean() - then) / (ratio**2 * spent - spent), rel=1e-6)
        assert found.flat == (falls < found.expected)


def test_what_is_expected_of_a_size_that_is_no_larger_is_the_law_s_own_slope() -> None:
    assert expected(2.0, 100.0, 1.0, 0.3) == pytest.approx(0.3 * 2.0 / 100.0, rel=1e-6)
    assert expected(2.0, 100.0, 1.5, 0.3) < expected(2.0, 100.0, 1.0, 0.3)


def test_a_loss_that_flattens_ends_where_plain_arithmetic_says() -> None:
    """A stream of losses that falls exponentially to a floor, inspected in one window of 20."""
    small, large = recipe().specs()[:2]
    cost = 32 * training_flops(small, 8.0)
    losses = [1 + 3 * 0.98**step for step in range(400)]
    ended = next(
        step
        for step in range(20, 400, 20)
        if slopes([(y, 8.0) for y in losses[step - 20 : step]], small, large, 32, step * cost, 0.1).flat
    )
    ratio = training_flops(large, 8.0) / training_flops(small, 8.0)
    by_hand = next(
        step
        for step in range(20, 400, 20)
        if -np.polyfit(np.arange(20.0), losses[step - 20 : step], 1)[0]
        < np.mean(losses[step - 20 : step]) * (1 - ratio**-0.2) / (ratio**2 - 1) / step
    )
    assert ended == by_hand
    assert 40 < ended < 400


def test_a_stage_ends_early_and_its_budget_moves_on(whole: Path) -> None:
    steps, found = lines(whole, "step"), measured(whole)
    assert [row["step"] for row in steps] == list(range(1, 16))
    # Warm-up ends after step 2, so the first window is steps 3 to 5; the stage had 10 steps, the next one gets 5.
    # The second stage's windows begin after its re-warm-up; it ends behind the first that is flat.
    assert [row["step"] for row in found] == [5, 9, 11, 13][: len(found)]
    assert [row["ended"] for row in found] == [row["slope"] < row["expected"] for row in found]
    assert found[0]["ended"]
    end = found[-1]["step"] if found[-1]["ended"] else 14
    assert [row["stage"] for row in steps] == [0] * 5 + [1] * (end - 5) + [2] * (15 - end)
    for row, count in zip(found, (3, 2, 2, 2), strict=False):
        window = [(s["flops"], s["loss"]) for s in steps if row["step"] - count < s["step"] <= row["step"]]
        fit = np.polyfit([x / 1e9 for x, _ in window], [y for _, y in window], 1)[0] / 1e9
        assert row["slope"] == pytest.approx(-fit, rel=1e-3)
        assert row["loss"] == pytest.approx(np.mean([y for _, y in window]), rel=1e-5)
    assert lines(whole, "grow")[0]["step"] == 5
    state = find_commit(str(whole)).manifest.state
    ends = [Decision(stage=0, samples=60), Decision(stage=1, samples=12 * (end - 5))]
    assert list(state.decisions) == ends[: 1 + (end < 14)]
    assert state.samples == 180
    assert [event.event for event in state.lineage][:3] == ["start", "plateau", "grow"]
    assert state.lineage[1].detail["slope"] < state.lineage[1].detail["expected"]
    rates = [row["lr"] for row in steps]
    assert rates[5] == pytest.approx(rates[4] / 2)  # the re-warm-up begins where the stage does


@pytest.mark.parametrize("at", [3, 4, 5, 8])
def test_resumes_decide_alike(at: int, whole: Path, tmp_path: Path) -> None:
    """Inside a window, before the step that ends it, behind the early end, and in the next stage; other log lines."""
    with dies("step", at, last=lambda run: run.uploads.finish()):  # so that the resume begins inside the window
        train(recipe(), tmp_path)
    assert train(recipe("log.every=3"), tmp_path).finished
    assert measured(tmp_path) == measured(whole)
    ours, theirs = find_commit(str(tmp_path)), find_commit(str(whole))
    assert ours.manifest.state.flops == theirs.manifest.state.flops
    assert ours.manifest.state.decisions == theirs.manifest.state.decisions
    mine, other = ours.tensors(), theirs.tensors()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_every_world_decides_alike(whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(group: World) -> bool:
        return train(recipe(), tmp_path).finished

    assert on_ranks(3, one_rank) == [True] * 3
    for ours, theirs in zip(measured(tmp_path), measured(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    state, alone = (find_commit(str(out)).manifest.state for out in (tmp_path, whole))
    assert state.decisions == alone.decisions
    assert state.flops == alone.flops  # of the captions of all ranks


def test_a_tally_adds_up_ranks(on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(group: World) -> Any:
        tally = Tally(group)
        assert tally.take() == []
        for step in range(3):
            losses = {"a": torch.tensor(0.1 * step + group.rank), "b": torch.tensor(1.0)}
            norm = float("nan") if (step, group.rank) == (1, 0) else 1.0
            tally.add(StepResult(losses, torch.tensor(norm)), {"b": 0.5 * step, "a": 2.0}, 10 * step + group.rank)
        assert len(tally) == 3
        taken = tally.take()
        assert len(tally) == 0
        return taken

    first, second = on_ranks(2, one_rank)
    assert first == second
    assert [step.losses["a"] for step in first] == pytest.approx([1.0, 1.2, 1.4])
    assert [step.loss for step in first] == pytest.approx([2.0, 2.4 + 1.0, 2.8 + 2.0])
    assert [step.tokens for step in first] == [1, 21, 41]
    assert [step.finite for step in first] == [True, False, True]


def test_settled_keeps_the_whole_budget() -> None:
    given = recipe("stages.0.samples=115")
    settled = given.settled((Decision(stage=0, samples=60), Decision(stage=1, samples=72)))
    assert [stage.samples for stage in settled.stages] == [60, 72, 48]
    assert settled.total_steps == given.total_steps
    assert settled.settled((Decision(stage=0, samples=60), Decision(stage=1, samples=72))) == settled


def test_an_early_end_is_taken_up_and_settled_stages_are_compared(whole: Path, tmp_path: Path) -> None:
    """After a decision the stages that are over must be the same, and what is to come may change."""
    shutil.copytree(whole / "commits", tmp_path / "commits")
    for name in Commits(Store(str(tmp_path / "commits"))).names()[-4:]:
        shutil.rmtree(tmp_path / "commits" / name)
    assert find_commit(str(tmp_path)).manifest.state.decisions
    with pytest.raises(StoreError, match=r"of a run with another recipe \(stages.0.samples: 120 there, 132 here"):
        train(recipe("stages.0.samples=132"), tmp_path)
    with pytest.raises(StoreError, match="of a run with another recipe"):
        train(recipe("stages=[{samples: 180}]"), tmp_path)
    assert train(recipe("stages.2.samples=24", "stages.2.grow={text.depth: 2}"), tmp_path).finished
    assert find_commit(str(tmp_path)).manifest.state.samples == 192


def test_a_rate_is_steady_after_its_warm_ups() -> None:
    stages = [
        StageConfig(samples=30),
        StageConfig(samples=20, grow={"image.depth": 2}, rewarmup=30),
        StageConfig(samples=9),
    ]
    assert [steady_from(stages, stage, 10, 8) for stage in range(3)] == [8, 60, 60]
    assert steady_from(stages, 0, 10, 25) == 25


def test_the_last_stage_has_no_plateau() -> None:
    with pytest.raises(RecipeError, match=r"stages.2.plateau ends the last stage early.*add a stage"):
        recipe("stages.2.plateau={window: 24}")
