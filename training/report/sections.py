"""The content of each section of the page: from a `RecordedRun` to texts, numbers and charts for the template.

One function per section, in the order of the page. A section without data returns None or an empty list, and page.html
shows a note instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...data.shards.source import attribution, held_out
from ...data.storage.credentials import masked
from ...data.units import counted
from . import readable
from .charts import ChartPoint, LineChart, Marker, Series
from .drawings import bar, rings
from .history import HistoryView, device, markers, parameters_reached
from .losses import conclusion, gap_text
from .readable import is_number, number, printable
from .reading import LogLine, RecordedRun

IMAGE_BYTES = 1_200_000  # limit for all pictures on the page; the rest of the page is small


def headline(run: RecordedRun) -> HistoryView:
    """Name, state, and the most important figures."""
    steps, attempts = run.events("step"), run.attempts
    last = steps[-1] if steps else {}
    spent = sum(attempt.ended - attempt.began for attempt in attempts)
    first = attempts[0].lines[0] if attempts else {}
    total = run.total_samples
    parameters = parameters_reached(run)
    held_out = [f"{readable.decimal(value)} held out" for _, value in held_out_points(run)[-1:] if value is not None]
    trained = sum(
        sum(v for v in (s.get("seconds") or {}).values() if is_number(v))
        for s in steps
        if isinstance(s.get("seconds"), Mapping)
    )
    facts = [
        ("Parameters", readable.compact(parameters[-1] if parameters else None), _grew_from(parameters)),
        (
            "Samples seen",
            readable.exact(run.samples),
            f"of {readable.exact(total)}" if total and total != run.samples else "",
        ),
        ("Time", readable.duration_text(spent), f"in {len(attempts)} attempts" if len(attempts) > 1 else ""),
        ("Speed", f"{readable.exact(run.samples / trained) if trained else readable.MISSING} /s", "while training"),
        (
            "Loss",
            readable.decimal(last.get("loss")),
            ", ".join([*([f"from {readable.decimal(steps[0].get('loss'))}"] if len(steps) > 1 else []), *held_out]),
        ),
    ]
    if is_number(last.get("flops")):
        facts.append(
            (
                "Compute",
                readable.flops(last["flops"]),
                f"{readable.percent(last['mfu'])} of peak" if is_number(last.get("mfu")) else "",
            )
        )
    elif is_number(last.get("peak_memory")):
        facts.append(("Memory", readable.bytes_text(last["peak_memory"]), "at its peak"))
    return {
        "name": run.name,
        "finished": run.finished,
        "state": state(run),
        "sources": run.sources,
        "device": device(first) if first.get("event") in ("start", "resume") else None,
        "began": readable.moment(attempts[0].began) if attempts else None,
        "ended": readable.moment(attempts[-1].ended) if attempts else None,
        "facts": [{"name": n, "value": readable.unbroken(v), "note": note} for n, v, note in facts],
        "rings": rings(
            [float(s["samples"]) for s in run.recipe.get("stages") or [] if is_number(s.get("samples"))] or [1.0]
        ),
        "unreadable": run.unreadable,
    }


def credits(run: RecordedRun) -> list[str]:
    """The credits that the licences of the recipe's data sets, including evaluation data, require next to pictures."""
    return list(dict.fromkeys(credit for text in _texts(run.recipe) if (credit := attribution(text))))


def _texts(value: Any) -> Iterator[str]:
    """All strings in a value read from YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def scores(run: RecordedRun) -> HistoryView | None:
    """The last evaluation's scores with their chance levels, in groups."""
    evaluations = [line for line in run.events("eval") if line.get("scores")]
    if not evaluations:
        return None
    last = evaluations[-1]
    chance, sizes, intervals = (last.get(name) or {} for name in ("chance", "sizes", "intervals"))
    groups: dict[str, HistoryView] = {}
    for key, value in (last.get("scores") or {}).items():
        if not is_number(value):
            continue
        group, name = score_names(key)
        data = (last.get("data") or {}).get(key.partition("/")[0]) or _recipes_data(run)
        view = groups.setdefault(group, {"name": group, "rows": [], "data": printable(masked(str(data)))})
        level = chance.get(key) if is_number(chance.get(key)) else None
        size = next((sizes[k] for k in (key, key.partition("@")[0], key.split("/")[0]) if k in sizes), None)
        kind = "classes" if key in sizes else "candidates" if "_to_" in key else "samples"
        fraction = readable.is_fraction(key)
        view["rows"].append(
            {
                "name": name,
                "key": printable(key),
                "score": readable.score(key, value),
                "interval": interval_text(key, intervals.get(key)),
                "chance": readable.percent(level),
                "times": readable.times(value, level) if level else readable.MISSING,
                "size": f"{readable.exact(size)} {kind}" if is_number(size) else "",
                "bar": bar(value, level) if fraction else "",
            }
        )
    return {
        "groups": list(groups.values()),
        "data": evaluated_on(run),
        "samples": readable.exact(last["samples"]),
        "count": len(evaluations),
        "intervals": bool(intervals),
    }


