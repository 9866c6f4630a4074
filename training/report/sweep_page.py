"""The page of a sweep: its runs side by side, their recipe values, and the run that is ahead.

sweep.json, which `treering submit --sweep` writes next to the run folders, lists the runs and their values. Everything
else is read from the run folders, so the page can be written at any time. Each run updates it when it writes its
report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from ...data.units import counted
from . import readable
from .comparison_page import curves_of
from .drawings import rings
from .page import environment
from .readable import is_number, lower_is_better, number, printable
from .reading import LogLine, RecordedRun, read_run
from .sections import interval_text, score_title, state

SWEEP_FILE = "sweep.json"
_COLUMNS = 6
"""scores in a table: more would not fit into the page"""
_DRAWN = 6

SweepView = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its folder name, its values by recipe key, and its records so far (None: no run folder)."""

    name: str
    values: Mapping[str, str]
    run: RecordedRun | None

    def events(self, name: str) -> list[LogLine]:
        """The run's lines of the event `name`, in order."""
        return self.run.events(name) if self.run else []

    @property
    def loss(self) -> float | None:
        """The loss of the last step line, as `treering status` shows it; None if there is none or it is not finite."""
        return number(self.events("step")[-1].get("loss")) if self.events("step") else None

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the newest evaluation."""
        return {key: value for key, value in self._evaluated("scores").items() if is_number(value)}

    def interval(self, key: str) -> str:
        """The 95% interval of a score as text; empty if there is none."""
        return interval_text(key, self._evaluated("intervals").get(key))

    def beats(self, key: str, other: Member) -> bool:
        """Whether a score is better than another run's, and their 95% intervals do not overlap."""
        mine, its = (m._evaluated("intervals").get(key) or () for m in (self, other))
        if not interval_text(key, mine) or not interval_text(key, its) or lower_is_better(key) is None:
            return False
        return bool(max(mine) < min(its) if lower_is_better(key) else min(mine) > max(its))

    def _evaluated(self, part: str) -> Mapping[str, Any]:
        evaluations = self.events("eval")
        found = evaluations[-1].get(part) if evaluations else None
        return found if isinstance(found, Mapping) else {}


def read_sweep(folder: Path) -> list[Member]:
    """The runs of the sweep in `folder`, in its order. Raises ValueError if its sweep.json cannot be read."""
    try:
        runs = json.loads((folder / SWEEP_FILE).read_bytes())["runs"]
        named = {name: {str(k): str(v) for k, v in values.items()} for name, values in runs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / SWEEP_FILE} cannot be read; submit the sweep again to rewrite it") from None
    if wrong := [name for name in named if Path(name).name != name]:
        raise ValueError(
            f"{folder / SWEEP_FILE} lists the run {wrong[0]!r}, which is not a folder name; submit the sweep again"
        )
    return [Member(name, values, _run(folder / name)) for name, values in named.items()]


def render_sweep(name: str, members: Sequence[Member]) -> str:
    """The page as HTML text."""
    keys = list(dict.fromkeys(key for member in members for key in member.values))
    scores = list(dict.fromkeys(key for member in members for key in member.scores))
    order = ranking(members)
    drawn = [m for m, _ in order[:_DRAWN]]
    finished = sum(m.run is not None and m.run.finished for m in members)
    return (
        environment()
        .get_template("sweep.html")
        .render(
            rings=rings([1.0] * min(len(members), 12)),
            name=printable(name),
            count=len(members),
            finished=finished,
            begun=sum(bool(m.run and m.run.lines) for m in members),
            verdict=_verdict(order, scores),
            keys=[printable(key) for key in keys],
            rows=[_row(member, keys, members) for member in members],
            tables=[_scores(scores[i : i + _COLUMNS], members) for i in range(0, len(scores), _COLUMNS)],
            curves=curves_of([(printable(m.name), m.run) for m in drawn if m.run]),
            drawn=len(drawn) if len(drawn) < len(order) else 0,
        )
    )


def ranking(members: Sequence[Member]) -> list[tuple[Member, float]]:
    """The members with results, best first, each with its mean rank over the scores (1: best).

    Tied runs get the mean of their ranks. A run that lacks a score ranks last in it. If nothing was evaluated, the rank
    is by loss.
    """
    shown = [m for m in members if m.scores] or [m for m in members if m.loss is not None]
    keys = list(dict.fromkeys(key for m in shown for key in m.scores if lower_is_better(key) is not None))
    columns = [[_value(m.scores.get(key), bool(lower_is_better(key))) for m in shown] for key in keys]
    columns = columns or [[_value(m.loss, True) for m in shown]]
    ranks = [
        fmean(sum(v < column[n] for v in column) + (column.count(column[n]) + 1) / 2 for column in columns)
        for n in range(len(shown))
    ]
    return sorted(zip(shown, ranks, strict=True), key=lambda pair: pair[1])


def _value(value: float | None, lower: bool) -> float:
    """A sort key that is smaller for a better value; infinity for None."""
    return float("inf") if value is None else value if lower else -value


def _verdict(order: Sequence[tuple[Member, float]], scores: Sequence[str]) -> SweepView | None:
    """What can be said of the runs: one is ahead if its intervals are clear of all others' in a score, and never behind
    another's."""
    shown = [member for member, _ in order]
    if len(shown) < 2:
        return None
    if not scores:
        tied = shown[0].loss == shown[1].loss
        return None if tied else {"name": printable(shown[0].name), "says": "has the lowest loss so far"}
    for best in shown:
        others = [member for member in shown if member is not best]
        clear = sum(all(best.beats(key, other) for other in others) for key in scores)
        if clear and not any(other.beats(key, best) for other in others for key in scores):
            of = counted(len(scores), "score")
            says = f"is ahead: its 95% interval is clear of all others' in {clear} of {of}"
            return {"name": printable(best.name), "says": says}
    return {"name": "", "says": "No run is ahead of all others by more than the 95% intervals."}


def _row(member: Member, keys: Sequence[str], members: Sequence[Member]) -> SweepView:
    """A run's values, state and loss; the lowest loss is marked if it is one run's alone."""
    losses = [m.loss for m in members if m.loss is not None]
    return _linked(member) | {
        "values": [printable(member.values.get(key, readable.MISSING)) for key in keys],
        "state": "Not started" if not (member.run and member.run.lines) else state(member.run).partition(":")[0],
        "samples": readable.exact(member.run.samples) if member.run else readable.MISSING,
        "total": readable.exact(member.run.total_samples) if member.run and not member.run.finished else "",
        "loss": readable.decimal(member.loss),
        "lowest": len(losses) > 1 and member.loss == min(losses) and losses.count(min(losses)) == 1,
    }


def _linked(member: Member) -> SweepView:
    report = quote(f"{member.name}/report.html") if member.run and member.run.lines else ""
    return {"name": printable(member.name), "report": report}


def _scores(keys: Sequence[str], members: Sequence[Member]) -> SweepView:
    """A table of some scores of the runs that were evaluated; one that beats all others in its column is marked."""
    shown = [member for member in members if member.scores]

    def cell(member: Member, key: str) -> SweepView:
        others = [m for m in shown if m is not member and key in m.scores]
        best = bool(others) and all(member.beats(key, other) for other in others)
        value = readable.score(key, member.scores.get(key))
        return {"value": value, "interval": member.interval(key), "best": best}

    return {
        "columns": [{"key": printable(key), "name": score_title(key)} for key in keys],
        "rows": [_linked(member) | {"scores": [cell(member, key) for key in keys]} for member in shown],
    }


def _run(folder: Path) -> RecordedRun | None:
    try:
        return read_run(folder)
    except ValueError:
        return None
