"""What to grow into: the rule and the growth space against plain arithmetic, and runs that search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.flops import training_flops
from treering.tests.support.tiny_runs import SIZES, Died, lines
from treering.training import loop
from treering.training.checkpoint.commits import find_commit
from treering.training.growth import search
from treering.training.growth.search import choose
from treering.training.health.watchdog import Watchdog
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.state import Decision, Trial
from treering.training.world import World

TINY = [
    *SIZES,
    "data.train=[{source: samples://emoji, name: old}, {source: samples://emoji/held_out, name: new, weight: 0}]",
    "model.captioner=null",
    "objectives={contrastive: {}}",
    "stages=[{samples: 36}, {search: {space: {image.depth: [2, 3], text.width: [16]}, max_flops: 2.5, samples: 48}, "
    "mixture: {new: 1}, replay: 0.25, samples: 36}]",
    "checkpoint.every=12",
    "checkpoint.keep=20",
    "eval.suites=[]",
]


def recipe(*overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, *overrides]).recipe


def searched(out: Path) -> dict[str, Any]:
    (line,) = lines(out, "search")
    return {key: value for key, value in line.items() if key not in ("time", "seconds")}


def trial(cost: float, loss: float | None) -> Trial:
    return Trial(sizes={}, parameters=1, flops_per_sample=cost, loss=loss, spent=1.0, steps=2)


def test_the_rule_is_autoprog_s() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        costs, losses = random.uniform(1e6, 9e6, 6), random.uniform(1, 4, 6)
        slope = np.polyfit(np.log(costs), np.log(losses), 1)[0]
        exponent = max(-slope, 0.0)
        found = choose([trial(cost, loss) for cost, loss in zip(costs.tolist(), losses.tolist(), strict=True)])
        assert found.exponent == pytest.approx(exponent, abs=1e-9)
        assert found.chosen == int(np.argmin(losses * costs**exponent))
        assert found.spent == 6


def test_a_trial_that_broke_is_not_chosen_and_two_costs_are_no_fit() -> None:
    found = choose([trial(1e6, 3.0), trial(2e6, None), trial(3e6, 2.0), trial(4e6, 1.9), trial(5e6, 1.95)])
    assert found.chosen in (2, 3, 4)
    assert found.json()["candidates"][1]["loss"] is None
    found = choose([trial(1e6, 3.0), trial(2e6, 2.9)])
    assert (found.exponent, found.chosen) == (0.0, 1)


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0], [-1.0, -3.0, 2.0], [1.0, 0.0, None, 2.0]])
def test_losses_that_are_not_above_zero_are_no_power_and_the_lowest_wins(losses: list[float | None]) -> None:
    """A batch of one has a contrastive loss of 0, and a term of one's own may be negative."""
    found = choose([trial(cost, loss) for cost, loss in zip((1e6, 2e6, 3e6, 4e6), losses, strict=False)])
    assert found.exponent == 0
    assert losses[found.chosen] == min(loss for loss in losses if loss is not None)


