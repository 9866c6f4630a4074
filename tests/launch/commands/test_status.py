"""What a person reads while a run waits, ends or begins again, and of numbers of things."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from treering.data.units import counted
from treering.launch.commands import status
from treering.launch.commands.status import read_status
from treering.training.report.sweep_page import SWEEP_FILE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one step under Slurm, none of whose processes lives."""
    (tmp_path / "job").mkdir()
    (tmp_path / "recipe.yaml").write_text("name: tiny\nstages: [{samples: 32}]\ndata: {batch: 8}\n")
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"event": "step", "step": 1, "samples": 8, "time": 5.0, "loss": 2.0}) + "\n"
    )
    return tmp_path


def attempts(run: Path, *rows: tuple[str, str, str]) -> None:
    text = [json.dumps({"event": e, "kind": k, "reason": r, "time": 10.0 + i}) for i, (e, k, r) in enumerate(rows)]
    (run / "job" / "attempts.jsonl").write_text("\n".join(text) + "\n")


BEGIN = ("begin", "", "")
CRASH = ("end", "crash", "n1: process 0 was killed by SIGKILL")
DONE = ("end", "finished", "the run finished")
STOP = ("end", "requested", "stopped by treering stop")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([BEGIN], None),
        ([BEGIN, CRASH], None),  # nothing has begun anew yet
        ([BEGIN, CRASH, BEGIN], CRASH[2]),
        ([BEGIN, CRASH, BEGIN, DONE], CRASH[2]),  # why it restarted, not how it ended
        ([BEGIN, STOP, BEGIN, CRASH, BEGIN], CRASH[2]),
        ([BEGIN, STOP, BEGIN, DONE], STOP[2]),
    ],
)
def test_why_a_run_was_started_anew(run: Path, rows: list[tuple[str, str, str]], said: str | None) -> None:
    attempts(run, *rows)
    assert read_status(str(run))["last_end"] == said


@pytest.mark.parametrize(
    ("rows", "asked", "said"),
    [
        ([], None, "starting"),
        ([BEGIN], None, "starting"),
        ([BEGIN, CRASH], None, "restarting"),
        ([BEGIN, CRASH, BEGIN], None, "starting"),
        ([BEGIN, STOP], 10.5, "stopped"),
        ([BEGIN], 10.5, "stopping"),
        ([BEGIN, STOP, BEGIN], 10.5, "starting"),  # submitted again
        ([BEGIN, DONE], None, "stopped"),
    ],
)
def test_a_job_without_processes(
    run: Path, rows: list[tuple[str, str, str]], asked: float | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows:
        attempts(run, *rows)
    if asked:
        (run / "job" / "stop").touch()
        os.utime(run / "job" / "stop", (asked, asked))
    monkeypatch.setattr(status, "job_of", lambda out: {"name": "7", "state": "COMPLETING"})
    assert read_status(str(run))["state"] == f"{said} (job completing)"


def test_logs_of_a_sweep_name_those_of_its_runs(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "here" / "runs"
    for name in ("lr=1", "lr=2"):
        (folder / name).mkdir(parents=True)
    (folder / SWEEP_FILE).write_text(json.dumps({"runs": {"lr=1": {"lr": "1"}, "lr=2": {"lr": "2"}}}))
    assert "none of its runs has started" in refused("logs", "runs")
    (folder / "lr=2" / "job.log").write_text("hello\n")
    assert "is a sweep, and each of its runs has a log of its own; such as treering logs runs/lr=2" in refused(
        "logs", "runs"
    )


def test_numbers_of_things() -> None:
    said = [counted(n, noun) for noun in ("shard", "process", "batch", "copy", "key", "index") for n in (0, 1, 2000)]
    assert said == [
        *("0 shards", "1 shard", "2,000 shards", "0 processes", "1 process", "2,000 processes"),
        *("0 batches", "1 batch", "2,000 batches", "0 copies", "1 copy", "2,000 copies"),
        *("0 keys", "1 key", "2,000 keys", "0 indexes", "1 index", "2,000 indexes"),
    ]
