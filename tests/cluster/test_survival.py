"""One run on the real cluster, to which everything happens that can; its losses are those of a quiet one.

Prints a table of where the seconds go from each event to the first new step (`pytest -s`), which
docs/benchmarks/slurm_events.md shows.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from treering.launch.jobs.attempts import attempts_file
from treering.launch.run_folder import read_rows
from treering.tests.cluster.conftest import (
    Bench,
    as_if_nothing_had_happened,
    log,
    rows,
    signal_rank,
    step,
    until,
)

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Happened:
    """Seconds from an event to the first new step, and where they went."""

    name: str
    total: float
    ends: float
    """until the attempt had ended, its commit included, or nothing of it was left to write that down"""
    slurm: float
    """then until the batch script began the next one, where Slurm had to start it"""
    begins: float
    """from there to the first step"""


class Patient:
    """A run under treatment."""

    def __init__(self, bench: Bench, run: Path, job: str) -> None:
        self.bench, self.run, self.job = bench, run, job
        self.table: list[Happened] = []

    def happens(self, name: str, event: Callable[[], object], new_attempt: bool = True) -> None:
        """Wait for some steps of the newest attempt, let the event happen, wait for the first new step after it."""
        self._progress(time.time(), 3)
        attempts, before = self._attempts(), time.time()
        event()
        if new_attempt:
            until(lambda: self._attempts() > attempts, lambda: f"{name}: no new attempt\n{log(self.run)}", 120)
        begun = next((r["time"] for r in reversed(rows(self.run)) if r["event"] in ("start", "resume")), before)
        since = begun if new_attempt else before
        self._progress(since, 1)
        first = next(r["time"] for r in rows(self.run) if r["event"] == "step" and r["time"] > since)
        self.table.append(self._parts(name, before, first) if new_attempt else Happened(name, first - before, 0, 0, 0))
        print(f"{name}: {first - before:.1f} s", flush=True)

    def _parts(self, name: str, before: float, first: float) -> Happened:
        recorded = [row for row in read_rows(attempts_file(self.run)) if row["time"] > before]
        begun = [row for row in recorded if row["event"] == "begin"][-1]
        ended = next((row["time"] for row in recorded if row["event"] == "end" and row["kind"] != "outside"), before)
        return Happened(name, first - before, ended - before, begun["time"] - ended, first - begun["time"])

    def _attempts(self) -> int:
        return max((r["attempt"] for r in rows(self.run) if r["event"] in ("start", "resume")), default=0)

    def _progress(self, since: float, steps: int) -> None:
        def enough() -> bool:
            return sum(r["event"] == "step" and r["time"] > since for r in rows(self.run)) >= steps

        until(enough, lambda: f"no progress\n{log(self.run)}", 120)

    def ends(self) -> None:
        self.bench.pause(0)
        until(
            lambda: any(r["event"] == "end" for r in rows(self.run)) and self.bench.state(self.job) == "COMPLETED",
            lambda: f"{self.bench.state(self.job)}\n{log(self.run)}",
            120,
        )

    def show(self) -> None:
        print("\n| event | to the first new step | the attempt ends | Slurm | the next begins |\n|---|---|---|---|---|")
        for row in self.table:
            print(f"| {row.name} | {row.total:.1f} | {row.ends:.1f} | {row.slurm:.1f} | {row.begins:.1f} |")


def test_everything_happens_to_one_run(
    bench: Bench, recipe: Path, uninterrupted: list[tuple[int, float]], tmp_path: Path
) -> None:
    cluster, run = bench.cluster, tmp_path / "run"
    bucket = f"{bench.server.url}/survival"
    bench.pause(0.4)
    words = [str(recipe), "--nodes", "2", "--processes-per-node", "1", "--out", str(run), f"checkpoint.to={bucket}"]
    patient = Patient(bench, run, bench.submit(*words))

    def preempt() -> None:
        done = cluster.run("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
        assert done.returncode == 0, done.stderr

    def restart_controller() -> None:
        cluster.kill_controller()
        time.sleep(2)
        cluster.start_controller()

    def restart_store() -> None:
        bench.server.kill()
        time.sleep(4)
        bench.server.start()
        bench.server.wait()

    def lose_node() -> None:
        cluster.kill_node(bench.nodes(patient.job)[1])

    patient.happens("a rank killed", lambda: signal_rank(run, 1, signal.SIGKILL))
    patient.happens("a rank stopped", lambda: signal_rank(run, 1, signal.SIGSTOP))
    patient.happens("requeued by hand", lambda: cluster.run("scontrol", "requeue", patient.job))
    patient.happens("time limit ahead", lambda: cluster.run("scancel", "-b", "-s", "USR1", patient.job))
    patient.happens("preempted", preempt)
    patient.happens("controller restarted", restart_controller, new_attempt=False)
    patient.happens("store restarted", restart_store, new_attempt=False)
    patient.happens("a node killed", lose_node)
    patient.ends()
    patient.show()
    cluster.start()
    as_if_nothing_had_happened(run, uninterrupted)
    ends = [row["reason"] for row in read_rows(attempts_file(run)) if row["event"] == "end"]
    for number, words in enumerate(
        ("killed by SIGKILL", "waited without progress", "", "announced an end", "announced an end")
    ):
        assert words in ends[number], ends
    assert ends[-1] == "the run finished"
    lineage = json.loads((run / "lineage.json").read_text())
    assert len({host for event in lineage for host in event["detail"].get("hosts", [])}) == 3
    assert any("announced an end" in event["detail"].get("before", "") for event in lineage)
    reasons = [row["reason"] for row in rows(run) if row["event"] == "commit"]
    assert reasons.count("signal") >= 2  # what Slurm announces costs no step
    assert "rank 1 on" in (run / "hangs.jsonl").read_text()
    assert "loop.py" in (run / "hang.txt").read_text()
    _redone(run)


def _redone(run: Path) -> None:
    """No attempt began further back than the last commit before it, and none is more than five steps apart."""
    made: dict[int, list[int]] = {}
    for line in (run / "taken-0.jsonl").read_text().splitlines():
        row = json.loads(line)
        made.setdefault(row["attempt"], []).append(row["step"])
    furthest = -1
    for attempt in sorted(made):
        first, last = min(made[attempt]), max(made[attempt])
        assert first % 5 == 0 or first == furthest + 1
        assert furthest + 1 - first <= 10  # a commit each five steps, and perhaps one that was under way
        furthest = max(furthest, last)
    assert step(run) == furthest + 1