def test_a_candidate_sees_what_its_stage_will_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a stage with half of the patches: another grid, in a stage that sees all of it or not."""
    seen: set[tuple[int, int | None, int]] = set()
    real = search.run_trial

    def run_trial(engine: Any, build: Any, candidate: Any, batches: Any, *rest: Any) -> Trial:
        def watched() -> Any:
            for inputs in batches:
                patches = inputs.patches
                last = -1 if patches is None else int(patches.max())
                seen.add((candidate[1].image.grid ** 2, None if patches is None else patches.shape[1], last))
                yield inputs

        return real(engine, build, candidate, watched(), *rest)

    monkeypatch.setattr(search, "run_trial", run_trial)
    space = "search: {space: {image.resolution: [48]}, max_flops: 9, samples: 60}"
    for name, keep in (("all", 1.0), ("some", 0.75)):
        stages = f"stages=[{{samples: 36, patch_keep: 0.5}}, {{samples: 36, {space}, patch_keep: {keep}}}]"
        train(recipe(stages, "data.train=[{source: samples://emoji}]"), tmp_path / name)
    # Of 4 and of 16 patches: all, then three quarters, drawn from the whole grid.
    assert seen == {(4, None, -1), (16, None, -1), (4, 3, 3), (16, 12, 15)}


def test_the_growth_space_is_every_combination_under_the_bound() -> None:
    given = recipe()
    found = given.stages[1].candidates(given.model)
    bound = 2.5 * training_flops(given.model, 16)
    expected = []
    for depth, width in itertools.product([1, 2, 3], [8, 16]):
        sizes = {k: v for k, v, old in (("image.depth", depth, 1), ("text.width", width, 8)) if v != old}
        if training_flops(given.model.grown(sizes), 16) <= bound:
            expected.append(sizes)
    costs = [training_flops(spec, 16) for _, spec in found]
    assert costs == sorted(costs)
    assert sorted(map(str, expected)) == sorted(str(sizes) for sizes, _ in found)
    assert 3 < len(found) < 7
    assert given.specs()[1] == found[-1][1]


def test_a_search_is_written_down_with_what_was_rejected_and_what_it_cost(whole: Path) -> None:
    found = searched(whole)
    assert found["step"] == 3
    rows = found["candidates"]
    assert [row["sizes"] for row in rows] == [sizes for sizes, _ in recipe().stages[1].candidates(recipe().model)]
    assert all(2 < row["loss"] < 6 for row in rows)
    assert len({row["loss"] for row in rows}) == len(rows)
    best = min(rows, key=lambda row: row["score"])
    assert best["sizes"] == found["chosen"]
    for row in rows:
        assert row["score"] == pytest.approx(row["loss"] * row["flops_per_sample"] ** found["exponent"], rel=1e-9)
        assert row["spent"] == pytest.approx(48 * row["flops_per_sample"])
    assert found["flops"] == pytest.approx(sum(row["spent"] for row in rows))
    state = find_commit(str(whole)).manifest.state
    assert state.decisions == (Decision(stage=1, grow=found["chosen"]),)
    assert [event.event for event in state.lineage][:2] == ["start", "search"]
    assert state.lineage[1].detail["candidates"] == rows
    steps = lines(whole, "step")
    trained = 12 * (steps[4]["flops"] - steps[3]["flops"]) / 12  # of a step after the search
    assert steps[3]["flops"] - steps[2]["flops"] == pytest.approx(found["flops"] + trained, rel=0.2)
    page = (whole / "report.html").read_text()
    assert "Search for the next size" in page
    assert all(f"{row['score']:g}" in page for row in rows)


@pytest.mark.parametrize("at", ["in the second trial", "after the search", "in the stage"])
def test_a_kill_repeats_the_search_to_the_same_choice(
    at: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    real_run_trial, real_step, real_grow = search.run_trial, loop.Run.step, loop.grow

    def run_trial(*arguments: Any) -> Any:
        if at == "in the second trial" and next(calls) == 1:
            raise Died
        return real_run_trial(*arguments)

    def grow(*arguments: Any) -> Any:
        if at == "after the search":
            raise Died
        return real_grow(*arguments)

    def step(run: loop.Run, batch: Any) -> None:
        if at == "in the stage" and run.state.step == 5:
            raise Died
        real_step(run, batch)

    monkeypatch.setattr(search, "run_trial", run_trial)
    monkeypatch.setattr(loop, "grow", grow)
    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(Died):
        train(recipe(), tmp_path)
    monkeypatch.undo()
    assert train(recipe(), tmp_path).finished
    assert searched(tmp_path) == searched(whole)
    ours, theirs = find_commit(str(tmp_path)), find_commit(str(whole))
    assert ours.manifest.state.decisions == theirs.manifest.state.decisions
    assert ours.manifest.state.flops == theirs.manifest.state.flops
    mine, other = ours.tensors(), theirs.tensors()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("every", ["12", "1h"], ids=["a commit at this step before", "none"])
def test_a_stop_between_trials_keeps_the_finished_ones(
    every: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first trial and after the third: none is made twice, and the end is the same."""
    tried, real = itertools.count(1), loop.Run._tried
    made: list[dict[str, Any]] = []

    def asked_to_stop(run: loop.Run, trial: Trial) -> bool:
        made.append(trial.sizes)
        run.stop.requested = next(tried) in (1, 3)
        return real(run, trial)

    monkeypatch.setattr(loop.Run, "_tried", asked_to_stop)
    given = recipe(f"checkpoint.every={every}")
    for finished in (1, 3):
        assert not train(given, tmp_path).finished
        state = find_commit(str(tmp_path)).manifest.state
        assert (state.step, state.stage) == (3, 0)
        assert [trial.sizes for trial in state.trials] == made == made[:finished]
    assert train(given, tmp_path).finished
    assert made == [row["sizes"] for row in searched(whole)["candidates"]]
    assert searched(tmp_path) == searched(whole)
    ours, theirs = find_commit(str(tmp_path)), find_commit(str(whole))
    assert ours.manifest.state.decisions == theirs.manifest.state.decisions
    assert ours.manifest.state.trials == ()
    assert ours.manifest.state.flops == theirs.manifest.state.flops
    mine, other = ours.tensors(), theirs.tensors()
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_trials_of_another_future_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a trial and continued: what a trial depends on may have changed, as its stage has not begun."""
    made, real = [], loop.Run._tried

    def asked_to_stop(run: loop.Run, trial: Trial) -> bool:
        made.append(trial.sizes)
        run.stop.requested = True
        return real(run, trial)

    monkeypatch.setattr(loop.Run, "_tried", asked_to_stop)
    for more in ([], ["checkpoint.keep=19"], ["stages.1.mixture={old: 1, new: 1}"]):
        assert not train(recipe(*more), tmp_path).finished
    assert len(find_commit(str(tmp_path)).manifest.state.trials) == 1
    assert made == [made[0], made[1], made[0]]
    assert made[0] != made[1]


def test_a_search_beats_before_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it may take any time: the watchdog's limit is that of a step."""
    phases: list[str] = []
    real = Watchdog.at

    def at(watch: Watchdog, phase: str, *arguments: Any) -> None:
        phases.append(phase)
        real(watch, phase, *arguments)

    monkeypatch.setattr(Watchdog, "at", at)
    assert train(recipe(), tmp_path).finished
    trials = len(searched(tmp_path)["candidates"])
    assert phases.count("search") >= trials * 4  # 48 samples in batches of 12


