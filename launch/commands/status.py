"""`treering status`: the state of a run, read from its folder or, without one, from its store.

Works for a run that is running, queued, finished or killed. Slurm is queried only for what no file of the run records.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...data.storage.credentials import masked
from ...data.units import counted
from ...training.health.watchdog import read_heartbeats
from ...training.report.losses import gap_of
from ...training.report.readable import decimal, duration_text, exact, number, percent, score
from ...training.report.reading import RecordedRun, read_run
from ..errors import RecipeError, safe_text
from ..jobs.attempts import LAST, attempts_file
from ..jobs.submit import FINISHED, job_of
from ..jobs.sweep import is_sweep, members
from ..run_folder import read_rows

SILENT_SECONDS = 60
"""a process without a heartbeat for this long is not running"""
_SCORES = 2  # columns of a sweep's table


def read_status(place: str) -> dict[str, Any]:
    """The status of the run in folder or store `place`; for a sweep, `finished` and the status of each of its `runs`.

    Raises RecipeError or StoreError if there is none.
    """
    folder = Path(place)
    if is_sweep(folder):
        runs = {run.name: read_status(str(run)) if run.is_dir() else None for run in members(folder)}
        return {"finished": all(run and run["finished"] for run in runs.values()), "runs": runs}
    if "://" in place or (not (folder / "recipe.yaml").is_file() and any(folder.glob("step-*"))):
        return _from_store(place)
    try:
        run = read_run(folder)
    except ValueError as error:
        raise RecipeError(safe_text(str(error))) from None
    last = {line["event"]: line for line in run.lines}
    step, scores = last.get("step", {}), last.get("eval", {})
    speed, total = step.get("samples_per_second"), run.total_samples
    left = (total - run.samples) / speed if speed and total is not None else None
    begun = next((line for line in reversed(run.lines) if line["event"] in ("start", "resume")), {})
    job = job_of(folder)
    return {
        "state": _state(run, job),
        "job": job and job["name"],
        "nodes": begun.get("hosts") or [],
        "processes": begun.get("world"),
        "mfu": step.get("mfu"),
        "data_wait": step.get("data_wait"),
        "restarts": max(len(run.events("start", "resume")) - 1, begun.get("attempt", 1) - 1),
        "last_end": _last_end(folder),
        "commit_age": time.time() - last["commit"]["time"] if "commit" in last else None,
        "commit_failure": _commit_failure(run),
        "name": run.name,
        "finished": run.finished,
        "samples": run.samples,
        "total_samples": total,
        "step": max((line.get("step", 0) for line in run.lines), default=0),
        "stage": step.get("stage"),
        "stages": len(run.recipe.get("stages") or []),
        "parameters": step.get("parameters"),
        "loss": step.get("loss"),
        "losses": step.get("losses"),
        "samples_per_second": speed,
        "seconds_left": 0.0 if run.finished else left,
        "seconds_since_last_line": time.time() - run.lines[-1]["time"] if run.lines else None,
        "bad_samples": len(run.ledger),
        "skipped_steps": step.get("skipped"),
        "attempts": len(run.events("start", "resume")),
        "commit": last.get("commit", {}).get("url"),
        "held_out": scores.get("held_out"),
        "scores": scores.get("scores") or {},
        "chance": scores.get("chance") or {},
    }


def as_table(status: dict[str, Any]) -> Any:
    """The status as a rich table: two columns for a run, a row per run for a sweep."""
    from rich.table import Table
    from rich.text import Text

    if "runs" in status:
        return _sweep_table(status["runs"])
    rows = {
        "run": f"{status['name']}, {status['state']}",
        "nodes": f"{', '.join(status['nodes'])} ({counted(status['processes'], 'process')})"
        if status["nodes"]
        else None,
        "job": status["job"],
        "samples": f"{exact(status['samples'])} of {exact(status['total_samples'])} (step {exact(status['step'])})",
        "restarts": f"{status['restarts']}, last: {status['last_end'] or 'unknown'}" if status["restarts"] else None,
        "stage": None if status["stage"] is None else f"{status['stage'] + 1} of {status['stages']}",
        "parameters": exact(status["parameters"]),
        "loss": decimal(status["loss"]),
        "held-out loss": _held_out(status["held_out"]) if status["held_out"] else None,
        "samples/s": decimal(status["samples_per_second"], 3),
        "mfu": percent(status["mfu"]) if status["mfu"] is not None else None,
        "data wait": percent(status["data_wait"]) if status["data_wait"] is not None else None,
        "time left": duration_text(status["seconds_left"]),
        "last line": _ago(status["seconds_since_last_line"]),
        "bad samples": exact(status["bad_samples"]),
        "skipped steps": exact(status["skipped_steps"]) if status["skipped_steps"] else None,
        "commit": f"{status['commit']} ({_ago(status['commit_age'])})" if status["commit"] else None,
        "commits fail": status["commit_failure"],
    }
    rows |= {
        name: score(name, value) + (f" (chance {percent(status['chance'][name])})" if name in status["chance"] else "")
        for name, value in status["scores"].items()
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(safe_text(name)), Text(safe_text(str(value))))
    return table


def _held_out(held_out: dict[str, Any]) -> str:
    """The latest held-out loss and its gap to the training loss before it."""
    gap = gap_of(held_out)
    return decimal(number(held_out.get("loss"))) + ("" if gap is None else f" (gap {decimal(gap, 3)})")


def _sweep_table(runs: dict[str, dict[str, Any] | None]) -> Any:
    from rich.table import Table
    from rich.text import Text

    scores = list(dict.fromkeys(name for run in runs.values() if run for name in run["scores"]))[:_SCORES]
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for heading in ("samples", "loss", "time left", *(key.rpartition("/")[2] for key in scores)):
        table.add_column(Text(safe_text(heading)), justify="right")
    for name, run in runs.items():
        cells = ["not started"]
        if run:
            cells = [run["state"], exact(run["samples"]), decimal(run["loss"]), duration_text(run["seconds_left"])]
            cells += [score(key, run["scores"].get(key)) for key in scores]
        table.add_row(*(Text(safe_text(cell)) for cell in (name, *cells)))
    return table


def watch(place: str, seconds: float = 2.0) -> None:
    """Show the status, refreshed every `seconds`, until the run has finished or Ctrl-C."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            found = read_status(place)
            live.update(as_table(found), refresh=True)
            if found["finished"]:
                return
            time.sleep(seconds)


