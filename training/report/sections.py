"""What each section of the page says: from a `Run` to words, numbers and charts, ready to be set.

A function a section, in the order of the page. A section that has nothing to say returns nothing and page.html says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from . import readable
from .charts import LineChart, Marker, Series
from .drawings import Span, bar, rings, timeline, towers
from .reading import Line, Run, seconds_of, without_credentials
from .readable import is_number, printable

View = dict[str, Any]

IMAGE_BYTES = 1_200_000  # of pictures on the page; the rest of the page is small
TIME_KINDS = {
    "startup": "Start-up",
    "training": "Training: compute",
    "data": "Training: waiting for data",
    "eval": "Evaluation",
    "commit": "Commits",
    "grow": "Growth",
    "rest": "Everything else",
}


def headline(run: Run) -> View:
    """Name, state, and the figures a person asks for first."""
    steps, lives = run.events("step"), run.lives
    last = steps[-1] if steps else {}
    spent = sum(life.ended - life.began for life in lives)
    first = lives[0].lines[0] if lives else {}
    total = run.total_samples
    parameters = _parameters(run)
    trained = sum(sum(v for v in (s.get("seconds") or {}).values() if is_number(v)) for s in steps if isinstance(s.get("seconds"), Mapping))
    facts = [
        ("Parameters", readable.compact(parameters[-1] if parameters else None), _grew_from(parameters)),
        ("Samples seen", readable.exact(run.samples), f"of {readable.exact(total)}" if total and total != run.samples else ""),
        ("Time", readable.duration(spent), f"in {len(lives)} lives" if len(lives) > 1 else ""),
        ("Speed", f"{readable.exact(run.samples / trained) if trained else readable.MISSING} /s", "while training"),
        ("Loss", readable.decimal(last.get("loss")), f"from {readable.decimal(steps[0].get('loss'))}" if len(steps) > 1 else ""),
    ]
    if is_number(last.get("flops")):
        facts.append(("Compute", readable.flops(last["flops"]), f"{readable.percent(last['mfu'])} of peak" if is_number(last.get("mfu")) else ""))
    elif is_number(last.get("peak_memory")):
        facts.append(("Memory", readable.size(last["peak_memory"]), "at its peak"))
    return {
        "name": run.name,
        "finished": run.finished,
        "state": _state(run),
        "sources": run.sources,
        "device": _device(first) if first.get("event") in ("start", "resume") else None,
        "began": readable.moment(lives[0].began) if lives else None,
        "ended": readable.moment(lives[-1].ended) if lives else None,
        "facts": [{"name": n, "value": v, "note": note} for n, v, note in facts],
        "rings": rings([float(s["samples"]) for s in run.recipe.get("stages") or [] if is_number(s.get("samples"))] or [1.0]),
        "unreadable": run.unreadable,
    }


def scores(run: Run) -> View | None:
    """The last evaluation's scores beside chance, in groups."""
    evaluations = run.events("eval")
    if not evaluations:
        return None
    last = evaluations[-1]
    chance, sizes = last.get("chance") or {}, last.get("sizes") or {}
    groups: dict[str, View] = {}
    for key, value in (last.get("scores") or {}).items():
        if not is_number(value):
            continue
        group, name = score_names(key)
        view = groups.setdefault(group, {"name": group, "rows": []})
        level = chance.get(key) if is_number(chance.get(key)) else None
        size = sizes.get(key, sizes.get(key.split("/")[0]))
        kind = "candidates" if "@" in key else "classes"
        view["rows"].append(
            {
                "name": name,
                "key": printable(key),
                "score": readable.percent(value),
                "chance": readable.percent(level),
                "times": readable.times(value, level) if level else readable.MISSING,
                "size": f"{readable.exact(size)} {kind}" if is_number(size) else "",
                "bar": bar(value, level),
            }
        )
    return {"groups": list(groups.values()), "samples": readable.exact(last["samples"]), "count": len(evaluations)}


