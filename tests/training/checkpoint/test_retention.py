"""Which commits are kept, what that costs, and the index that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.tests.support.small_commits import ALONE, SPEC, begin
from treering.training.checkpoint import writer
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.config import CheckpointConfig
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store, StoreError
from treering.training.state import RunState


def test_what_is_kept(tmp_path: Path) -> None:
    """The two newest, the first of every 50 samples, the best, and the one before a growth; each for its own reason."""
    commits = Commits(Store(str(tmp_path)))
    policy = CheckpointConfig(keep=2, keep_every=50, keep_best="zero_shot/role")
    scores = {4: 0.2, 7: 0.9, 8: 0.9, 11: 0.5}
    for step in range(1, 16):
        begin(
            commits,
            {"model/b": torch.ones(1)},
            step=step,
            policy=policy,
            reason="growth" if step == 3 else "interval",
            scores={"zero_shot/role": scores[step]} if step in scores else {},
        ).finish()
    assert [int(name[5:17]) for name in commits.names()] == [3, 5, 8, 10, 14, 15]
    assert not [path for path in commits.store.sizes() if path.startswith("step-000000000007")]
    Commits(Store(str(tmp_path))).retain(CheckpointConfig(keep=1), attempt=1)  # another process, another policy
    assert [int(name[5:17]) for name in commits.names()] == [3, 15]


class Counting(Store):
    """A store that counts what is read and listed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.read: list[str] = []
        self.listed = 0

    def get(self, name: str) -> bytes:
        self.read.append(name)
        return super().get(name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return self._counted(super().sizes(prefix))

    def beginning(self, start: str) -> dict[str, int]:
        return self._counted(super().beginning(start))

    def _counted(self, found: dict[str, int]) -> dict[str, int]:
        self.listed += len(found)
        return found


EVERY = CheckpointConfig(keep=3, keep_every=10)


def kept_of(store: Store, steps: int) -> None:
    """Commits of `steps` steps, all kept."""
    commits = Commits(store)
    for step in range(1, steps + 1):
        begin(commits, {"model/b": torch.ones(1)}, step=step, policy=EVERY).finish()


def test_what_a_commit_costs_does_not_grow_with_those_that_are_kept(tmp_path: Path) -> None:
    """The first commit of an attempt and the next one, where 5 and where 40 are kept: as many reads; and a line of a
    listing for every object that is there, once, also when all of them are removed."""
    reads = {}
    for kept in (5, 40):
        kept_of(Store(str(tmp_path / f"{kept}")), kept)
        store = Counting(str(tmp_path / f"{kept}"))
        commits = Commits(store)
        for step in (kept + 1, kept + 2):
            store.listed = 0
            begin(commits, {"model/b": torch.ones(1)}, step=step, policy=EVERY).finish()
            assert store.listed == 3 * step + 2  # a part, a manifest and a COMMIT each; its own, before COMMIT, twice
        reads[kept] = len(store.read)
        store.listed = 0
        begin(commits, {"model/b": torch.ones(1)}, step=kept + 3, policy=CheckpointConfig(keep=1)).finish()
        assert store.listed == 3 * (kept + 3) + 2
        assert len(commits.names()) == 1
    assert reads[5] == reads[40] == 2 * 2 + 1  # is it there, and was the place taken over; the index


@pytest.mark.parametrize("index", [None, b"", b"{", b"[]", b'{"commits": {"step-000000000001-attempt-0001": {}}}'])
def test_an_index_that_is_missing_or_damaged_is_made_anew(index: bytes | None, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    kept_of(store, 6)
    whole = (tmp_path / "commits.json").read_bytes()
    if index is None:
        store.delete(["commits.json"])
    else:
        store.put("commits.json", index)
    begin(Commits(store), {"model/b": torch.ones(1)}, step=7, policy=EVERY).finish()
    assert len(Commits(store).names()) == 7
    rows, before = (json.loads(each)["commits"] for each in ((tmp_path / "commits.json").read_bytes(), whole))
    assert rows.keys() == {*Commits(store).names()}
    assert {name: rows[name] for name in before} == before


def test_an_index_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put

    def refused(self: Store, name: str, data: bytes) -> None:
        if name == "commits.json":
            raise StoreError("no")
        put(self, name, data)

    monkeypatch.setattr(Store, "put", refused)
    kept_of(Store(str(tmp_path)), 4)
    assert len(Commits(Store(str(tmp_path))).names()) == 4


def test_an_index_of_commits_that_are_gone_brings_none_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    kept_of(store, 5)
    for path in (tmp_path / Commits(store).names()[1]).iterdir():
        path.unlink()
    begin(Commits(store), {"model/b": torch.ones(1)}, step=6, policy=EVERY).finish()
    names = Commits(store).names()
    assert len(names) == 5
    assert json.loads((tmp_path / "commits.json").read_bytes())["commits"].keys() == {*names}


def test_strangers_objects_are_not_listed(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"foreign-{number}").mkdir()
        (tmp_path / f"foreign-{number}" / "x").touch()
    store = Counting(str(tmp_path))
    commits = Commits(store)
    assert commits.claim_attempt("me") == 1
    begin(commits, {"model/b": torch.ones(1)}, policy=CheckpointConfig(keep=1)).finish()
    assert len(commits.names()) == 1
    store.check()
    assert store.listed < 15
    assert len(list(tmp_path.iterdir())) == 50 + 3  # the commit, the claim, the index


def test_numbers_may_outgrow_their_width(tmp_path: Path) -> None:
    """Attempts and steps are ordered as numbers, parts may be of any rank."""
    store = Store(str(tmp_path))
    store.put("attempt-9999.json", b"{}")
    for attempt in (10_000, 10_001):
        commits = Commits(store)
        assert commits.claim_attempt("me") == attempt
        state = RunState(step=7, attempt=attempt)
        commits.write(Snapshot(SPEC, state, {}, {"model/b": torch.full((1,), float(attempt))}), ALONE)
    begin(commits, {"model/b": torch.ones(1)}, step=7).finish()  # attempt 1
    begin(commits, {"model/b": torch.ones(1)}, step=10**12).finish()
    names = Commits(store).names()
    assert [name.rpartition("-")[2] for name in names] == ["0001", "10000", "10001", "0001"]
    assert commits.open(names[2]).tensors()["model/b"] == 10_001
    assert commits.newest_until(10**11) == 7
    commits.retain(CheckpointConfig(keep=2), attempt=10_001)
    assert Commits(store).names() == names[2:]
    part = writer.CommitPart(file="exp_avg-100000-1234567.safetensors", kind="exp_avg", bytes=1, sha256="", tensors=1)
    assert part.file.startswith("exp_avg-100000")


@pytest.mark.parametrize("fault", ["edited", "of another run", "a folder"])
def test_an_index_that_does_not_say_what_the_commits_say_is_not_believed(fault: str, tmp_path: Path) -> None:
    """The best commit, of step 2, stays."""
    policy = CheckpointConfig(keep=1, keep_best="retrieval/x")

    def scored(folder: Path, scores: dict[int, float]) -> None:
        commits = Commits(Store(str(folder)))
        if commits.run is None:
            commits.claim_attempt("a test")
        for step, score in scores.items():
            begin(commits, {"model/b": torch.ones(1)}, step=step, policy=policy, scores={"retrieval/x": score}).finish()

    scored(tmp_path / "run", {1: 0.1, 2: 0.9, 3: 0.2})
    index = tmp_path / "run/commits.json"
    if fault == "edited":
        index.write_text(index.read_text().replace("0.9", "0.0"))
    elif fault == "of another run":
        scored(tmp_path / "other", {2: 0.0})
        index.write_bytes((tmp_path / "other/commits.json").read_bytes())
    else:
        index.unlink()
        index.mkdir()
    scored(tmp_path / "run", {4: 0.3})
    assert [int(name[5:17]) for name in Commits(Store(str(tmp_path / "run"))).names()] == [2, 4]


def test_the_best_commit_since_the_evaluation_data_changed_is_kept(tmp_path: Path) -> None:
    """Scores of steps 1 and 2 are of easier pictures; `best` began anew at step 3."""
    policy = CheckpointConfig(keep=1, keep_best="retrieval/x")
    commits = Commits(Store(str(tmp_path)))
    for step, score, best in ((1, 0.8, 0.8), (2, 0.9, 0.9), (3, 0.2, 0.2), (4, 0.4, 0.4), (5, 0.3, 0.4), (6, 0.1, 0.4)):
        state = RunState(step=step, samples=10 * step, attempt=1, best=best)
        snapshot = Snapshot(SPEC, state, {}, {"model/b": torch.ones(1)}, scores={"retrieval/x": score})
        commits.begin(snapshot, ALONE, policy).finish()
    assert [int(name[5:17]) for name in commits.names()] == [4, 6]


@pytest.mark.parametrize("late", ["COMMIT", "manifest.json", ".safetensors", ""])
def test_a_listing_that_comes_late_costs_no_commit(late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings do not show the newest commit, or some of its objects."""
    store = Store(str(tmp_path))
    commits, newest = Commits(store), [0]
    named = Store._named

    def without_the_newest(self: Store, found: Any) -> dict[str, int]:
        hidden = f"step-{newest[0]:012d}-"
        return {name: size for name, size in named(self, found).items() if hidden not in name or late not in name}

    monkeypatch.setattr(Store, "_named", without_the_newest)
    for step in range(1, 6):
        newest[0] = step
        begin(commits, {"model/b": torch.ones(1)}, step=step, policy=CheckpointConfig(keep=2)).finish()
    monkeypatch.undo()
    steps = [int(name[5:17]) for name in Commits(store).names()]
    assert steps[-2:] == [4, 5]
    assert len(steps) <= 3  # the oldest may go one commit later


@pytest.mark.parametrize("claim", [b"", b"[]", b'{"run": ', b"[" * 99_999, b"\xff"])
def test_a_damaged_claim_does_not_make_a_run_another_one(claim: bytes, tmp_path: Path) -> None:
    """The claim before it says whose store it is, or else the commits do."""
    for damaged in ([2], [1, 2]):
        folder = tmp_path / str(len(damaged))
        commits = Commits(Store(str(folder)))
        assert commits.claim_attempt("a") == 1
        begin(commits, {"model/b": torch.ones(1)}, step=1).finish()
        run, again = commits.run, Commits(Store(str(folder)))
        assert again.claim_attempt("b") == 2
        for number in damaged:
            (folder / f"attempt-{number:04d}.json").write_bytes(claim)
        assert Commits(Store(str(folder))).run == (run if damaged == [2] else None)
        third = Commits(Store(str(folder)))
        assert third.claim_attempt("c") == 3
        assert third.run == run
