"""Commits in a local folder, and the other files of a run, when the power fails at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treering.data.storage import atomic_write
from treering.tests.support.power import Call, Disk, recorded
from treering.tests.support.small_commits import begin, truth
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.config import CheckpointConfig
from treering.training.checkpoint.store import Store
from treering.training.logging.jsonl import RunRecords


def committed(store: Path, steps: int) -> tuple[list[Call], list[int]]:
    """The calls of an attempt that commits after each step and keeps one; how many had been made after each."""
    with recorded(store.parent) as calls:
        commits, ends = Commits(Store(str(store))), []
        commits.claim_attempt("me")
        for step in range(1, steps + 1):
            tensors = {f"model/{name}": t + step for name, t in truth().items()}
            begin(commits, tensors, step=step, policy=CheckpointConfig(keep=1)).finish()
            ends.append(len(calls))
    return calls, ends


def test_the_order_of_a_commit(tmp_path: Path) -> None:
    """Every part and the manifest, with their bytes and names, before the COMMIT; that before anything is removed."""
    calls, (first, _) = committed(tmp_path / "a" / "store", 2)
    second = [(call.what, call.path.removeprefix("store/")) for call in calls[first:]]
    here = "step-000000000002-attempt-0001"
    part, manifest, commit = (
        second.index(("name", f"{here}/{file}"))
        for file in ("model-00000-00000.safetensors", "manifest.json", "COMMIT")
    )
    flushes = [i for i, call in enumerate(second) if call == ("flush", here)]
    removed = [i for i, (what, path) in enumerate(second) if what == "remove" and "/." not in path and "/" in path]
    assert part < manifest < commit < min(removed)
    assert any(part < i < manifest for i in flushes)
    assert any(manifest < i < commit for i in flushes)
    assert any(commit < i < min(removed) for i in flushes)
    assert ("flush", "store") in [(call.what, call.path) for call in calls[first : first + commit]]
    assert ("flush", ".") in [(call.what, call.path) for call in calls[:first]]  # the store's own folder is new
    files = [path for what, path in second if what == "flush" and path.endswith(".part")]
    assert len(files) == len({*files}) == 4  # the part, manifest, COMMIT and index, each before it gets its name


@pytest.mark.parametrize("removals", [False, True], ids=["removals are late", "removals are early"])
def test_whenever_the_power_fails_the_last_commit_is_whole(removals: bool, tmp_path: Path) -> None:
    calls, ends = committed(tmp_path / "before" / "store", 3)
    disk = Disk()
    for count, call in enumerate(calls, 1):
        disk.apply(call)
        after = tmp_path / f"{count}"
        after.mkdir()
        for name, data in disk.after_a_cut(removals).items():
            (after / name).parent.mkdir(parents=True, exist_ok=True)
            (after / name).write_bytes(data)
        done = sum(end <= count for end in ends)
        commits = Commits(Store(str(after / "store")))
        names = commits.names()
        newest = int(names[-1][5:17]) if names else 0
        assert newest in (done, done + 1), (count, call)
        if names:
            read = commits.open(names[-1]).tensors()
            assert all(torch.equal(read[f"model/{name}"], t + newest) for name, t in truth().items())
        claimed = (after / "store" / "attempt-0001.json").exists()
        assert claimed or not names
        assert commits.claim_attempt("next") == 1 + claimed


def test_records_that_were_cut_back_are_flushed(tmp_path: Path) -> None:
    """They say which samples are bad and which step comes next in the log."""
    with recorded(tmp_path) as calls:
        records = RunRecords(tmp_path)
        records.clear()
        records.close()
    disk = Disk()
    for call in calls:
        disk.apply(call)
    assert {"metrics.jsonl", "ledger.jsonl"} <= disk.after_a_cut(False).keys()


@pytest.mark.parametrize("number", [22, 95, 9])
def test_a_disk_that_flushes_no_folders_is_used_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(atomic_write.os, "fsync", fsync)
    atomic_write.sync_folder(tmp_path)