def evaluated_on(run: RecordedRun) -> str:
    """What the scores and examples of the last evaluation were made on."""
    evaluations = run.events("eval")
    return made_on((evaluations[-1].get("data") if evaluations else None) or _recipes_data(run))


def made_on(data: object) -> str:
    """The data of an evaluation in words, from one URL or from URLs by suite: "a, b on URL; c on URL"."""
    if not isinstance(data, Mapping):
        return printable(masked(str(data or "")))
    suites: dict[str, list[str]] = {}
    for suite, source in data.items():
        suites.setdefault(printable(masked(str(source))), []).append(printable(suite))
    return "; ".join(f"{', '.join(names)} on {source}" for source, names in suites.items())


def _recipes_data(run: RecordedRun) -> str:
    """The evaluation data that the recipe names, for records that do not say what they were made on."""
    named = (run.recipe.get("eval") or {}).get("data")
    return str(named or ", ".join(filter(None, map(held_out, run.sources[:1]))))


def curves(run: RecordedRun) -> HistoryView | None:
    """Charts over samples: loss, scores, and small charts of training dynamics."""
    steps = run.events("step")
    if not steps:
        return None
    marks, end = markers(run), float(run.total_samples or 0)
    names = list(dict.fromkeys(k for s in steps for k in s.get("losses") or {}))
    total = [_series("total loss", steps, "loss"), *_held_out_series(run)]
    loss = LineChart("Loss over samples seen", total, marks, end)
    parts = [
        LineChart(
            f"{readable.plain(n).capitalize()} loss",
            [
                Series(readable.plain(n), [(s["samples"], number((s.get("losses") or {}).get(n))) for s in steps]),
                *_held_out_series(run, n),
            ],
            marks,
            end,
            labelled=False,
        )
        for n in names
    ]
    small = [
        LineChart(title, [_series(name, steps, key)], marks, end, form, labelled=False)
        for title, name, key, form in (
            ("Learning rate", "learning rate", "lr", readable.decimal),
            ("Throughput", "samples / s", "samples_per_second", readable.compact),
            ("Gradient norm", "gradient norm", "grad_norm", readable.decimal),
            ("Logit scale", "logit scale", "logit_scale", readable.decimal),
            ("Waiting for data", "fraction of time", "data_wait", readable.percent),
        )
        if any(number(s.get(key)) is not None for s in steps)
    ]
    return {
        "loss": loss,
        "gap": _gap(run),
        "parts": parts,
        "scores": _score_charts(run, marks, end),
        "data": evaluated_on(run),
        "small": small,
        "table": _figures(steps, names),
    }


def _held_out_series(run: RecordedRun, term: str | None = None) -> list[Series]:
    """The held-out loss of each evaluation as a line, or that of a term; none if there is none."""
    points = held_out_points(run, term)
    return [Series("held out", points, dots=True)] if any(y is not None for _, y in points) else []


def held_out_points(run: RecordedRun, term: str | None = None) -> list[ChartPoint]:
    """The held-out loss of each evaluation that has one, or that of a term, over samples."""
    points: list[ChartPoint] = []
    for line in run.events("eval"):
        held_out = line.get("held_out")
        if isinstance(held_out, Mapping):
            value = held_out.get("loss") if term is None else (held_out.get("losses") or {}).get(term)
            points.append((line["samples"], number(value)))
    return points


def _gap(run: RecordedRun) -> str:
    """The last held-out loss beside that of training, and what follows from it; empty without one."""
    lines = [line for line in run.events("eval") if isinstance(line.get("held_out"), Mapping)]
    if not lines:
        return ""
    held_out = lines[-1]["held_out"]
    samples, batch = (round(number(held_out.get(name)) or 0) for name in ("samples", "batch"))
    of = f"on {counted(samples, 'sample')} of {printable(masked(str(held_out.get('data'))))} in batches of {batch:,}"
    said = gap_text(held_out)
    return f"{said[0].upper()}{said[1:]}; {of}. {conclusion(lines)}"


def retrieval(run: RecordedRun) -> list[HistoryView]:
    """Pictures with their nearest captions, from the last evaluation that has any."""
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
                "shown": len(nearest),
                "nearest": [
                    {
                        "caption": printable(n.get("caption", "")),
                        "score": _similarity(n.get("score")),
                        "correct": bool(n.get("correct")),
                    }
                    for n in nearest
                ],
            }
        )
    return cards


def captions(run: RecordedRun) -> list[HistoryView]:
    """Pictures with the generated caption, the true ones, and captions generated in earlier evaluations."""
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
                "earlier": [
                    {"samples": readable.compact(s), "text": printable(p.get("generated", ""))} for s, p in history[:-1]
                ][-4:],
            }
        )
    return cards


