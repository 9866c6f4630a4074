"""A process that goes nowhere ends itself, tells where it was, and names the one that it waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from treering.training.health.watchdog import HUNG, LOST, Watchdog, WatchdogConfig, read_heartbeats
from treering.training.world import World

SLEEPER = """
import os, sys, time
from pathlib import Path
import torch
from treering.training.health.watchdog import Watchdog, WatchdogConfig
from treering.training.world import World
rank = int(os.environ["RANK"])
with Watchdog(WatchdogConfig(limit="2s"), Path(sys.argv[1]), World(rank, 2, torch.device("cpu"))) as watch:
    print("here", flush=True)
    for step in range(6000 if rank else 20):
        watch.at("step", step, [f"sample-{rank}-{step}"])
        time.sleep(0.1)
    def lost_in_thought(): time.sleep(60)
    lost_in_thought()
"""


def started(folder: Path, rank: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLEEPER, str(folder)]
    environment = os.environ | {"RANK": str(rank)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    return process


def test_a_hang_leaves_stacks_and_names_and_kills_the_process_that_is_stopped(tmp_path: Path) -> None:
    stopped, waiting = started(tmp_path, 1), started(tmp_path, 0)
    time.sleep(0.3)
    os.kill(stopped.pid, signal.SIGSTOP)
    assert waiting.wait(120) == HUNG
    assert stopped.wait(120) == -signal.SIGKILL
    told = (tmp_path / "hang.txt").read_text()
    assert "lost_in_thought" in told
    assert told.startswith("rank 0: no progress for")
    first, second = told.split("\nrank ")[1:]
    assert '["sample-0-19"]' in first
    assert re.search(r'^1 on .*after step (\d+)\nsamples: \["sample-1-\1"\]\nno stacks: it does not respond$', second)
    (row,) = [json.loads(line) for line in (tmp_path / "hangs.jsonl").read_text().splitlines()]
    assert f"process {stopped.pid}" in row["message"]
    assert "rank 1 on" in row["message"]


def test_one_file_has_the_stacks_of_all(tmp_path: Path) -> None:
    """Only rank 0 hangs; rank 1 goes on, and answers when it is asked."""
    goes_on, hangs = started(tmp_path, 1), started(tmp_path, 0)
    assert hangs.wait(120) == HUNG
    told = (tmp_path / "hang.txt").read_text()
    first, second = told.split("\nrank ")[1:]
    assert "lost_in_thought" in first
    assert "watchdog.py" in second  # its own thread, which writes them
    assert "lost_in_thought" not in second
    assert '"sample-1-' in second
    goes_on.kill()
    goes_on.wait()


NOWHERE_TO_WRITE = """
import os, sys, time, pathlib, torch
from treering.training.health import watchdog
from treering.training.world import World
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
watchdog._REPORT_SECONDS = 1.0
with watchdog.Watchdog(watchdog.WatchdogConfig(limit="1s"), folder, World(0, 1, torch.device("cpu"))) as watch:
    if how == "a file":  # stands in for a folder that cannot be written to
        (folder / "stacks").write_text("")
    elif how == "no folder":
        os.rename(folder, str(folder) + ".gone")
    elif how == "no terminal":
        os.close(2)
    else:  # a disk that does not answer
        watchdog.atomic_write = watchdog.read_heartbeats = lambda *a, **k: time.sleep(600)
    watch.at("step", 1)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["a file", "no folder", "no terminal", "no answer"])
def test_a_hang_ends_whatever_the_disk_does(how: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOWHERE_TO_WRITE, str(tmp_path / "run"), how], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == HUNG, done.stderr
    assert "Traceback" not in done.stderr
    if how in ("a file", "no folder"):
        assert "no progress for 1 s in phase 'step' after step 1" in done.stderr


def test_what_goes_on_is_left_alone_and_its_heartbeat_says_so(tmp_path: Path) -> None:
    with Watchdog(WatchdogConfig(limit="1s"), tmp_path, World(0, 1, torch.device("cpu"))) as watch:
        for step in range(8):
            watch.at("step", step)
            time.sleep(0.2)
        watch.at("evaluate", 10)  # may take six times as long
        time.sleep(1.5)
        (beat,) = read_heartbeats(tmp_path)
        assert (beat["phase"], beat["step"], beat["pid"]) == ("evaluate", 10, os.getpid())
    (beat,) = read_heartbeats(tmp_path)
    assert beat["phase"] == "end"
    assert not (tmp_path / "stacks").exists()


def test_heartbeats_of_a_larger_world_before_are_not_this_one(tmp_path: Path) -> None:
    for rank, world in ((0, 3), (1, 3), (2, 3), (0, 2), (1, 2)):
        with Watchdog(WatchdogConfig(), tmp_path, World(rank, world, torch.device("cpu"))):
            pass
    assert [beat["rank"] for beat in read_heartbeats(tmp_path)] == [0, 1]


def test_heartbeats_are_in_the_order_of_ranks_however_many(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    for rank in (100_000, 99_999, 7):
        beat = {"rank": rank, "world": 100_001, "time": 1.0}
        (tmp_path / "heartbeats" / f"rank-{rank:05d}.json").write_text(json.dumps(beat))
    assert [beat["rank"] for beat in read_heartbeats(tmp_path)] == [7, 99_999, 100_000]


@pytest.mark.parametrize("limit", ["10", "soon", "-1s", ""])
def test_a_limit_is_a_time(limit: str) -> None:
    with pytest.raises(ValidationError, match="is not a valid time"):
        WatchdogConfig(limit=limit)


GIVES_WAY = """
import sys, time
from pathlib import Path
import torch
from treering.training.health.watchdog import Watchdog, WatchdogConfig
from treering.training.world import World
folder = Path(sys.argv[1])
def lost(): return "another attempt has begun" if (folder / "taken").exists() else None
with Watchdog(WatchdogConfig(limit="1s"), folder, World(0, 1, torch.device("cpu")), lost) as watch:
    watch.at("evaluate", 1)
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_process_whose_run_was_taken_over_ends_and_leaves_the_others_heartbeat_alone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", GIVES_WAY, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    beat = tmp_path / "heartbeats" / "rank-00000.json"
    while not beat.exists():
        time.sleep(0.05)
    (tmp_path / "taken").touch()
    time.sleep(0.2)
    beat.write_text("of the other attempt")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == LOST
    assert "another attempt has begun" in said
    assert beat.read_text() == "of the other attempt"


def test_a_pass_through_the_model_is_a_sign_of_life(tmp_path: Path) -> None:
    """So an evaluation may take any time: here two seconds, where six times the limit are less than one."""
    model = nn.ModuleDict({"image": nn.Linear(1, 1), "text": nn.Linear(1, 1)})
    with Watchdog(WatchdogConfig(limit="1s"), tmp_path, World(0, 1, torch.device("cpu"))) as watch:
        watch.limit = 0.1
        with watch.through(model, "evaluate", 7):
            for number in range(20):
                time.sleep(0.1)
                model["image" if number % 2 else "text"](torch.zeros(1))
        assert watch._now[:2] == ("evaluate", 7)
    assert not any(part._forward_pre_hooks for part in model.children())
