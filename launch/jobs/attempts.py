"""The attempts of a run under a scheduler, and what follows each: `python -m treering.launch.jobs.attempts`.

The batch script calls this and reads one line of output. A stop that Slurm announced requeues the job. A crash is
retried after a pause that doubles, and ends the job after three crashes without a step in between. Nodes that report
themselves unfit are excluded. The record is `DIR/job/attempts.jsonl`, with a row when an attempt begins and one when it
ends. `DIR/job/owner.json` names the attempt that owns the run: an attempt on a node that Slurm declared dead, because
it was cut off, may still be running there; its processes read that file, see a newer attempt, and end. Imports only the
standard library, because the script waits for the output.
"""

from __future__ import annotations

import json
import os
import re
import signal as signals
import sys
import time
from pathlib import Path
from typing import Any

from ...data.storage.atomic_write import atomic_write
from ..run_folder import STOPPED, parsed_rows, read_rows

BAD_NODE = 3
"""exit code of a node that cannot train"""
CRASHES = 3
"""crashes without progress after which the job ends"""
OUTAGES = 12
"""the same for failures of the store: about 40 minutes"""
FOLLOWING = ("DistNetworkError", "DistStoreError", "RendezvousClosedError", "RendezvousConnectionError")
"""errors of a node that lost contact with another one: never reported as the cause if there is another error"""
LAST = ("finished", "requested", "ending")
"""kinds of ends that no attempt of the job follows"""
_TAIL = 1 << 20
FIRST_PAUSE, LONGEST_PAUSE = 1, 300
"""seconds"""
ATTEMPT = "TREERING_ATTEMPT"
"""environment variable with the attempt that a process belongs to: JOB.RESTART.TRY"""
UNFIT = "this node cannot train"
"""printed by an unfit node after its name in the job's log, which may be the only file it can write"""


def attempts_file(run: Path) -> Path:
    """Path of the record of a run's attempts."""
    return run / "job" / "attempts.jsonl"


def owner_file(run: Path) -> Path:
    """Path of the file that names the attempt that owns the run."""
    return run / "job" / "owner.json"


def fit_folder(run: Path) -> Path:
    """Folder where each node of an attempt leaves a file with its name once it passed its checks."""
    return run / "job" / "fit"


def last_end(run: Path) -> str | None:
    """How the previous attempt ended, as a sentence; None if there was none."""
    ends = [row for row in read_rows(attempts_file(run)) if row["event"] == "end"]
    return f"{ends[-1]['reason']} (on {ends[-1]['nodes']})" if ends else None


def lost(run: Path) -> str | None:
    """Why this process must end: another attempt owns the run. None if this one does, or no owner is recorded."""
    own, owner = os.environ.get(ATTEMPT), _owner(run)
    if own is None or owner is None or owner["attempt"] == own:
        return None
    return f"attempt {own} ends: attempt {owner['attempt']} of this run has started on {owner['nodes']}"


def begin(run: Path, job: dict[str, str]) -> bool:
    """Record that an attempt begins, and make it the owner of the run; `job` has its id, nodes and restart count.

    Returns False if another job, or a later restart of this one, owns the run: only the first try after a (re)start of
    the job may take the run over. An earlier attempt without a recorded end gets one of kind "outside".
    """
    owner = _owner(run)
    start, number = job["attempt"].rsplit(".", 1)
    if owner is not None and number != "0" and owner["attempt"].rsplit(".", 1)[0] != start:
        return False
    rows = read_rows(attempts_file(run))
    if rows and rows[-1]["event"] == "begin":
        reason = "ended from outside: requeued, cancelled, or its node was lost"
        _write(run, {**rows[-1], "event": "end", "reason": reason, "kind": "outside", "step": last_step(run)})
    for old in (*(run / "job" / "failures").glob("*.json"), *fit_folder(run).glob("*")):
        old.unlink(missing_ok=True)
    _write(run, {"event": "begin", "log": _size(run / "job.log"), **job})
    atomic_write(owner_file(run), json.dumps({**job, "time": time.time()}), durable=True)
    return True


def end(run: Path, attempt: str, code: int, signal: str, most_restarts: int) -> str:
    """Record how the attempt ended, and return what follows: done, requeue, `retry SECONDS`, `exclude NODE ...`, halt.

    An attempt that no longer owns the run records nothing and halts.
    """
    owner = _owner(run)
    if owner is not None and owner["attempt"] != attempt:
        print(f"attempt {attempt} ends: attempt {owner['attempt']} has started on {owner['nodes']}", file=sys.stderr)
        return "halt"
    rows = read_rows(attempts_file(run))
    begun: dict[str, Any] = (
        rows[-1] if rows else {"event": "begin", "time": 0.0, "nodes": "?", "used": "", "restart": "0", "log": 0}
    )
    step = last_step(run)
    kind, reason, error = _why(run, code, signal, begun)
    row = {**begun, "event": "end", "kind": kind, "reason": reason, "step": step, "code": code}
    _write(run, row)
    if kind in LAST:
        return "halt" if kind == "ending" else "done"
    if int(begun["restart"]) >= most_restarts:
        print(f"requeued {most_restarts} times already; submit again to continue", file=sys.stderr)
        return "halt"
    if kind in ("stopped", "room"):
        return "requeue"
    if kind == "unfit":
        return f"exclude {error}"
    repeated = _crashes_without_progress([*rows, row])
    if repeated >= (OUTAGES if error == "StoreError" else CRASHES):
        print(
            f"{repeated} crashes without progress beyond step {step}: {reason}; fix that and submit again",
            file=sys.stderr,
        )
        return "halt"
    return f"retry {min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (repeated - 1))}"


