"""The history sections of the page: where the time went, how the model grew, and the lineage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...data.storage.credentials import masked
from ...data.units import counted
from . import readable
from .charts import Marker
from .drawings import Span, bar, timeline, towers
from .readable import is_number, number, printable
from .reading import LogLine, RecordedRun, seconds_of

HistoryView = dict[str, Any]
_HOSTS = 16
"""host names shown at most"""
_SHOWN = frozenset(("embed_dim", "width", "depth", "heads", "patch", "resolution", "context"))
"""sizes of a model that are shown also where no stage changes them"""

_LINEAGE = (
    "start", "resume", "rollback", "plateau", "search", "grow", "micro_batches", "commit", "commit_failed", "end"
)  # fmt: skip
"""events that the page's lineage shows"""

TIME_KINDS = {
    "startup": "Start-up",
    "training": "Training: compute",
    "data": "Training: waiting for data",
    "eval": "Evaluation",
    "commit": "Commits",
    "grow": "Growth",
    "search": "Search for the next size",
    "rest": "Other",
}


def time(run: RecordedRun, width: int = 960) -> HistoryView | None:
    """The timeline and the total time of each kind of work."""
    attempts = run.attempts
    if not attempts:
        return None
    spans, breaks, offset = [], [], 0.0
    for n, attempt in enumerate(attempts):
        if n:
            breaks.append(offset)
        spans += _spans(attempt.lines, offset - attempt.began)
        offset += attempt.ended - attempt.began
    sums = dict.fromkeys(TIME_KINDS, 0.0)
    for span in spans:
        sums[span.kind] += span.seconds * (1 - span.data_wait)
        sums["data"] += span.seconds * span.data_wait
    sums["rest"] = max(0.0, offset - sum(sums.values()))
    total = sum(sums.values()) or 1.0
    rows = [
        {
            "kind": k,
            "name": TIME_KINDS[k],
            "seconds": readable.duration_text(v),
            "fraction": readable.percent(v / total),
            "bar": bar(v / total),
        }
        for k, v in sums.items()
        if v > 0
    ]
    return {
        "wide": timeline(spans, breaks, offset, width, "time-wide"),
        "narrow": timeline(spans, breaks, offset, 360, "time-narrow"),
        "rows": rows,
        "total": readable.duration_text(total),
        "attempts": len(attempts),
    }


def growth(run: RecordedRun) -> HistoryView | None:
    """The model's sizes in each stage reached, and the record of each growth."""
    model = run.recipe.get("model")
    grown = run.events("grow")
    if not isinstance(model, Mapping):
        return None
    shapes = [dict(_sizes(model))]
    for line in grown:
        shapes.append({**shapes[-1], **{printable(k): v for k, v in (line.get("to") or {}).items() if is_number(v)}})
    names = ["at the start"] + [f"from {readable.compact(line['samples'])} samples on" for line in grown]
    parameters = parameters_reached(run)
    rows = [
        {
            "name": key,
            "cells": [
                {"value": readable.general(s.get(key)), "changed": n > 0 and s.get(key) != shapes[n - 1].get(key)}
                for n, s in enumerate(shapes)
            ],
        }
        for key in shapes[-1]
        if key.rpartition(".")[2] in _SHOWN or any(s.get(key) != shapes[0].get(key) for s in shapes)
    ]
    if len(parameters) == len(shapes):
        cells = [{"value": readable.compact(p), "changed": n > 0} for n, p in enumerate(parameters)]
        rows.append({"name": "parameters", "cells": cells})
    steps = [
        {
            "samples": readable.exact(line["samples"]),
            "changes": ", ".join(m.labels),
            "before": readable.compact(line.get("parameters_before")),
            "after": readable.compact(line.get("parameters_after")),
            "seconds": readable.duration_text(line.get("seconds")),
            "difference": readable.decimal(number(line.get("logit_difference")), 2),
        }
        for line, m in zip(grown, markers(run), strict=False)
    ]
    return {
        "names": names,
        "rows": rows,
        "drawing": towers(shapes, names, "towers"),
        "steps": steps,
        "flips": _flips(run),
    }


