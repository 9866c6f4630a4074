"""A store that fails for a while: training goes on where it can, waits where it must, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.launch.commands.status import read_status
from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES, lines, measured
from treering.training import uploads
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.store import Store, StoreError
from treering.training.loop import Run, train
from treering.training.report.history import lineage
from treering.training.report.reading import read_run
from treering.training.world import World

GROWS = "stages=[{samples: 120}, {samples: 120, grow: {image.depth: 2}}]"
SMALL = [*SIZES, GROWS, "eval.suites=[]", "checkpoint={every: 24, keep: 99}"]


class Outage:
    """The store of this process, which fails while `when(the run's step)` says so."""

    def __init__(self, patch: pytest.MonkeyPatch, when: Callable[[int], bool], what: str = "") -> None:
        self.failed = 0
        self.step = 0
        put, put_new, step = Store.put, Store.put_new, Run.step

        def failing(real: Callable[..., Any]) -> Callable[..., Any]:
            def tried(store: Store, name: str, data: bytes) -> Any:
                if name.startswith("step-") and what in name and when(self.step):
                    self.failed += 1
                    raise StoreError("the store is away")
                return real(store, name, data)

            return tried

        def watched(run: Run, batch: Any) -> None:
            run.uploads.finish()  # so that what fails does not depend on how fast it fails
            step(run, batch)
            self.step = run.state.step

        patch.setattr(Store, "put", failing(put))
        patch.setattr(Store, "put_new", failing(put_new))
        patch.setattr(Run, "step", watched)
        patch.setattr(uploads, "RETRY_SECONDS", 0.01)


def train_small(out: Path, *more: str) -> None:
    torch.set_num_threads(1)
    assert train(read_recipe("emoji", [*SMALL, *more]).recipe, out).finished


def committed(out: Path) -> list[int]:
    return [int(name[5:17]) for name in Commits(Store(str(out / "commits"))).names()]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("whole")
    train_small(out)
    return measured(out, "loss", "grad_norm")


def test_training_goes_on_without_a_commit(
    truth: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Commits between steps 3 and 8 fail: it is said once, the log has each, and the run is the same to the bit."""
    outage = Outage(monkeypatch, lambda step: 3 <= step < 8)
    monkeypatch.setattr(uploads, "RETRY_SECONDS", 1000.0)
    train_small(tmp_path)
    assert outage.failed
    assert measured(tmp_path, "loss", "grad_norm") == truth
    assert committed(tmp_path) == [2, 8, 10, 12, 14, 16, 18, 20]
    failed = lines(tmp_path, "commit_failed")
    assert [row["step"] for row in failed] == [4, 6]
    assert {row["error"] for row in failed} == {"the store is away"}
    said = [line for line in capfd.readouterr().err.splitlines() if "is away" in line]
    assert said == ["warning: no commit of step 4: the store is away; training goes on and commits again soon"]
    rows = [row for row in lineage(read_run(tmp_path)) if row["event"] == "commit_failed"]
    assert [(row["count"], row["text"][:17]) for row in rows] == [(2, "the store is away")]


def test_a_failed_commit_is_made_up_for_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the next interval, which may be an hour away."""
    Outage(monkeypatch, lambda step: 3 <= step < 5)
    train_small(tmp_path, "checkpoint={every: 48, keep: 99}")
    assert committed(tmp_path)[:2] == [5, 8]


@pytest.mark.parametrize(("step", "reason"), [(10, "growth"), (20, "end")])
def test_a_commit_that_is_needed_waits_for_the_store(
    step: int,
    reason: str,
    truth: list[tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    outage = Outage(monkeypatch, lambda at: at == step and outage.failed < 9)
    train_small(tmp_path)
    assert measured(tmp_path, "loss", "grad_norm") == truth
    assert committed(tmp_path) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert {row["reason"] for row in lines(tmp_path, "commit_failed")} == {reason}
    said = [line for line in capfd.readouterr().err.splitlines() if "is away" in line]
    assert said == [f"warning: no commit of step {step}: the store is away; trying again for up to 1 h 00 min"]


def test_it_is_said_when_training_stops_for_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although the first of the failures, minutes ago, was said as well."""
    outage = Outage(monkeypatch, lambda at: 7 <= at < 10 or (at == 10 and outage.failed < 9))
    train_small(tmp_path)
    said = [line.partition("; ")[2] for line in capfd.readouterr().err.splitlines() if "is away" in line]
    assert said == ["training goes on and commits again soon", "trying again for up to 1 h 00 min"]


