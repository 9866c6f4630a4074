"""`treering stop` of a run on this machine, whatever has become of its processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from treering.launch.errors import RecipeError
from treering.launch.jobs import stop
from treering.launch.jobs.stop import stop_run

WAITS = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9)); print(); time.sleep(60)"


def beats(folder: Path, pid: int, rank: int = 0, world: int = 1, **more: Any) -> None:
    (folder / "heartbeats").mkdir(exist_ok=True)
    beat = {"rank": rank, "world": world, "host": socket.gethostname(), "pid": pid, "phase": "step", "step": 3,
            "seconds": 1, "time": time.time(), "keys": []}  # fmt: skip
    (folder / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(beat | more))


def ended() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def waiting() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", WAITS, "treering"], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    return process


def test_a_process_that_was_killed_a_moment_ago(tmp_path: Path) -> None:
    beats(tmp_path, ended())
    with pytest.raises(RecipeError, match=r"no process of the run in .* is running here"):
        stop_run(tmp_path)


def test_a_number_that_belongs_to_another_program_by_now(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        beats(tmp_path, process.pid)
        with pytest.raises(RecipeError, match="is running here"):
            stop_run(tmp_path)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_one_of_two_processes_still_runs(tmp_path: Path) -> None:
    process = waiting()
    beats(tmp_path, ended(), 0, 2)
    beats(tmp_path, process.pid, 1, 2)
    assert stop_run(tmp_path) == "the run commits after its next step and ends"
    assert process.wait(30) == 9


@pytest.mark.parametrize(
    ("end", "said"), [(ProcessLookupError(), "is running here"), (PermissionError(), "belongs to another user")]
)
def test_a_process_that_cannot_be_signalled(
    end: OSError, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(process: int, number: int) -> None:
        assert (process, number) == (os.getpid(), signal.SIGUSR1)
        raise end

    beats(tmp_path, os.getpid())
    monkeypatch.setattr(stop, "is_ours", lambda beat: True)
    monkeypatch.setattr(stop.os, "kill", kill)
    with pytest.raises(RecipeError, match=said):
        stop_run(tmp_path)


def test_processes_on_another_machine(tmp_path: Path) -> None:
    beats(tmp_path, os.getpid(), host="elsewhere")
    with pytest.raises(RecipeError, match="its last processes were on elsewhere"):
        stop_run(tmp_path)