def _state(run: RecordedRun, job: dict[str, Any] | None) -> str:
    """What the run is doing now, in a few words."""
    if run.finished:
        return "finished"
    beats = read_heartbeats(run.folder)
    newest = max((beat["time"] for beat in beats), default=0.0)
    queued = (job or {}).get("state") or ""
    if time.time() - newest < SILENT_SECONDS and any(beat["phase"] not in ("end", "failed") for beat in beats):
        slowest = max(beats, key=lambda beat: beat["seconds"])
        where = f" (rank {slowest['rank']} on {slowest['host']})" if slowest["seconds"] > SILENT_SECONDS else ""
        return f"running: {slowest['phase']} for {slowest['seconds']:.0f} s{where}" if where else "running"
    if job and queued == "PENDING":
        why = {"BeginTime": "starts soon"}.get(job["waits_for"], job["waits_for"])
        return f"queued ({why}; expected start {job['expected']})"
    if queued and not FINISHED.match(queued):
        return f"{_between_attempts(run.folder)} (job {queued.lower()})"
    return "stopped" if run.lines else "not started"


def _between_attempts(folder: Path) -> str:
    """What a job does while none of its processes runs."""
    last = next(iter(read_rows(attempts_file(folder))[-1:]), {})
    request = folder / "job" / "stop"
    if request.exists() and request.stat().st_mtime > last.get("time", 0.0):
        return "stopping"
    if last.get("event") != "end":
        return "starting"
    return "stopped" if last.get("kind") in LAST else "restarting"


def _commit_failure(run: RecordedRun) -> str | None:
    """Why there is no newer commit, if the latest try failed."""
    tries = run.events("commit", "commit_failed")
    failed = tries[-1] if tries and tries[-1]["event"] == "commit_failed" else None
    return f"{masked(str(failed.get('error')))} ({_ago(time.time() - failed['time'])})" if failed else None


def _last_end(folder: Path) -> str | None:
    """Why the run was last started anew: the end of the attempt before the newest one."""
    rows = read_rows(attempts_file(folder))
    newest = max((i for i, row in enumerate(rows) if row.get("event") == "begin"), default=len(rows))
    ends = [row for row in rows[:newest] if row.get("event") == "end"]
    return str(ends[-1].get("reason")) if ends else None


def _from_store(place: str) -> dict[str, Any]:
    """The status from the newest commit alone; None for what a commit does not record."""
    from ...training.checkpoint.commits import find_commit
    from ...training.checkpoint.validation import recipe_of

    commit = find_commit(place)
    state = commit.manifest.state
    recipe = recipe_of(commit)
    begun = [event for event in state.lineage if event.event in ("start", "resume")]
    written = commit.written()
    origin = [event.samples for event in state.lineage if event.event == "from"]  # the seconds are since then
    speed = (state.samples - max(origin, default=0)) / state.seconds if state.seconds else None
    finished = state.samples >= recipe.total_samples
    nothing: dict[str, Any] = dict.fromkeys(
        ("job", "mfu", "data_wait", "loss", "losses", "held_out", "seconds_since_last_line", "parameters")
    )
    age = None if written is None else time.time() - written
    return nothing | {
        "name": recipe.name,
        "state": "finished" if finished else f"last committed {_ago(age)}",
        "finished": finished,
        "nodes": begun[-1].detail.get("hosts", []) if begun else [],
        "processes": begun[-1].world if begun else None,
        "samples": state.samples,
        "total_samples": recipe.total_samples,
        "step": state.step,
        "stage": state.stage,
        "stages": len(recipe.stages),
        "samples_per_second": speed,
        "seconds_left": 0.0 if finished else (recipe.total_samples - state.samples) / speed if speed else None,
        "bad_samples": None,
        "skipped_steps": state.skipped,
        "attempts": state.attempt,
        "restarts": max(0, state.attempt - 1),
        "last_end": next((e.detail["before"] for e in reversed(begun) if e.detail.get("before")), None),
        "commit": commit.url,
        "commit_age": age,
        "commit_failure": None,
        "scores": {},
        "chance": {},
    }


def _ago(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{duration_text(seconds)} ago"
