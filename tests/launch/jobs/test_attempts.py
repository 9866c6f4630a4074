"""What follows an attempt: decisions from the record alone, case by case."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from treering.launch.jobs import attempts


def begin(run: Path, restart: int = 0, attempt: int = 0, used: str = "n1 n2") -> bool:
    about = {"attempt": f"7.{restart}.{attempt}", "used": used}
    return attempts.begin(run, {**about, "job": "7", "nodes": "n[1-2]", "restart": str(restart)})


def end(run: Path, code: int, signal: str = "none", most: int = 100, attempt: str = "7.0.0") -> str:
    return attempts.end(run, attempt, code, signal, most)


def came_to(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "step", "step": step}) + "\n")


def failed(run: Path, host: str, message: str, kind: str = "", seconds: float = 0) -> None:
    folder = run / "job" / "failures"
    folder.mkdir(exist_ok=True)
    word = {"time": time.time() + seconds, "host": host, "message": message, "kind": kind}
    (folder / f"{host}.json").write_text(json.dumps(word))


def said(run: Path, line: str) -> None:
    with (run / "job.log").open("a") as file:
        file.write(line + "\n")


def ends(run: Path) -> list[tuple[str, str]]:
    rows = attempts.read_rows(attempts.attempts_file(run))
    return [(row["kind"], row["reason"]) for row in rows if row["event"] == "end"]


@pytest.mark.parametrize(
    ("code", "signal", "answer"),
    [
        (0, "none", "done"),
        (130, "none", "requeue"),
        (143, "none", "requeue"),
        (1, "USR1", "requeue"),
        (143, "TERM", "halt"),
        (130, "ROOM", "requeue"),
        (1, "none", "retry 1"),
    ],
)
def test_one_attempt(code: int, signal: str, answer: str, tmp_path: Path) -> None:
    begin(tmp_path)
    assert end(tmp_path, code, signal) == answer


def test_crashes_at_one_step_are_retried_after_longer_pauses_and_then_end_the_job(tmp_path: Path) -> None:
    answers = []
    for _ in range(3):
        begin(tmp_path)
        came_to(tmp_path, 12)
        failed(tmp_path, "n2", "it burns")
        answers.append(end(tmp_path, 1))
    assert answers == ["retry 1", "retry 2", "halt"]
    assert attempts.last_end(tmp_path) == "n2: it burns (on n[1-2])"


def test_progress_between_crashes_starts_the_count_over(tmp_path: Path) -> None:
    for step in range(1, 10):
        begin(tmp_path)
        came_to(tmp_path, step)
        assert end(tmp_path, 1) == "retry 1"


def test_a_store_that_does_not_answer_is_retried_for_longer(tmp_path: Path) -> None:
    for number in range(1, attempts.OUTAGES + 1):
        begin(tmp_path)
        failed(tmp_path, "n1", "store s3://b: the server does not answer", "StoreError")
        answer = end(tmp_path, 1)
        pause = min(attempts.LONGEST_PAUSE, attempts.FIRST_PAUSE * 2 ** (number - 1))
        assert answer == (f"retry {pause}" if number < attempts.OUTAGES else "halt")


def test_the_cause_is_reported_and_not_its_consequences(tmp_path: Path) -> None:
    begin(tmp_path)
    failed(tmp_path, "n1", "Read error: Connection reset by peer", "RuntimeError")
    failed(tmp_path, "n2", "process 1 was killed by SIGKILL", seconds=1)
    failed(tmp_path, "n3", "got 0 bytes", "DistNetworkError", seconds=-1)
    end(tmp_path, 1)
    assert attempts.last_end(tmp_path) == "n2: process 1 was killed by SIGKILL (on n[1-2])"


def test_requeues_are_bounded(tmp_path: Path) -> None:
    begin(tmp_path, restart=4)
    assert end(tmp_path, 1, "USR1", 5, "7.4.0") == "requeue"
    begin(tmp_path, restart=5)
    assert end(tmp_path, 1, "USR1", 5, "7.5.0") == "halt"


def test_a_requested_stop_ends_the_job_and_an_old_request_does_not(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "stop").touch()
    os.utime(tmp_path / "job" / "stop", (1, 1))
    begin(tmp_path)
    assert end(tmp_path, 130, "USR1") == "requeue"
    begin(tmp_path)
    (tmp_path / "job" / "stop").touch()
    os.utime(tmp_path / "job" / "stop", (time.time() + 1, time.time() + 1))
    assert end(tmp_path, 130, "USR1") == "done"


def test_an_attempt_without_a_recorded_end_gets_one(tmp_path: Path) -> None:
    begin(tmp_path)
    came_to(tmp_path, 3)
    begin(tmp_path)
    ended = [row for row in attempts.read_rows(attempts.attempts_file(tmp_path)) if row["event"] == "end"]
    assert [(row["kind"], row["step"], row["nodes"]) for row in ended] == [("outside", 3, "n[1-2]")]


def test_the_later_of_two_attempts_owns_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose node was cut off starts elsewhere; what still runs of it ends, and cannot take the run back."""
    assert begin(tmp_path)
    monkeypatch.setenv(attempts.ATTEMPT, "7.0.0")
    assert attempts.lost(tmp_path) is None
    assert begin(tmp_path, restart=1, used="n3")
    assert "attempt 7.0.0 ends: attempt 7.1.0 of this run has started" in str(attempts.lost(tmp_path))
    before = attempts.attempts_file(tmp_path).read_text()
    assert end(tmp_path, 76) == "halt"
    assert not begin(tmp_path, attempt=1)
    assert attempts.attempts_file(tmp_path).read_text() == before
    monkeypatch.setenv(attempts.ATTEMPT, "7.1.0")
    assert attempts.lost(tmp_path) is None
    assert end(tmp_path, 1, attempt="7.1.0") == "retry 1"
    assert begin(tmp_path, restart=1, attempt=1)
    assert attempts.lost(tmp_path)  # processes of the previous try end too
    assert begin(tmp_path, restart=2)
    monkeypatch.delenv(attempts.ATTEMPT)
    assert attempts.lost(tmp_path) is None


