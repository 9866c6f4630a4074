"""Going back: after a streak of bad steps a run returns to its last good commit and passes over the samples since."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import dies, lines, measured
from treering.training import loop
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store
from treering.training.health.divergence import Health, RecoveryConfig
from treering.training.loop import train
from treering.training.state import Event, RunState, TrainingError
from treering.training.world import World

OVERRIDES = [
    "data.batch=4",
    "model={embed_dim: 8, image: {width: 8, depth: 1, heads: 1, patch: 12, resolution: 12}, "
    "text: {width: 8, depth: 1, heads: 1, context: 8}, captioner: {depth: 1}}",
    "stages=[{samples: 40}, {grow: {image.depth: 2}, samples: 120}]",
    "schedule.warmup=4",
    "eval.suites=[]",
    "log.every=1",
    "checkpoint={every: 20, keep: 99}",
]


class Trouble:
    """At some places of the data order: `nan` gradients, or losses times 100. Notes which keys each step had, last."""

    def __init__(self, patch: pytest.MonkeyPatch, nan: Any = (), leap: Any = (), dies_at: int | None = None) -> None:
        self.keys: dict[int, tuple[str, ...]] = {}
        self.cursors: list[int] = []
        step, norm = loop.Run.step, torch.nn.utils.get_total_norm
        broken = [False]

        def watched(run: loop.Run, batch: Any) -> None:
            cursor = run.state.cursor
            if dies_at is not None and len(self.cursors) == dies_at:
                raise KeyboardInterrupt
            self.cursors.append(cursor)
            self.keys[run.state.step] = batch.keys
            broken[0] = cursor in nan
            step(run, batch)
            if cursor in leap:
                for loss in run.result.losses.values():
                    loss.mul_(100)

        patch.setattr(loop.Run, "step", watched)
        patch.setattr(torch.nn.utils, "get_total_norm", lambda g: norm(g) * (float("nan") if broken[0] else 1))


def run(out: Path, *more: str) -> None:
    train(read_recipe("emoji", [*OVERRIDES, *more]).recipe, out)


def losses(out: Path) -> list[tuple[int, float, float]]:
    return measured(out, "loss", "grad_norm")


def rollbacks(out: Path) -> list[tuple[int, int, int]]:
    lineage = json.loads((out / "lineage.json").read_text())
    return [(e["step"], e["detail"]["batches"], e["detail"]["times"]) for e in lineage if e["event"] == "rollback"]


def test_ten_steps_without_a_finite_gradient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At cursors 12 to 25: noticed at step 22, back to 10, on with cursor 22; four more are skipped, then all is well.

    The whole way is the same when the run dies after it went back, and once more later.
    """
    with pytest.MonkeyPatch.context() as patch:
        whole = Trouble(patch, nan=range(12, 26))
        run(tmp_path / "whole")
    assert whole.cursors == list(range(22 + 30))
    assert rollbacks(tmp_path / "whole") == [(10, 12, 1)]
    assert [row["step"] for row in lines(tmp_path / "whole", "step")] == list(range(1, 41))
    assert find_commit(str(tmp_path / "whole")).manifest.state.cursor == 52
    said = " ".join(capsys.readouterr().err.split())
    assert "no finite gradient in the last 10 steps up to step 22; went back to step-000000000010-attempt-0001" in said
    assert "skipping 12 batches" in said
    with pytest.MonkeyPatch.context() as patch:  # the samples are those of the order, twelve batches on
        plain = Trouble(patch)
        run(tmp_path / "plain", "stages=[{samples: 40}, {grow: {image.depth: 2}, samples: 168}]")
    assert all(whole.keys[step] == plain.keys[step] for step in range(10))
    assert all(whole.keys[step] == plain.keys[step + 12] for step in range(10, 40))
    for dies_at in (24, 31):
        out = tmp_path / f"dies-{dies_at}"
        with pytest.MonkeyPatch.context() as patch:
            Trouble(patch, nan=range(12, 26), dies_at=dies_at)
            with pytest.raises(KeyboardInterrupt):
                run(out)
        with pytest.MonkeyPatch.context() as patch:
            again = Trouble(patch, nan=range(12, 26))
            run(out)
        assert losses(out) == losses(tmp_path / "whole")
        assert rollbacks(out) == [(10, 12, 1)]
        assert all(whole.keys[step] == keys for step, keys in again.keys.items())


