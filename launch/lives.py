"""The lives of a run under a scheduler, and what is to come after each: `python -m treering.launch.lives`.

The batch script asks; the answer is one word. A stop that Slurm announced puts the job back into the queue. A crash is
tried again after a pause that doubles, and ends the job when it came three times without a step in between. The record
is `DIR/job/lives.jsonl`, a line when a life begins and one when it ends. Only the standard library is imported: the
script waits for the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STOPPED = 130
CRASHES = 3
"""crashes without progress after which a run is given up"""
OUTAGES = 12
"""the same, while it is the store that does not work: 40 minutes"""
FOLLOWING = ("DistNetworkError", "DistStoreError", "RendezvousClosedError", "RendezvousConnectionError")
"""errors of a node that lost another one: its own word comes last"""
FIRST_PAUSE, LONGEST_PAUSE = 5, 300
"""seconds"""


def lives_file(run: Path) -> Path:
    """Where the record of a run lies."""
    return run / "job" / "lives.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a file of JSON objects."""
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    except FileNotFoundError:
        pass
    return rows


def last_end(run: Path) -> str | None:
    """How the life before this one ended, as a sentence; None if there was none."""
    ends = [row for row in read_rows(lives_file(run)) if row["event"] == "end"]
    return f"{ends[-1]['reason']} (on {ends[-1]['nodes']})" if ends else None


def begin(run: Path, job: dict[str, str]) -> None:
    """Write down that a life begins; `job` says where. A life before it that left no end was ended from outside."""
    rows = read_rows(lives_file(run))
    if rows and rows[-1]["event"] == "begin":
        reason = "ended from outside: requeued, cancelled, or its node was lost"
        _write(run, {**rows[-1], "event": "end", "reason": reason, "kind": "outside", "step": reached(run)})
    for old in (run / "job" / "failures").glob("*.json"):
        old.unlink(missing_ok=True)
    _write(run, {"event": "begin", **job})


def end(run: Path, code: int, signal: str, most_restarts: int) -> str:
    """Write down how the life ended, and say what comes next: done, requeue, `again SECONDS`, or halt."""
    rows = read_rows(lives_file(run))
    begun: dict[str, Any] = (
        rows[-1] if rows else {"event": "begin", "time": 0.0, "nodes": "?", "job": "?", "restart": "0"}
    )
    step = reached(run)
    kind, reason, error = _why(run, code, signal, begun["time"])
    row = {**begun, "event": "end", "kind": kind, "reason": reason, "step": step, "code": code}
    _write(run, row)
    if kind in ("finished", "asked", "ending"):
        return "halt" if kind == "ending" else "done"
    if int(begun["restart"]) >= most_restarts:
        print(f"requeued {most_restarts} times already; submit again to go on", file=sys.stderr)
        return "halt"
    if kind == "stopped":
        return "requeue"
    repeated = _crashes_without_progress([*rows, row])
    if repeated >= (OUTAGES if error == "StoreError" else CRASHES):
        print(f"{repeated} crashes, none of them after step {step}: {reason}; mend that, submit again", file=sys.stderr)
        return "halt"
    return f"again {min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (repeated - 1))}"


def reached(run: Path) -> int:
    """The furthest step that the run is known to have come to."""
    rows = read_rows(run / "metrics.jsonl")
    return max((int(row.get("step") or 0) for row in rows), default=0)


def _why(run: Path, code: int, signal: str, begun: float) -> tuple[str, str, str]:
    """The kind of an end, a sentence about it, and the class of the error, if known."""
    if code == 0:
        return "finished", "the run came to its end", ""
    asked = run / "job" / "stop"
    if asked.exists() and asked.stat().st_mtime > begun:
        return "asked", "stopped by treering stop", ""
    if signal == "TERM":
        return "ending", "Slurm ended it: cancelled, requeued by hand, preempted, or a node was lost", ""
    if signal == "USR1":
        return "stopped", "Slurm announced an end (preemption or time limit)", ""
    told = []
    for path in (run / "job" / "failures").glob("*.json"):
        try:
            told.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    first = min(told, key=lambda failure: (_follows(failure), failure["time"]), default=None)
    if first is None and code == STOPPED:
        return "stopped", "its processes were asked to stop", ""
    if first is None:
        return "crash", f"srun ended with code {code}", ""
    return "crash", f"{first['host']}: {first['message']}", first["kind"]


def _follows(failure: dict[str, Any]) -> bool:
    """Whether a failure is what the end of another process looks like from afar."""
    return failure["kind"] in FOLLOWING or "by peer" in failure["message"] or "by SIGTERM" in failure["message"]


def _crashes_without_progress(rows: list[dict[str, Any]]) -> int:
    """How many crashes in a row came to the same step, or not even to that."""
    count, furthest = 0, -1
    for row in rows:
        if row["event"] == "end":
            crash = row["kind"] == "crash"
            count = 0 if not crash else count + 1 if row["step"] <= furthest else 1
            furthest = max(furthest, row["step"]) if crash else -1
    return count


def _write(run: Path, row: dict[str, Any]) -> None:
    path = lives_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "time": time.time()}) + "\n")


def main() -> None:
    """Entry for the batch script."""
    verb, run, *rest = sys.argv[1:]
    if verb == "begin":
        names = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "restart": "SLURM_RESTART_COUNT"}
        begin(Path(run), {key: os.environ.get(name, "0") for key, name in names.items()})
    else:
        code, signal, most = rest
        print(end(Path(run), int(code), signal, int(most)))


if __name__ == "__main__":
    main()