def test_a_node_that_reports_itself_unfit_is_excluded(tmp_path: Path) -> None:
    """The log may be the only file that it can write, and has lines of earlier attempts too."""
    said(tmp_path, "n1: this node cannot train: long ago")
    begin(tmp_path)
    said(tmp_path, "n9: this node cannot train: not one of ours")
    said(tmp_path, "n2: this node cannot train: it cannot see the run folder")
    failed(tmp_path, "n1", "got 0 bytes", "DistNetworkError")
    assert end(tmp_path, 130) == "exclude n2"
    assert ends(tmp_path) == [("unfit", "n2: this node cannot train: it cannot see the run folder")]
    begin(tmp_path, attempt=1, used="n1")
    assert end(tmp_path, 0, attempt="7.0.1") == "done"


def test_nodes_that_are_all_unfit_end_the_job(tmp_path: Path) -> None:
    answers = []
    for attempt in range(3):
        begin(tmp_path, attempt=attempt)
        for name in ("n1", "n2"):
            said(tmp_path, f"{name}: this node cannot train: 0 GPUs can be used and 8 are wanted")
        answers.append(end(tmp_path, 3, attempt=f"7.0.{attempt}"))
    assert answers == ["retry 1", "retry 2", "halt"]


def test_a_node_that_alone_cannot_reach_the_store_is_unfit(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "job" / "fit").mkdir()
    (tmp_path / "job" / "fit" / "n1").touch()
    failed(tmp_path, "n2", "store s3://b: the server does not answer", "StoreError")
    assert end(tmp_path, 1) == "exclude n2"
    begin(tmp_path, attempt=1)
    failed(tmp_path, "n2", "store s3://b: the server does not answer", "StoreError")
    assert end(tmp_path, 1, attempt="7.0.1") == "retry 1"  # no node has reached it in this attempt
    begin(tmp_path, attempt=2)
    for name in ("n1", "n2"):
        (tmp_path / "job" / "fit" / name).touch()
    failed(tmp_path, "n1", "store s3://b: the server does not answer", "StoreError")
    assert end(tmp_path, 1, attempt="7.0.2") == "retry 2"  # both had reached it when they began


def test_looks_for_idle_nodes_become_rarer_when_they_bring_none(tmp_path: Path) -> None:
    waits = []
    for restart, used in enumerate(("n1 n2", "n1 n2", "n1 n2", "n1 n2 n3", "n1 n2", "n1 n2")):
        begin(tmp_path, restart, used=used)
        waits.append(attempts.look_interval(attempts.read_rows(attempts.attempts_file(tmp_path)), 600))
        assert end(tmp_path, 130, "ROOM", attempt=f"7.{restart}.0") == "requeue"
    assert waits == [600, 1200, 2400, 600, 1200, 2400]
    begin(tmp_path, 9)
    assert attempts.look_interval(attempts.read_rows(attempts.attempts_file(tmp_path)), 0) == 0