def curves(run: Run) -> View | None:
    """Loss, scores, and the small charts, over samples."""
    steps = run.events("step")
    if not steps:
        return None
    marks, end = markers(run), float(run.total_samples or 0)
    names = list(dict.fromkeys(k for s in steps for k in s.get("losses") or {}))
    loss = LineChart("Loss over samples seen", [_series("total loss", steps, "loss")], marks, end)
    parts = [
        LineChart(f"{_plain(n).capitalize()} loss", [Series(_plain(n), [(s["samples"], _value((s.get("losses") or {}).get(n))) for s in steps])], marks, end, labelled=False)
        for n in names
    ]
    small = [
        LineChart(title, [_series(name, steps, key)], marks, end, form, labelled=False)
        for title, name, key, form in (
            ("Learning rate", "learning rate", "lr", readable.decimal),
            ("Throughput", "samples / s", "samples_per_second", readable.compact),
            ("Gradient norm", "gradient norm", "grad_norm", readable.decimal),
            ("Logit scale", "logit scale", "logit_scale", readable.decimal),
            ("Waiting for data", "share of time", "data_wait", readable.percent),
        )
        if any(_value(s.get(key)) is not None for s in steps)
    ]
    return {"loss": loss, "parts": parts, "scores": _score_charts(run, marks, end), "small": small, "table": _figures(steps, names)}


def markers(run: Run) -> list[Marker]:
    """Where the model grew and the run resumed."""
    grown = [
        Marker(line["samples"], tuple(f"{printable(k)} {_g((line.get('from') or {}).get(k))} → {_g(v)}" for k, v in (line.get("to") or {}).items()), "growth")
        for line in run.events("grow")
    ]
    return grown + [Marker(line["samples"], (), "resume") for line in run.events("resume")]


def time(run: Run, width: int = 960) -> View | None:
    """The timeline and the sums behind it."""
    lives = run.lives
    if not lives:
        return None
    spans, breaks, offset = [], [], 0.0
    for n, life in enumerate(lives):
        if n:
            breaks.append(offset)
        spans += _spans(life.lines, offset - life.began)
        offset += life.ended - life.began
    sums = dict.fromkeys(TIME_KINDS, 0.0)
    for span in spans:
        length = span.end - span.start
        sums[span.kind] += length * (1 - span.data_wait)
        sums["data"] += length * span.data_wait
    sums["rest"] = max(0.0, offset - sum(sums.values()))
    total = sum(sums.values()) or 1.0
    rows = [
        {"kind": k, "name": TIME_KINDS[k], "seconds": readable.duration(v), "share": readable.percent(v / total), "bar": bar(v / total)}
        for k, v in sums.items()
        if v > 0
    ]
    return {"wide": timeline(spans, breaks, offset, width, "time-wide"), "narrow": timeline(spans, breaks, offset, 360, "time-narrow"), "rows": rows, "total": readable.duration(total), "lives": len(lives)}


