"""Signals that stop a run, and a terminal that goes away."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES, lines
from treering.training.checkpoint.commits import find_commit
from treering.training.health.signals import STOP, StopRequest, is_ignored
from treering.training.loop import train

COMMAND = [sys.executable, "-P", "-m", "treering.launch", "train", "emoji", *SIZES, "eval.suites=[]",
           "checkpoint.every=1h", "model.captioner=null", "objectives={contrastive: {}}"]  # fmt: skip


@pytest.mark.parametrize("number", STOP)
def test_each_of_them_is_noted(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        for _ in range(100):
            time.sleep(0.01)
            if stop.requested:
                break
        assert stop.requested
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert is_ignored(signal.SIGHUP)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def steps(out: Path) -> int:
    try:
        return len(lines(out, "step"))
    except (OSError, json.JSONDecodeError):
        return 0


def test_a_closed_terminal_commits_as_sigterm_does(tmp_path: Path) -> None:
    """With a decoding process, which hears the signal too."""
    out = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, [*COMMAND, "--out", str(out), "stages=[{samples: 480000}]", "data.workers=1"])
    end = time.monotonic() + 120
    while steps(out) < 5 and time.monotonic() < end:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1 << 16)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    (commit,) = lines(out, "commit")
    assert commit["reason"] == "signal"
    assert find_commit(str(out)).manifest.state.step == commit["step"] >= 5


def test_a_pipe_that_nobody_reads_any_more_ends_no_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = subprocess.Popen(
        [*COMMAND, "--out", str(out), "stages=[{samples: 240}]"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert run.stderr
    run.stderr.close()
    assert run.wait(120) == 0
    assert find_commit(str(out)).manifest.state.step == 20


def test_a_run_says_which_steps_its_log_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two run folders share a store: the second one continues what the first has trained."""
    given = [*SIZES, "eval.suites=[]", "model.captioner=null", "objectives={contrastive: {}}", "stages=[{samples: 96}]"]
    given += ["checkpoint.every=48", f"checkpoint.to={tmp_path / 'store'}"]
    train(read_recipe("emoji", given).recipe, tmp_path / "one")
    assert "lacks steps" not in capsys.readouterr().err
    train(read_recipe("emoji", given).recipe, tmp_path / "two")
    said = " ".join(capsys.readouterr().err.split())
    assert "two/metrics.jsonl lacks steps 1 to 8: another run folder has their lines" in said
    train(read_recipe("emoji", given).recipe, tmp_path / "one")
    assert "lacks steps" not in capsys.readouterr().err