def test_processes_that_share_the_state_go_back_together(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """Two ranks under FSDP2; the losses are those of one process."""

    def one_rank(world: World, engine: str) -> list[int]:
        with pytest.MonkeyPatch.context() as patch:
            trouble = Trouble(patch, nan=range(12, 22))
            run(tmp_path / engine, f"engine.kind={engine}")
        return trouble.cursors

    assert on_ranks(2, one_rank, "fsdp") == [list(range(52))] * 2
    assert on_ranks(1, one_rank, "ddp") == [list(range(52))]
    assert rollbacks(tmp_path / "fsdp") == rollbacks(tmp_path / "ddp") == [(10, 12, 1)]
    for ours, theirs in zip(losses(tmp_path / "fsdp"), losses(tmp_path / "ddp"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)


def test_a_loss_that_leapt(tmp_path: Path) -> None:
    """At cursors 27 to 39: commits 30 and 35 may be spoilt, so the one of step 25 it is, and they are gone."""
    with pytest.MonkeyPatch.context() as patch:
        trouble = Trouble(patch, leap=range(27, 40))
        run(tmp_path)
    assert trouble.cursors == [*range(37), *range(37, 37 + 15)]
    assert rollbacks(tmp_path) == [(25, 12, 1)]
    steps = {int(name[5:17]): int(name[-4:]) for name in Commits(Store(str(tmp_path / "commits"))).names()}
    assert steps == {5: 1, 10: 1, 15: 1, 20: 1, 25: 1, 30: 2, 35: 2, 40: 2}


def test_it_gives_up_where_going_back_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = Trouble(monkeypatch, nan=range(12, 200))
    with pytest.raises(TrainingError, match=r"up to step 20, and again after 2 rollbacks; lower optimizer.lr"):
        run(tmp_path, "recovery.max_rollbacks=2")
    assert trouble.cursors == list(range(12 + 3 * 10))
    assert find_commit(str(tmp_path)).manifest.state.step == 15
    assert not [e for e in find_commit(str(tmp_path)).manifest.state.lineage if e.event == "end"]


def test_back_over_a_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble right after the growth at step 10: the grown model goes, and grows again from the same commit."""
    Trouble(monkeypatch, nan=range(10, 20))
    run(tmp_path, "checkpoint.every=40")
    assert rollbacks(tmp_path) == [(10, 10, 1)]
    lineage = find_commit(str(tmp_path)).manifest.state.lineage
    assert [e.event for e in lineage].count("grow") == 1


def test_a_growth_in_the_middle_of_a_spike(tmp_path: Path) -> None:
    """From step 16 on, growth at step 20: it goes back to the commit of step 15, before all of it."""
    with pytest.MonkeyPatch.context() as patch:
        Trouble(patch, leap=range(16, 29))
        run(tmp_path, "stages=[{samples: 80}, {grow: {image.depth: 2}, samples: 80}]")
    assert rollbacks(tmp_path) == [(15, 11, 1)]


def test_where_things_lie_after_a_rollback() -> None:
    events = (
        Event(event="start", step=0, samples=0),
        Event(event="rollback", step=20, samples=80, detail={"batches": 2}),
        Event(event="rollback", step=30, samples=120, detail={"batches": 5}),
    )
    state = RunState(step=33, lineage=events)
    assert state.cursor == 40
    assert [state.skipped_batches(before=step) for step in (0, 20, 21, 30, 31, 99)] == [0, 0, 2, 2, 7, 7]


def test_what_is_well() -> None:
    config, weights = RecoveryConfig(bad_steps=3, spike_factor=3.0), {"a": 1.0, "b": 2.0}
    health = Health()
    for step, loss in enumerate([9.0, 1.0] * 5, start=1):  # no spike is seen before ten steps are known
        health = health.after_step(config, step, {"a": loss, "b": 1.0}, weights, True)
    assert (health.bad_steps, health.healthy_step, len(health.losses["a"])) == (0, 10, 10)
    usual = 5.0 + 2 * 1.0  # medians
    assert health.after_step(config, 11, {"a": 3 * usual - 2, "b": 1.0}, weights, True).bad_steps == 0
    spiked = health.after_step(config, 11, {"a": 3 * usual - 1.9, "b": 1.0}, weights, True)
    assert (spiked.bad_steps, spiked.spiked, spiked.healthy_step, spiked.losses) == (1, True, 10, health.losses)
    skipped = spiked.after_step(config, 12, {"a": float("nan"), "b": 1.0}, weights, False)
    assert (skipped.bad_steps, skipped.spiked) == (2, True)
    again = skipped.after_step(config, 13, {"a": 5.0, "b": 1.0}, weights, True)
    assert (again.bad_steps, again.spiked, again.healthy_step) == (0, False, 13)
    ill = skipped.after_step(config, 13, {"a": 99.0, "b": 1.0}, weights, True)
    assert ill.after_step(config, 14, {"a": 5.0, "b": 1.0}, weights, True).bad_steps == 4  # until it goes back
    assert not health.after_step(RecoveryConfig(spike_factor=None), 11, {"a": 1e9, "b": 1.0}, weights, True).bad_steps


def test_an_objective_that_is_weighed_more_is_no_spike() -> None:
    """A hundred times the weighted sum, since the weight of the larger loss rose from nothing."""
    config, health, losses = RecoveryConfig(), Health(), {"a": 1.0, "b": 100.0}
    for step in range(1, 60):
        health = health.after_step(config, step, losses, {"a": 1.0, "b": 0.0 if step < 50 else 1.0}, True)
    assert (health.bad_steps, health.healthy_step) == (0, 59)


def test_a_schedule_of_weights_is_no_spike(tmp_path: Path) -> None:
    terms = "objectives={contrastive: {weight: 1.0}, caption: {weight: 9.0, schedule: [[0.5, 0.0], [0.55, 1.0]]}}"
    run(tmp_path, "stages=[{samples: 160}]", terms, "recovery.bad_steps=3")
    seen = [row["loss"] for row in lines(tmp_path, "step")]
    assert seen[-1] > 10 * seen[15]
    assert not rollbacks(tmp_path)


def test_one_bad_step_is_one_bad_step(tmp_path: Path) -> None:
    """However many steps lie between two log lines: a spike at a line's own step, and one between two lines."""
    with pytest.MonkeyPatch.context() as patch:
        Trouble(patch, leap=(29, 33))
        run(tmp_path, "stages=[{samples: 160}]", "log.every=10")
    assert not rollbacks(tmp_path)


def test_bad_steps_between_two_log_lines_are_seen(tmp_path: Path) -> None:
    """Ten spikes up to step 31: all is well again at the line of step 36, and the weights are spoilt."""
    with pytest.MonkeyPatch.context() as patch:
        Trouble(patch, leap=range(21, 31))
        run(tmp_path, "stages=[{samples: 160}]", "log.every=18")
    assert rollbacks(tmp_path) == [(20, 16, 1)]


def test_a_resumed_run_judges_as_the_whole_one(tmp_path: Path) -> None:
    """Five steps without a finite gradient behind the commit of step 15, where the run dies; a line every ten steps."""
    more = ("stages=[{samples: 160}]", "log.every=10", "recovery.bad_steps=6")
    for name, dies_at in (("whole", None), ("dies", 16)):
        with pytest.MonkeyPatch.context() as patch:
            Trouble(patch, nan=range(15, 20), dies_at=dies_at)
            with contextlib.suppress(KeyboardInterrupt):
                run(tmp_path / name, *more)
    with pytest.MonkeyPatch.context() as patch:
        Trouble(patch, nan=range(15, 20))
        run(tmp_path / "dies", *more)
    assert losses(tmp_path / "dies") == losses(tmp_path / "whole")
    assert rollbacks(tmp_path / "dies") == rollbacks(tmp_path / "whole") == []
    whole, dies = (find_commit(str(tmp_path / name)).manifest.state.health for name in ("whole", "dies"))
    assert whole == dies


def test_the_last_healthy_commit_is_kept(tmp_path: Path) -> None:
    """Commits every second step, of which one is to be kept: that of step 20, before the first spike, is there."""
    with pytest.MonkeyPatch.context() as patch:
        Trouble(patch, leap=range(21, 31))
        run(tmp_path, "stages=[{samples: 160}]", "checkpoint={every: 8, keep: 1}")
    assert rollbacks(tmp_path) == [(20, 11, 1)]


def test_rollbacks_are_bounded_over_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bad steps in every eight, all of them followed by good ones."""
    trouble = Trouble(monkeypatch, nan=[cursor for cursor in range(12, 400) if cursor % 8 < 3])
    with pytest.raises(TrainingError, match="again after 3 rollbacks"):
        run(tmp_path, "recovery={bad_steps: 3, max_rollbacks: 3}")
    assert len(trouble.cursors) < 60
    assert [times for _, _, times in rollbacks(tmp_path)] == [1, 2, 3]


def test_the_best_model_is_committed(tmp_path: Path) -> None:
    """By the clock alone no commit would fall on the step of an evaluation."""
    score = "retrieval/image_to_text@1"
    more = ("stages=[{samples: 240}]", "eval={suites: [retrieval], every: 40, examples: 0}", "optimizer.lr=1e-3")
    run(tmp_path, *more, f"checkpoint={{every: 1h, keep: 1, keep_best: {score}}}")
    seen = {row["step"]: row["scores"][score] for row in lines(tmp_path, "eval")}
    best = max(seen.values())
    commits = Commits(Store(str(tmp_path / "commits")))
    held = {int(name[5:17]): commits.open(name).manifest.scores.get(score) for name in commits.names()}
    assert best in held.values()
    assert held == {step: seen[step] for step in held}
    assert len(seen) == 6
    reasons = [row["reason"] for row in lines(tmp_path, "commit")]
    highest, rises = -1.0, 0
    for step in sorted(seen)[:-1]:
        rises += seen[step] > highest
        highest = max(highest, seen[step])
    assert reasons == ["best"] * rises + ["end"]
    assert find_commit(str(tmp_path)).manifest.state.best == best


def test_the_best_value_is_of_the_score_that_is_named(tmp_path: Path) -> None:
    """A resume may name another score, and another run begins with none: what was best so far says nothing then."""
    more = ("eval={suites: [retrieval], every: 40, examples: 0}", "optimizer.lr=1e-3", "stages=[{samples: 160}]")
    named = "checkpoint={{every: 1h, keep: 9, keep_best: retrieval/{}}}"
    before = read_recipe("emoji", [*OVERRIDES, *more, named.format("image_to_text@10")]).recipe
    with dies("step", 20):
        train(before, tmp_path)
    was = find_commit(str(tmp_path))
    run(tmp_path, *more, named.format("image_to_text@1"))
    run(tmp_path / "from", *more, named.format("image_to_text@10"), f"init_from={{commit: '{was.url}', load: all}}")
    for out, score in ((tmp_path, "retrieval/image_to_text@1"), (tmp_path / "from", "retrieval/image_to_text@10")):
        found = find_commit(str(out)).manifest.state.best
        seen = [row["scores"][score] for row in lines(out, "eval") if row["step"] > was.manifest.state.step]
        assert found == max(seen)
    assert was.manifest.state.best > max(row["scores"]["retrieval/image_to_text@1"] for row in lines(tmp_path, "eval"))


def test_a_best_score_that_only_a_later_stage_has(tmp_path: Path) -> None:
    more = (
        "stages=[{samples: 20}, {samples: 20, grow: {captioner.depth: 1}}]",
        "model.captioner=null",
        "eval={suites: [retrieval, captioning], every: 20, examples: 0}",
    )
    run(tmp_path, *more, "checkpoint={every: 1h, keep_best: captioning/bleu}")
    assert find_commit(str(tmp_path)).manifest.state.best is not None
    with pytest.raises(ValueError, match=r"'captioning/blue' is not a score of captioning; there are captioning/"):
        run(tmp_path / "blue", *more, "checkpoint.keep_best=captioning/blue")
    with pytest.raises(RecipeError, match=r"a score of no suite in eval.suites, which has retrieval, captioning"):
        run(tmp_path / "other", *more, "checkpoint.keep_best=zero_shot/role")