def retrieval(run: Run) -> list[View]:
    """Pictures with the captions that the model finds nearest, of the last evaluation that has any."""
    budget = _Budget(IMAGE_BYTES * 2 // 3)
    cards = []
    for example in _examples(run, "retrieval"):
        nearest = [n for n in example.get("nearest") or [] if isinstance(n, Mapping)]
        rank = next((r for r, n in enumerate(nearest, 1) if n.get("correct")), None)
        cards.append(
            {
                "image": budget.image(example.get("image")),
                "caption": printable(example.get("caption", "")),
                "rank": rank,
                "looked_at": len(nearest),
                "nearest": [{"caption": printable(n.get("caption", "")), "score": readable.decimal(_value(n.get("score")), 2), "correct": bool(n.get("correct"))} for n in nearest],
            }
        )
    return cards


def captions(run: Run) -> list[View]:
    """Pictures with the generated caption, the true ones, and what earlier evaluations generated for the same picture."""
    budget = _Budget(IMAGE_BYTES // 3)
    cards = []
    for example in _examples(run, "captions"):
        key = example.get("key")
        history = [
            (evaluation["samples"], past)
            for evaluation in run.evaluations
            for past in (evaluation.get("examples") or {}).get("captions") or []
            if past.get("key") == key
        ]
        cards.append(
            {
                "image": budget.image(example.get("image")),
                "generated": printable(example.get("generated", "")),
                "true": [printable(t) for t in example.get("true") or []][:4],
                "earlier": [{"samples": readable.compact(s), "text": printable(p.get("generated", ""))} for s, p in history[:-1]][-4:],
            }
        )
    return cards


def bad_samples(run: Run) -> View:
    """How many samples could not be used, and why."""
    counts = Counter(printable(entry.get("reason", "unknown")) for entry in run.ledger)
    first = {printable(e.get("reason", "unknown")): e for e in reversed(run.ledger)}
    rows = [
        {"reason": reason, "count": readable.exact(count), "key": printable(first[reason].get("key", "")), "shard": printable(without_credentials(str(first[reason].get("shard", ""))))}
        for reason, count in counts.most_common(12)
    ]
    rest = sum(counts.values()) - sum(c for _, c in counts.most_common(12))
    distinct = len({(e.get("source"), e.get("shard"), e.get("key")) for e in run.ledger})
    return {"count": len(run.ledger), "distinct": readable.exact(distinct), "share": readable.percent(len(run.ledger) / max(run.samples, 1)), "rows": rows, "rest": readable.exact(rest) if rest else ""}


def growth(run: Run) -> View | None:
    """The model of each stage reached, and what each growth did."""
    model = run.recipe.get("model")
    grown = run.events("grow")
    if not isinstance(model, Mapping):
        return None
    shapes = [dict(_sizes(model))]
    for line in grown:
        shapes.append({**shapes[-1], **{printable(k): v for k, v in (line.get("to") or {}).items() if is_number(v)}})
    names = ["at the start"] + [f"from {readable.compact(line['samples'])} on" for line in grown]
    parameters = _parameters(run)
    rows = [
        {"name": key, "cells": [{"value": _g(s.get(key)), "changed": n > 0 and s.get(key) != shapes[n - 1].get(key)} for n, s in enumerate(shapes)]}
        for key in shapes[-1]
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
            "seconds": readable.duration(line.get("seconds")),
            "difference": readable.decimal(_value(line.get("logit_difference")), 2),
        }
        for line, m in zip(grown, markers(run), strict=False)
    ]
    return {"names": names, "rows": rows, "drawing": towers(shapes, names, "towers"), "steps": steps}


def lineage(run: Run) -> list[View]:
    """Every start, resume, growth, change of world, commit and end, oldest first; long rows of commits are folded."""
    lines = run.events("start", "resume", "grow", "commit", "end")
    known = {(line["event"], line.get("step")) for line in lines}
    older = [e for e in run.lineage if (e.get("event"), e.get("step")) not in known and is_number(e.get("time")) and is_number(e.get("samples"))]
    rows: list[View] = []
    world = None
    for line in sorted([*older, *lines], key=lambda e: e["time"]):
        event = str(line.get("event"))
        here = line.get("world", (line.get("detail") or {}).get("world"))
        text = _lineage_text(line)
        if world is not None and here is not None and here != world:
            text += f"; world size {world} → {here}"
        world = here if here is not None else world
        previous = rows[-1] if rows else None
        if event == "commit" and previous and previous["event"] == "commit" and previous["reason"] == line.get("reason") == "interval":
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


def score_names(key: str) -> tuple[str, str]:
    """The group and the name of a score as a person says them: ("Image → text", "R@5")."""
    recall = re.fullmatch(r"retrieval/(\w+?)_to_(\w+)@(\d+)", key)
    if recall:
        return f"{recall[1].capitalize()} → {recall[2]}", f"R@{recall[3]}"
    suite, _, name = key.rpartition("/")
    group = {"zero_shot": "Zero-shot"}.get(suite, _plain(suite).capitalize() if suite else "Scores")
    return group, _plain(name)


def _score_charts(run: Run, marks: list[Marker], end: float) -> list[LineChart]:
    evaluations = run.events("eval")
    groups: dict[str, list[Series]] = {}
    for key in dict.fromkeys(k for e in evaluations for k in e.get("scores") or {}):
        group, name = score_names(key)
        points = [(e["samples"], _value((e.get("scores") or {}).get(key))) for e in evaluations]
        chance = _value((evaluations[-1].get("chance") or {}).get(key))
        groups.setdefault(group, []).append(Series(name, points, chance))
    return [LineChart(g, s, marks, end, readable.percent, dots=True, labelled=False) for g, s in groups.items()]


def _figures(steps: list[Line], names: list[str]) -> View:
    """At most 20 log lines as a table: the curves for those who cannot see them."""
    columns = [("samples", "samples", readable.exact), ("loss", "loss", readable.decimal)]
    tail = [("learning rate", "lr", readable.decimal), ("gradient norm", "grad_norm", readable.decimal), ("samples / s", "samples_per_second", readable.compact)]
    count = min(20, len(steps))
    picked = [steps[round(n * (len(steps) - 1) / max(count - 1, 1))] for n in range(count)]
    rows = [
        [form(_value(s.get(key))) for _, key, form in columns]
        + [readable.decimal(_value((s.get("losses") or {}).get(n))) for n in names]
        + [form(_value(s.get(key))) for _, key, form in tail]
        for s in picked
    ]
    return {"head": [c[0] for c in columns] + [_plain(n) for n in names] + [c[0] for c in tail], "rows": rows}


def _spans(lines: Iterable[Line], shift: float) -> list[Span]:
    """The spans of one life; `shift` turns unix time into seconds since the run began, pauses left out."""
    spans = []
    before = None
    for line in lines:
        end, length, event = line["time"] + shift, seconds_of(line), line["event"]
        if event in ("start", "resume"):
            spans.append(Span(end - length, end, "startup", TIME_KINDS["startup"]))
        elif event == "step" and length > 0:
            waited = (line["seconds"].get("data") or 0.0) / length if isinstance(line.get("seconds"), Mapping) else 0.0
            start = end - length if before is None else max(before, end - length)
            spans.append(Span(start, start + length, "training", f"training to {readable.exact(line['samples'])} samples", waited))
        elif event in ("eval", "commit", "grow"):
            spans.append(Span(end - length, end, event, TIME_KINDS[event]))
        before = end
    return spans


def _lineage_text(line: Line) -> str:
    detail = line.get("detail") if isinstance(line.get("detail"), Mapping) else {}
    line = {**(detail or {}), **line}
    event = line.get("event")
    if event in ("start", "resume"):
        text = _device(line) or ""
        commit = line.get("commit")
        return text + (f" from {printable(without_credentials(str(commit)))}" if commit else "")
    if event == "grow":
        return ", ".join(f"{printable(k)} {_g((line.get('from') or {}).get(k))} → {_g(v)}" for k, v in (line.get("to") or {}).items())
    if event == "commit":
        parts = [printable(without_credentials(str(line.get("url", "")))), readable.size(line.get("bytes")), f"in {readable.duration(line.get('seconds'))}"]
        return " · ".join([*parts, *([f"reason: {printable(line['reason'])}"] if line.get("reason") else [])])
    return "the run came to its end" if event == "end" else ""


def _device(line: Mapping[str, Any]) -> str | None:
    world = line.get("world")
    if world is None:
        return None
    hosts = [printable(h) for h in dict.fromkeys(line.get("hosts") or [])]
    places = f" on {hosts[0]}" if len(hosts) == 1 else f" on {len(hosts)} hosts" if hosts else ""
    kind = printable(line.get("device") or "").upper()
    return f"{world} {kind + ' ' if kind else ''}process{'' if world == 1 else 'es'}{places}"


def _state(run: Run) -> str:
    if run.finished:
        return "Finished"
    total = run.total_samples
    return f"Not finished: {readable.percent(run.samples / total)} of the samples" if total else "Not finished"


def _parameters(run: Run) -> list[float]:
    """Parameters of each model shape reached."""
    grown = [g for g in run.events("grow") if is_number(g.get("parameters_before")) and is_number(g.get("parameters_after"))]
    if grown:
        return [grown[0]["parameters_before"]] + [g["parameters_after"] for g in grown]
    return [s["parameters"] for s in run.events("step")[-1:] if is_number(s.get("parameters"))]


def _grew_from(parameters: list[float]) -> str:
    return f"grown from {readable.compact(parameters[0])}" if len(parameters) > 1 else ""


def _examples(run: Run, kind: str) -> list[Mapping[str, Any]]:
    for evaluation in reversed(run.evaluations):
        found = (evaluation.get("examples") or {}).get(kind)
        if found:
            return [e for e in found if isinstance(e, Mapping)]
    return []


class _Budget:
    """Lets pictures through while they fit: the page stays small. Anything but an embedded picture would be a request, and is dropped."""

    _EMBEDDED = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+=*")

    def __init__(self, characters: int) -> None:
        self.left = characters

    def image(self, url: object) -> str | None:
        if not isinstance(url, str) or not self._EMBEDDED.fullmatch(url) or len(url) > self.left:
            return None
        self.left -= len(url)
        return url


def _series(name: str, steps: list[Line], key: str) -> Series:
    return Series(name, [(s["samples"], _value(s.get(key))) for s in steps])


def _value(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _sizes(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Every number of a nested mapping by its dotted path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, f"{prefix}{printable(key)}.")
        elif is_number(value):
            yield f"{prefix}{printable(key)}", value


def _plain(name: str) -> str:
    return printable(name).replace("_", " ")


def _g(value: Any) -> str:
    return f"{value:g}" if is_number(value) else readable.MISSING
