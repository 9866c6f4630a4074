"""One run on the real cluster, to which everything happens that can; its losses are those of a quiet one."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from treering.launch.lives import lives_file, read_rows
from treering.tests.cluster.conftest import Bench, log, losses, rows, signal_rank, until

pytestmark = pytest.mark.timeout(1500)


class Patient:
    """A run under treatment, and the seconds from each event to the first new step."""

    def __init__(self, bench: Bench, run: Path, job: str) -> None:
        self.bench, self.run, self.job = bench, run, job
        self.table: list[tuple[str, float, int]] = []

    def happens(self, name: str, event: Callable[[], object], new_life: bool = True) -> None:
        """Wait for some steps of the newest life, let the event happen, wait for the first new step after it."""
        self._progress(time.time(), 3)
        lives = self._lives()
        before = time.time()
        event()
        if new_life:
            until(lambda: self._lives() > lives, lambda: f"{name}: no new life\n{log(self.run)}", 300)
        begun = next((r["time"] for r in reversed(rows(self.run)) if r["event"] in ("start", "resume")), before)
        since = begun if new_life else before
        self._progress(since, 1)
        first = next(r for r in rows(self.run) if r["event"] == "step" and r["time"] > since)
        self.table.append((name, first["time"] - before, self._lives() - lives))
        print(f"{name}: {first['time'] - before:.1f} s", flush=True)

    def _lives(self) -> int:
        return max((r["life"] for r in rows(self.run) if r["event"] in ("start", "resume")), default=0)

    def _progress(self, since: float, steps: int) -> None:
        def enough() -> bool:
            return sum(r["event"] == "step" and r["time"] > since for r in rows(self.run)) >= steps

        until(enough, lambda: f"no progress\n{log(self.run)}", 300)

    def ends(self) -> None:
        until(
            lambda: any(r["event"] == "end" for r in rows(self.run)) and self.bench.state(self.job) == "COMPLETED",
            lambda: f"{self.bench.state(self.job)}\n{log(self.run)}",
            150,
        )

    def show(self) -> None:
        print("\nevent                     seconds to the first new step   new lives")
        for name, seconds, lives in self.table:
            print(f"{name:<26}{seconds:>8.1f}{lives:>24}")


def test_everything_happens_to_one_run(
    bench: Bench, recipe: Path, uninterrupted: list[tuple[int, float]], tmp_path: Path
) -> None:
    cluster, run = bench.cluster, tmp_path / "run"
    bucket = f"{bench.server.url}/survival"
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
    patient.happens("controller restarted", restart_controller, new_life=False)
    patient.happens("store restarted", restart_store)
    patient.happens("a node killed", lose_node)
    patient.ends()
    patient.show()
    cluster.start()
    assert losses(run) == uninterrupted
    ends = [row["reason"] for row in read_rows(lives_file(run)) if row["event"] == "end"]
    for number, words in enumerate(("killed by SIGKILL", "waited in vain", "", "announced an end", "announced an end")):
        assert words in ends[number], ends
    assert ends[-1] == "the run came to its end"
    lineage = json.loads((run / "lineage.json").read_text())
    assert len({host for event in lineage for host in event["detail"].get("hosts", [])}) == 3
    assert any("announced an end" in event["detail"].get("before", "") for event in lineage)
    reasons = [row["reason"] for row in rows(run) if row["event"] == "commit"]
    assert reasons.count("signal") >= 2  # what Slurm announces costs no step
    assert "rank 1 on" in (run / "hangs.jsonl").read_text()
    assert list((run / "stacks").glob("*.txt"))
    assert "loop.py" in next((run / "stacks").glob("*.txt")).read_text()