def test_patience_ends(truth: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence; the same command then continues from the newest commit, to the same end."""
    with monkeypatch.context() as patch:
        outage = Outage(patch, lambda step: step >= 9)
        with pytest.raises(StoreError, match=r"^the store is away; tried for .*/step-0{11}8-.*, and the same"):
            train_small(tmp_path, "checkpoint.wait_for_store=0.05s")
        assert outage.failed > 1
        assert str(read_status(str(tmp_path))["commit_failure"]).startswith("the store is away (")
    assert committed(tmp_path) == [2, 4, 6, 8]
    train_small(tmp_path)
    assert measured(tmp_path, "loss", "grad_norm") == truth
    assert read_status(str(tmp_path))["commit_failure"] is None


@pytest.mark.parametrize("what", ["model-00001", "manifest", "COMMIT"])
def test_what_fails_on_one_rank_is_survived_by_all(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ranks: Callable[..., list[Any]]
) -> None:
    """Rank 1's part, or what the first rank writes at the end: under FSDP every rank has parts."""

    def one_rank(world: World) -> int:
        outage = Outage(monkeypatch, lambda step: 3 <= step < 6 or (step == 10 and outage.failed < 3), what)
        train_small(tmp_path, "engine.kind=fsdp")
        return outage.failed

    assert sum(on_ranks(2, one_rank)) >= 3
    assert committed(tmp_path) == [2, *range(6, 21, 2)]
    assert lines(tmp_path, "end")


def test_a_run_that_was_taken_over_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However patient it is, and although nothing waits for that commit."""

    def taken(store: Store, name: str) -> bytes:
        if name == "attempt-0002.json":
            return json.dumps({"who": "the other"}).encode()
        return get(store, name)

    get = Store.get
    monkeypatch.setattr(Store, "get", taken)
    with pytest.raises(StoreError, match=r"another run \('the other'\) took over"):
        train_small(tmp_path)


def test_old_commits_that_cannot_be_removed_do_not_undo_the_new_one(
    truth: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def kept(store: Store, names: object) -> None:
        raise StoreError("nothing can be deleted")

    monkeypatch.setattr(Store, "delete", kept)
    train_small(tmp_path, "checkpoint.keep=1")
    assert measured(tmp_path, "loss", "grad_norm") == truth
    assert committed(tmp_path) == list(range(2, 21, 2))
    assert "warning: older commits were not removed: nothing can be deleted" in capfd.readouterr().err


def test_a_best_commit_that_failed_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best score goes back to that of a commit that is there, so that the next better one is kept."""
    scores = iter([0.5, 0.9, 0.7])

    def scored(run: Run) -> None:
        if run.state.step in (2, 5, 7):
            score = next(scores)
            if run.state.best is None or score > run.state.best:
                run.state = run.state.model_copy(update={"best": score})
                run.evaluations.is_best = True

    monkeypatch.setattr(Run, "evaluate", scored)
    Outage(monkeypatch, lambda step: step == 5)
    monkeypatch.setattr(uploads, "RETRY_SECONDS", 1000.0)
    train_small(tmp_path, "checkpoint={every: 1_000_000, keep: 99}")
    found = Commits(Store(str(tmp_path / "commits")))
    bests = {found.open(name).manifest.state.step: found.open(name).manifest.state.best for name in found.names()}
    assert bests == {2: 0.5, 7: 0.7, 10: 0.7, 20: 0.7}