def look_interval(rows: list[dict[str, Any]], every: int) -> int:
    """Seconds until an attempt on fewer nodes than it could use looks for idle ones: `every`, doubled for each of the
    last requeues that brought no more nodes. `rows` end with the begin of the attempt."""
    without_gain, before = 0, None
    for row in rows:
        if row["event"] == "end":
            before = _count(row) if row["kind"] == "room" else None
        elif before is not None:
            without_gain = without_gain + 1 if _count(row) <= before else 0
    return every << min(without_gain, 10)


def last_step(run: Path) -> int:
    """The largest step in the last megabyte of the run's metrics, whose steps rise; 0 if there is none."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return 0
    return max((int(row.get("step") or 0) for row in parsed_rows(lines)), default=0)


def _why(run: Path, code: int, signal: str, begun: dict[str, Any]) -> tuple[str, str, str]:
    """The kind of an end, its reason as a sentence, and the class of the error, if known, or the unfit nodes."""
    if code == 0:
        return "finished", "the run finished", ""
    request = run / "job" / "stop"
    if request.exists() and request.stat().st_mtime > begun["time"]:
        return "requested", "stopped by treering stop", ""
    if signal == "TERM":
        return "ending", "Slurm ended it: cancelled, requeued by hand, preempted, or a node was lost", ""
    if signal == "USR1":
        return "stopped", "Slurm announced an end (preemption or time limit)", ""
    if signal == "ROOM":
        return "room", "more nodes are free", ""
    failures = []
    for path in (run / "job" / "failures").glob("*.json"):
        try:
            failures.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    if unfit := _unfit(run, begun, failures):
        reason = "; ".join(f"{name}: {UNFIT}: {why}" for name, why in unfit.items())
        everyone = set(unfit) >= set(begun["used"].split())
        return ("crash", f"{reason}; no other node is left", "") if everyone else ("unfit", reason, " ".join(unfit))
    first = min(failures, key=lambda failure: (_follows(failure), failure["time"]), default=None)
    if first is None and code in (STOPPED, 128 + signals.SIGTERM):  # preemption may signal only the processes
        return "stopped", "its processes were signalled to stop", ""
    if first is None:
        said = re.findall(r"^srun: error: (.*)$", _log(run, begun), re.MULTILINE)
        return "crash", f"srun ended with code {code}" + (f": {said[-1]}" if said else ""), ""
    return "crash", f"{first['host']}: {first['message']}", first["kind"]


def _unfit(run: Path, begun: dict[str, Any], failures: list[dict[str, Any]]) -> dict[str, str]:
    """Unfit nodes of the attempt, with reasons: those that reported it, and those that alone cannot reach the store."""
    used = begun["used"].split()
    unfit = dict(re.findall(rf"^(\S+): {UNFIT}: (.*)$", _log(run, begun), re.MULTILINE))
    fit = {path.name for path in fit_folder(run).glob("*")}
    if fit:
        unfit |= {f["host"]: f["message"] for f in failures if f["kind"] == "StoreError" and f["host"] not in fit}
    return {name: why for name, why in unfit.items() if name in used}


def _log(run: Path, begun: dict[str, Any]) -> str:
    """What the attempt has written to the job's log so far, at most a megabyte of it."""
    try:
        with (run / "job.log").open("rb") as file:
            file.seek(begun["log"])
            return file.read(1 << 20).decode(errors="replace")
    except OSError:
        return ""


def _follows(failure: dict[str, Any]) -> bool:
    """Whether a failure is a consequence of the end of another process."""
    return failure["kind"] in FOLLOWING or "by peer" in failure["message"] or "by SIGTERM" in failure["message"]


def _crashes_without_progress(rows: list[dict[str, Any]]) -> int:
    """The number of last crashes in a row that made no progress beyond the furthest step before them."""
    count, furthest = 0, -1
    for row in rows:
        if row["event"] == "end":
            crash = row["kind"] == "crash"
            count = 0 if not crash else count + 1 if row["step"] <= furthest else 1
            furthest = max(furthest, row["step"]) if crash else -1
    return count


def _write(run: Path, row: dict[str, Any]) -> None:
    path = attempts_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "time": time.time()}) + "\n")


def _owner(run: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(owner_file(run).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _count(row: dict[str, Any]) -> int:
    return len(row.get("used", "").split())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main() -> None:
    """Entry point for the batch script: `begin RUN ATTEMPT "NODE ..." SECONDS` and `end RUN ATTEMPT CODE SIGNAL
    RESTARTS`."""
    verb, run, attempt, *rest = sys.argv[1:]
    folder = Path(run)
    if verb == "begin":
        used, every = rest
        names = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "restart": "SLURM_RESTART_COUNT"}
        about = {key: os.environ.get(name, "0") for key, name in names.items()}
        if not begin(folder, {"attempt": attempt, "used": used, **about}):
            sys.exit(f"attempt {attempt} does not start: another one owns the run")
        print(look_interval(read_rows(attempts_file(folder)), int(every)))
    else:
        code, signal, most = rest
        print(end(folder, attempt, int(code), signal, int(most)))


if __name__ == "__main__":
    main()