@pytest.mark.parametrize(
    "engine",
    [
        "{kind: fsdp}",
        pytest.param("{kind: ddp}", marks=pytest.mark.slow),
        pytest.param("{kind: deepspeed, zero_stage: 3}", marks=pytest.mark.slow),
    ],
)
def test_engines_choose_alike(engine: str, whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(group: World) -> bool:
        return train(recipe(f"engine={engine}"), tmp_path).finished

    assert on_ranks(2, one_rank) == [True] * 2
    ours, theirs = searched(tmp_path), searched(whole)
    assert ours["chosen"] == theirs["chosen"]
    for mine, other in zip(ours["candidates"], theirs["candidates"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["spent"] == other["spent"]


def test_trials_read_the_newest_sources_and_a_stage_replays_the_old(whole: Path) -> None:
    given = recipe()
    assert given.newest(1).weights == (0.0, 0.75)
    assert recipe("stages.1.mixture={old: 1}", "stages.0.mixture={new: 1, old: 1}").newest(1).weights == (0.875, 0.125)
    assert [m.weights for m in given.mixtures()] == [(1.0, 0.0), (0.25, 0.75)]
    passes = [row["passes"] for row in lines(whole, "step")]
    assert passes[2]["new"] == 0 < passes[3]["new"]
    # A quarter of the second stage's 36 samples in addition to the 36 of the first.
    assert passes[-1]["old"] / passes[2]["old"] == pytest.approx((36 + 9) / 36)


def test_replay_of_a_replay_keeps_the_proportions() -> None:
    sources = "data.train=[{source: samples://emoji, name: a}, {source: samples://emoji/held_out, name: b, weight: 0}]"
    second, third = "{samples: 24, mixture: {b: 3}, replay: 0.4}", "{samples: 24, mixture: {a: 2}, replay: 0.5}"
    stages = f"stages=[{{samples: 24}}, {second}, {third}]"
    weights = [m.weights for m in recipe(sources, stages).mixtures()]
    assert weights[1:] == [pytest.approx((0.4, 0.6)), pytest.approx((0.5 + 0.5 * 0.4, 0.5 * 0.6))]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            "{samples: 12, grow: {image.depth: 2}, search: {space: {text.depth: [2]}, max_flops: 2, samples: 12}}",
            "leave out",
        ),
        ("{samples: 12, search: {space: {text.depth: []}, max_flops: 2, samples: 12}}", "text.depth is empty"),
        ("{samples: 12, search: {space: {text.depht: [2]}, max_flops: 2, samples: 12}}", "text.depht"),
        (
            f"{{samples: 12, search: {{space: {{text.depth: {list(range(2, 300))}}}, max_flops: 2, samples: 12}}}}",
            "more than 256",
        ),
        ("{samples: 12, replay: 0.5}", "name the new sources in mixture"),
    ],
)
def test_impossible_searches_are_refused(stage: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(f"stages=[{{samples: 36, mixture: {{old: 1, new: 1}}}}, {stage}]")
