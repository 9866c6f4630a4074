"""Where a run stands, read from its folder; works on a run that is going on, ended, or was killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..training.report.readable import decimal, duration, exact, percent
from ..training.report.reading import read_run
from .errors import RecipeError, clean


def read_status(folder: Path) -> dict[str, Any]:
    """One object about the run in `folder`. Raises RecipeError if there is none."""
    try:
        run = read_run(folder)
    except ValueError as error:
        raise RecipeError(clean(str(error))) from None
    last = {line["event"]: line for line in run.lines}
    step, scores = last.get("step", {}), last.get("eval", {})
    speed, total = step.get("samples_per_second"), run.total_samples
    left = (total - run.samples) / speed if speed and total is not None else None
    return {
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
        "lives": len(run.events("start", "resume")),
        "commit": last.get("commit", {}).get("url"),
        "scores": scores.get("scores") or {},
        "chance": scores.get("chance") or {},
    }


def as_table(status: dict[str, Any]) -> Any:
    """The status as a rich table of two columns."""
    from rich.table import Table
    from rich.text import Text

    rows = {
        "run": f"{status['name']}, {'finished' if status['finished'] else 'under way or stopped'}",
        "samples": f"{exact(status['samples'])} of {exact(status['total_samples'])} (step {exact(status['step'])})",
        "started": f"{status['lives']} times" if status["lives"] > 1 else None,
        "stage": None if status["stage"] is None else f"{status['stage'] + 1} of {status['stages']}",
        "parameters": exact(status["parameters"]),
        "loss": decimal(status["loss"]),
        "samples/s": decimal(status["samples_per_second"], 3),
        "time left": duration(status["seconds_left"]),
        "last line": f"{duration(status['seconds_since_last_line'])} ago",
        "bad samples": exact(status["bad_samples"]),
        "skipped steps": exact(status["skipped_steps"]) if status["skipped_steps"] else None,
        "commit": status["commit"],
    }
    rows |= {
        name: f"{percent(score)} (chance {percent(status['chance'].get(name))})"
        for name, score in status["scores"].items()
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(clean(name)), Text(clean(str(value))))
    return table
