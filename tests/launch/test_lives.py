"""What comes after a life: pure decisions from the record, one case after another."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from treering.launch import lives


def begin(run: Path, restart: int = 0) -> None:
    lives.begin(run, {"job": "7", "nodes": "n[1-2]", "restart": str(restart)})


def came_to(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "step", "step": step}) + "\n")


def failed(run: Path, host: str, message: str, kind: str = "", seconds: float = 0) -> None:
    folder = run / "job" / "failures"
    folder.mkdir(exist_ok=True)
    word = {"time": time.time() + seconds, "host": host, "message": message, "kind": kind}
    (folder / f"{host}.json").write_text(json.dumps(word))


@pytest.mark.parametrize(
    ("code", "signal", "answer"),
    [
        (0, "none", "done"),
        (130, "none", "requeue"),
        (1, "USR1", "requeue"),
        (143, "TERM", "halt"),
        (1, "none", "again 5"),
    ],
)
def test_one_life(code: int, signal: str, answer: str, tmp_path: Path) -> None:
    begin(tmp_path)
    assert lives.end(tmp_path, code, signal, 100) == answer


def test_crashes_at_one_step_are_paused_for_longer_and_then_given_up(tmp_path: Path) -> None:
    answers = []
    for _ in range(3):
        begin(tmp_path)
        came_to(tmp_path, 12)
        failed(tmp_path, "n2", "it burns")
        answers.append(lives.end(tmp_path, 1, "none", 100))
    assert answers == ["again 5", "again 10", "halt"]
    assert lives.last_end(tmp_path) == "n2: it burns (on n[1-2])"


def test_progress_between_crashes_starts_the_count_over(tmp_path: Path) -> None:
    for step in range(1, 10):
        begin(tmp_path)
        came_to(tmp_path, step)
        assert lives.end(tmp_path, 1, "none", 100) == "again 5"


def test_a_store_that_is_away_is_waited_for_longer(tmp_path: Path) -> None:
    for number in range(1, lives.OUTAGES + 1):
        begin(tmp_path)
        failed(tmp_path, "n1", "store s3://b: the server does not answer", "StoreError")
        answer = lives.end(tmp_path, 1, "none", 100)
        pause = min(lives.LONGEST_PAUSE, lives.FIRST_PAUSE * 2 ** (number - 1))
        assert answer == (f"again {pause}" if number < lives.OUTAGES else "halt")


def test_the_cause_is_told_and_not_what_follows_from_it(tmp_path: Path) -> None:
    begin(tmp_path)
    failed(tmp_path, "n1", "Read error: Connection reset by peer", "RuntimeError")
    failed(tmp_path, "n2", "process 1 was killed by SIGKILL", seconds=1)
    failed(tmp_path, "n3", "got 0 bytes", "DistNetworkError", seconds=-1)
    lives.end(tmp_path, 1, "none", 100)
    assert lives.last_end(tmp_path) == "n2: process 1 was killed by SIGKILL (on n[1-2])"


def test_requeues_are_bounded(tmp_path: Path) -> None:
    begin(tmp_path, restart=4)
    assert lives.end(tmp_path, 1, "USR1", 5) == "requeue"
    begin(tmp_path, restart=5)
    assert lives.end(tmp_path, 1, "USR1", 5) == "halt"


def test_a_stop_that_was_asked_for_is_an_end_and_an_old_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "stop").touch()
    os.utime(tmp_path / "job" / "stop", (1, 1))
    begin(tmp_path)
    assert lives.end(tmp_path, 130, "USR1", 100) == "requeue"
    begin(tmp_path)
    (tmp_path / "job" / "stop").touch()
    os.utime(tmp_path / "job" / "stop", (time.time() + 1, time.time() + 1))
    assert lives.end(tmp_path, 130, "USR1", 100) == "done"


def test_a_life_that_left_no_end_gets_one(tmp_path: Path) -> None:
    begin(tmp_path)
    came_to(tmp_path, 3)
    begin(tmp_path)
    ended = [row for row in lives.read_rows(lives.lives_file(tmp_path)) if row["event"] == "end"]
    assert [(row["kind"], row["step"], row["nodes"]) for row in ended] == [("outside", 3, "n[1-2]")]