def _flips(run: RecordedRun) -> HistoryView | None:
    """The queries lost and won in the newest evaluation, compared with the last one before the last growth."""
    line = next((each for each in reversed(run.events("eval")) if isinstance(each.get("flips"), Mapping)), None)
    if line is None or not line["flips"]:
        return None
    rows = [
        {
            "name": printable(key),
            "lost": readable.exact(each.get("lost")),
            "won": readable.exact(each.get("won")),
            "queries": readable.exact(each.get("queries")),
            "p_value": readable.decimal(number(each.get("p_value")), 3),
        }
        for key, each in line["flips"].items()
        if isinstance(each, Mapping)
    ]
    return {"before": readable.exact(line.get("since")), "after": readable.exact(line["samples"]), "rows": rows}


def lineage(run: RecordedRun) -> list[HistoryView]:
    """Every start, resume, growth, change of world size, commit and end, oldest first; runs of commits are folded."""
    lines = run.events(*_LINEAGE)
    known = {(line["event"], line.get("step")) for line in lines}
    older = [
        e
        for e in run.lineage
        if (e.get("event"), e.get("step")) not in known and is_number(e.get("time")) and is_number(e.get("samples"))
    ]
    rows: list[HistoryView] = []
    world = None
    for line in sorted([*older, *lines], key=lambda e: e["time"]):
        event = str(line.get("event"))
        here = line.get("world", (line.get("detail") or {}).get("world"))
        text = _lineage_text(line)
        if world is not None and here is not None and here != world:
            text += f"; world size {world} → {here}"
        world = here if here is not None else world
        previous = rows[-1] if rows else None
        if (
            event in ("commit", "commit_failed")
            and previous
            and previous["event"] == event
            and previous["reason"] == line.get("reason") == "interval"
        ):
            previous.update(count=previous["count"] + 1, samples_to=readable.exact(line["samples"]), text=text)
            continue
        rows.append(
            {
                "event": event,
                "reason": line.get("reason"),
                "count": 1,
                "when": readable.moment(line["time"]),
                "samples": readable.exact(line["samples"]),
                "samples_to": "",
                "text": text,
            }
        )
    return rows


def markers(run: RecordedRun) -> list[Marker]:
    """Chart markers of growths and resumes."""
    grown = [
        Marker(
            line["samples"],
            tuple(
                f"{printable(k)} {readable.general((line.get('from') or {}).get(k))} → {readable.general(v)}"
                for k, v in (line.get("to") or {}).items()
            ),
            "growth",
        )
        for line in run.events("grow")
    ]
    return grown + [Marker(line["samples"], (), "resume") for line in run.events("resume")]


def device(line: Mapping[str, Any]) -> str | None:
    """Where an attempt ran, from its start line: "2 processes on node-1 (CPU)"; None if the line does not say."""
    world = line.get("world")
    if world is None:
        return None
    hosts = [printable(h) for h in dict.fromkeys(line.get("hosts") or [])]
    names = ", ".join(hosts[:_HOSTS]) + (", ..." if len(hosts) > _HOSTS else "")
    places = f" on {names}" if len(hosts) == 1 else f" on {len(hosts)} hosts: {names}" if hosts else ""
    kind = printable(line.get("device") or "")
    kind = f" ({kind.upper() if kind in ('cpu', 'cuda') else kind})" if kind else ""
    return f"{world} process{'' if world == 1 else 'es'}{places}{kind}"


def parameters_reached(run: RecordedRun) -> list[float]:
    """Number of parameters of each model shape reached."""
    grown = [
        g for g in run.events("grow") if is_number(g.get("parameters_before")) and is_number(g.get("parameters_after"))
    ]
    if grown:
        return [grown[0]["parameters_before"]] + [g["parameters_after"] for g in grown]
    return [s["parameters"] for s in run.events("step")[-1:] if is_number(s.get("parameters"))]


