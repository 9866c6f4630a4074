"""Where a run stands, read from the metrics.jsonl it leaves; works on a run that is going on, ended, or was killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .errors import RecipeError, show
from .recipes import read_recipe


def read_status(folder: Path) -> dict[str, Any]:
    """One object about the run in `folder`. Raises RecipeError if there is none."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise RecipeError(f"there is no run in {show(str(folder))} (no metrics.jsonl); give the --out folder of a train command")
    recipe = read_recipe(str(folder / "recipe.yaml")).recipe
    last: dict[str, dict[str, Any]] = {}
    lives = 0
    for event in _events(metrics):
        last[event["event"]] = event
        lives += event["event"] in ("start", "resume")
    newest = max((event for event in last.values()), key=lambda event: event["time"], default={})
    step, commit, scores = last.get("step", {}), last.get("commit", {}), last.get("eval", {})
    done, total, speed = newest.get("samples", 0), recipe.total_samples, step.get("samples_per_second")
    ended = "end" in last and last["end"]["time"] == newest["time"]
    return {
        "name": recipe.name,
        "state": "ended" if ended else "under way or stopped",
        "samples": done,
        "total_samples": total,
        "step": newest.get("step", 0),
        "stage": step.get("stage"),
        "stages": len(recipe.stages),
        "parameters": step.get("parameters"),
        "loss": step.get("loss"),
        "losses": step.get("losses"),
        "samples_per_second": speed,
        "seconds_left": 0.0 if ended else (total - done) / speed if speed else None,
        "seconds_since_last_line": time.time() - newest["time"] if newest else None,
        "bad_samples": step.get("bad_samples"),
        "skipped_steps": step.get("skipped"),
        "lives": lives,
        "commit": commit.get("url"),
        "scores": scores.get("scores"),
        "chance": scores.get("chance"),
    }


def as_table(status: dict[str, Any]) -> Any:
    """The status as a rich table of two columns."""
    from rich.table import Table
    from rich.text import Text

    rows = {
        "run": f"{status['name']}: {status['state']}, started or resumed {status['lives']} times",
        "samples": f"{status['samples']:,} of {status['total_samples']:,} (step {status['step']:,})",
        "stage": None if status["stage"] is None else f"{status['stage'] + 1} of {status['stages']}",
        "parameters": None if status["parameters"] is None else f"{status['parameters']:,}",
        "loss": None if status["loss"] is None else f"{status['loss']:.4f}",
        "speed": None if status["samples_per_second"] is None else f"{status['samples_per_second']:.1f} samples/s",
        "time left": _duration(status["seconds_left"]),
        "last line": None if (ago := _duration(status["seconds_since_last_line"])) is None else f"{ago} ago",
        "bad samples": status["bad_samples"],
        "skipped steps": status["skipped_steps"],
        "commit": status["commit"],
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(name), Text(str(value)))
    for name, score in (status["scores"] or {}).items():
        chance = (status["chance"] or {}).get(name)
        table.add_row(Text(name), Text(f"{score:.1%}" + ("" if chance is None else f" (chance {chance:.1%})")))
    return table


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _events(metrics: Path) -> list[dict[str, Any]]:
    """Every whole line; a run that is writing may have left half of its last one."""
    events = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"event", "time"} <= event.keys():
            events.append(event)
    return events
