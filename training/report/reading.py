"""Reads a run folder in any state into one plain `RecordedRun`.

metrics.jsonl is the source of truth, and everything else adds to it. A run that is still writing, was killed in the
middle of a line, or was never evaluated is as readable as a finished one; unreadable lines are counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...data.storage.credentials import masked
from .readable import is_number, printable

LogLine = dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run: the lines from a start or resume to the next one."""

    lines: tuple[LogLine, ...]

    @property
    def began(self) -> float:
        """Unix time at which the command started; the first line is written after the start-up."""
        return float(self.lines[0]["time"]) - seconds_of(self.lines[0])

    @property
    def ended(self) -> float:
        """Unix time of the last line."""
        return float(max(line["time"] for line in self.lines))


@dataclass(frozen=True)
class RecordedRun:
    """The content of a run folder."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    lines: tuple[LogLine, ...]
    evaluations: tuple[LogLine, ...]
    ledger: tuple[LogLine, ...]
    lineage: tuple[LogLine, ...]
    unreadable: int

    def events(self, *names: str) -> list[LogLine]:
        """The lines of these events, in order."""
        return [line for line in self.lines if line["event"] in names]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return printable(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def sources(self) -> list[str]:
        """The training sources as the recipe names them."""
        train = (self.recipe.get("data") or {}).get("train") or []
        return [printable(masked(str(s.get("source")))) for s in train if isinstance(s, Mapping)]

    @property
    def total_samples(self) -> int | None:
        """Samples of the complete run, each stage rounded up to full batches; None if the recipe does not say."""
        batch = (self.recipe.get("data") or {}).get("batch")
        stages = [s.get("samples") for s in self.recipe.get("stages") or []]
        if not is_number(batch) or not stages or not all(is_number(s) for s in stages):
            return None
        return int(sum(-(-s // batch) * batch for s in stages))

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return max((int(line["samples"]) for line in self.lines), default=0)

    @property
    def finished(self) -> bool:
        """Whether the last attempt reached the end of the run."""
        ends = [line["event"] for line in self.lines if line["event"] in ("start", "resume", "end")]
        return bool(ends) and ends[-1] == "end"

    @property
    def attempts(self) -> list[Attempt]:
        """The attempts, oldest first."""
        attempts: list[list[LogLine]] = []
        for line in self.lines:
            if line["event"] in ("start", "resume") or not attempts:
                attempts.append([])
            attempts[-1].append(line)
        return [Attempt(tuple(lines)) for lines in attempts]


def read_run(folder: Path) -> RecordedRun:
    """Read a run folder. Raises ValueError if `folder` holds neither a recipe nor metrics."""
    if not (folder / "metrics.jsonl").is_file() and not (folder / "recipe.yaml").is_file():
        raise ValueError(
            f"{folder} is not a run folder: it has neither metrics.jsonl nor recipe.yaml; "
            f"give the folder that `treering train RECIPE --out DIR` wrote"
        )
    lines, torn = _lines(folder / "metrics.jsonl")
    lines = [
        line
        for line in lines
        if isinstance(line.get("event"), str) and all(is_number(line.get(k)) for k in ("samples", "time"))
    ]
    ledger, torn_ledger = _lines(folder / "ledger.jsonl")
    recipe, text = _recipe(folder / "recipe.yaml")
    read = [_json(path) for path in sorted((folder / "evaluations").glob("step-*.json"))]
    evaluations = [e for e in read if isinstance(e, dict) and is_number(e.get("samples"))]
    lineage = _json(folder / "lineage.json")
    return RecordedRun(
        folder=folder,
        recipe=recipe,
        recipe_text=text,
        lines=tuple(lines),
        evaluations=tuple(sorted(evaluations, key=lambda e: e["samples"])),
        ledger=tuple(ledger),
        lineage=tuple(e for e in lineage if isinstance(e, dict)) if isinstance(lineage, list) else (),
        unreadable=torn + torn_ledger,
    )


def seconds_of(line: LogLine) -> float:
    """Seconds of the run's time that a line accounts for, whether it has one figure or one per part.

    For a commit, which is uploaded while training continues, only the time for which training was stopped.
    """
    seconds = line.get("stall", line.get("seconds"))
    if isinstance(seconds, Mapping):
        return float(sum(v for v in seconds.values() if is_number(v)))
    return float(seconds) if is_number(seconds) and seconds is not None else 0.0


def _lines(path: Path) -> tuple[list[LogLine], int]:
    """All readable lines of a file, and the number of unreadable ones; a last line cut off by a kill is not counted."""
    if not path.is_file():
        return [], 0
    lines, unreadable = [], 0
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts):
        try:
            line = json.loads(text) if text.strip() else None
        except ValueError:
            unreadable += number < len(texts) - 1
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines, unreadable


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _recipe(path: Path) -> tuple[Mapping[str, Any], str]:
    """The recipe as plain data and as text. Not validated, so that runs of older versions can be read too."""
    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        data = None
    return (data if isinstance(data, dict) else {}), printable(masked(text))