def _spans(lines: Iterable[LogLine], shift: float) -> list[Span]:
    """The spans of one attempt; `shift` converts unix time to seconds since the run began, excluding pauses."""
    spans: list[Span] = []
    before, between = -math.inf, 0.0  # the end of the last training span, and the time of other work since then
    for line in lines:
        end, length, event = line["time"] + shift, seconds_of(line), line["event"]
        if event in ("start", "resume", "rollback"):
            spans.append(Span(end - length, end, "startup", TIME_KINDS["startup"], length))
            before = end
        elif event == "step":
            waited = (
                line["seconds"].get("data", 0.0) / length
                if isinstance(line.get("seconds"), Mapping) and length
                else 0.0
            )
            label = f"training to {readable.exact(line['samples'])} samples"
            spans.append(Span(max(before, end - length - between), end, "training", label, length, waited))
            before, between = end, 0.0
        elif event in ("eval", "commit", "search", "grow"):
            spans.append(Span(end - length, end, event, TIME_KINDS[event], length))
            between += length
    return spans


def _lineage_text(line: LogLine) -> str:
    detail = line.get("detail") if isinstance(line.get("detail"), Mapping) else {}
    line = {**(detail or {}), **line}
    event = line.get("event")
    if event in ("start", "resume"):
        text = device(line) or ""
        commit = line.get("commit")
        return text + (f" from {printable(masked(str(commit)))}" if commit else "")
    if event == "grow":
        return ", ".join(
            f"{printable(k)} {readable.general((line.get('from') or {}).get(k))} → {readable.general(v)}"
            for k, v in (line.get("to") or {}).items()
        )
    if event == "plateau":
        slopes = (
            f"slope {readable.general(line.get('slope'))} per FLOP, expected {readable.general(line.get('expected'))}"
        )
        return f"{slopes}: the stage {'continues' if line.get('ended') is False else 'ends'}"
    if event == "micro_batches":
        return f"{readable.exact(line.get('pieces'))} of {readable.exact(line.get('pairs'))} pairs fit in memory"
    if event == "search":
        return _search_text(line)
    if event == "commit":
        parts = [
            printable(masked(str(line.get("url", "")))),
            readable.bytes_text(line.get("bytes")),
            f"in {readable.duration_text(line.get('seconds'))}",
        ]
        return " · ".join([*parts, *([f"reason: {printable(line['reason'])}"] if line.get("reason") else [])])
    if event == "commit_failed":
        return printable(masked(f"{line.get('error')}; {line.get('then')}"))
    if event == "rollback":
        back = (
            f"back to {line.get('commit')}, {counted(line.get('batches') or 0, 'batch')} skipped: {line.get('reason')}"
        )
        return printable(masked(back))
    if event == "from":
        return f"{printable(str(line.get('load')))} of {printable(masked(str(line.get('commit'))))}"
    return "the run finished" if event == "end" else ""


def _search_text(line: LogLine) -> str:
    """All candidates with their losses, scores and cost."""

    def described(sizes: Any) -> str:
        pairs = sizes.items() if isinstance(sizes, Mapping) else ()
        return ", ".join(f"{printable(k)} {readable.general(v)}" for k, v in pairs) or "no growth"

    rows = [row for row in line.get("candidates") or [] if isinstance(row, Mapping)]
    tried = "; ".join(
        f"{described(row.get('sizes'))}: loss {readable.general(row.get('loss'))}, "
        f"score {readable.general(row.get('score'))}"
        for row in rows
    )
    return f"chose {described(line.get('chosen'))} for {readable.general(line.get('flops'))} FLOPs of trials ({tried})"


def _sizes(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number of a nested mapping by its dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, f"{prefix}{printable(key)}.")
        elif is_number(value):
            yield f"{prefix}{printable(key)}", value