def bad_samples(run: RecordedRun) -> HistoryView:
    """Number of samples that could not be used, by reason."""
    counts = Counter(printable(entry.get("reason", "unknown")) for entry in run.ledger)
    first = {printable(e.get("reason", "unknown")): e for e in reversed(run.ledger)}
    rows = [
        {
            "reason": reason,
            "count": readable.exact(count),
            "key": printable(first[reason].get("key", "")),
            "shard": printable(masked(str(first[reason].get("shard", "")))),
        }
        for reason, count in counts.most_common(12)
    ]
    rest = sum(counts.values()) - sum(c for _, c in counts.most_common(12))
    distinct = len({(e.get("source"), e.get("shard"), e.get("key")) for e in run.ledger})
    return {
        "count": len(run.ledger),
        "distinct": readable.exact(distinct),
        "fraction": readable.percent(len(run.ledger) / max(run.samples, 1)),
        "rows": rows,
        "rest": readable.exact(rest) if rest else "",
    }


def score_names(key: str) -> tuple[str, str]:
    """The group and the name of a score for display: ("Image → text", "R@5")."""
    recall = re.fullmatch(r"(.+)/(\w+?)_to_(\w+)@(\d+)", key)
    if recall:
        suite = "" if recall[1] == "retrieval" else f"{printable(recall[1])}: "
        way = f"{recall[2]} → {recall[3]}"
        return suite + (way if suite else way.capitalize()), f"R@{recall[4]}"
    suite, _, name = key.partition("/") if "/" in key else ("", "", key)
    known = {"zero_shot": "Zero-shot", "geometry": "Geometry", "captioning": "Captioning", "": "Scores"}
    group = known.get(suite, printable(suite))
    return group, readable.plain(name)


def score_title(key: str) -> str:
    """A score's name for display: Image → text: R@5."""
    group, name = score_names(printable(key))
    return f"{group}: {name}"


def interval_text(key: str, ends: object) -> str:
    """The interval of a score as text; empty if there is none."""
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(map(is_number, ends)):
        return ""
    return " to ".join(readable.score(key, end) for end in ends)


def _score_charts(run: RecordedRun, marks: list[Marker], end: float) -> list[LineChart]:
    evaluations = run.events("eval")
    groups: dict[tuple[str, Callable[[float], str]], list[Series]] = {}
    for key in dict.fromkeys(k for e in evaluations for k in e.get("scores") or {}):
        group, name = score_names(key)
        points = [(e["samples"], number((e.get("scores") or {}).get(key))) for e in evaluations]
        chance = number((evaluations[-1].get("chance") or {}).get(key))
        form = readable.percent if readable.is_fraction(key) else readable.decimal
        groups.setdefault((group, form), []).append(Series(name, points, chance))
    titles = Counter(group for group, _ in groups)
    return [
        LineChart(
            group if titles[group] == 1 else f"{group}: {', '.join(each.name for each in series)}",
            series,
            marks,
            end,
            form,
            dots=True,
            labelled=False,
        )
        for (group, form), series in groups.items()
    ]


def _figures(steps: list[LogLine], names: list[str]) -> HistoryView:
    """At most 20 log lines as a table, an accessible form of the curves."""
    columns = [("samples", "samples", readable.exact), ("loss", "loss", readable.decimal)]
    tail = [
        ("learning rate", "lr", readable.decimal),
        ("gradient norm", "grad_norm", readable.decimal),
        ("samples / s", "samples_per_second", readable.compact),
    ]
    count = min(20, len(steps))
    picked = [steps[round(n * (len(steps) - 1) / max(count - 1, 1))] for n in range(count)]
    rows = [
        [form(number(s.get(key))) for _, key, form in columns]
        + [readable.decimal(number((s.get("losses") or {}).get(n))) for n in names]
        + [form(number(s.get(key))) for _, key, form in tail]
        for s in picked
    ]
    return {"head": [c[0] for c in columns] + [readable.plain(n) for n in names] + [c[0] for c in tail], "rows": rows}


def state(run: RecordedRun) -> str:
    """Whether the run has finished, and how far it is."""
    if run.finished:
        return "Finished"
    total = run.total_samples
    return f"Not finished: {readable.percent(run.samples / total)} of the samples" if total else "Not finished"


def _grew_from(parameters: list[float]) -> str:
    return f"grown from {readable.compact(parameters[0])}" if len(parameters) > 1 else ""


def _examples(run: RecordedRun, kind: str) -> list[Mapping[str, Any]]:
    for evaluation in reversed(run.evaluations):
        found = (evaluation.get("examples") or {}).get(kind)
        if found:
            return [e for e in found if isinstance(e, Mapping)]
    return []


class _Budget:
    """Passes embedded pictures until the size limit is reached; any other URL would be a request and is dropped."""

    _EMBEDDED = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+=*")

    def __init__(self, characters: int) -> None:
        self.left = characters

    def image(self, url: object) -> str | None:
        if not isinstance(url, str) or not self._EMBEDDED.fullmatch(url) or len(url) > self.left:
            return None
        self.left -= len(url)
        return url


def _series(name: str, steps: list[LogLine], key: str) -> Series:
    return Series(name, [(s["samples"], number(s.get(key))) for s in steps])


def _similarity(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else readable.MISSING
