"""The page of a comparison: models side by side, in the style of a run's report and equally self-contained.

It shows the object that `treering compare --json` prints, and the curves of the runs that were named. The first model
is the baseline that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.storage.credentials import masked
from . import readable
from .charts import LineChart, Series
from .drawings import rings
from .forest import Forest, Mark
from .losses import comparable, loss_text
from .page import environment
from .readable import counts_first, is_fraction, lower_is_better, number, printable, score
from .reading import RecordedRun, read_run
from .sections import held_out_points, made_on, score_title

LEVEL = 0.05
"""significance level for the adjusted p-value"""
_CURVES = 12

ComparisonView = dict[str, Any]


def render_comparison(found: Mapping[str, Any]) -> str:
    """The page as HTML text; `found` is a `comparison` of training/evaluate/comparing.py."""
    models = [_model(each) for each in found["models"]]
    names = [model["name"] for model in models]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            rings=rings([1.0] * len(models)),
            title=" and ".join([", ".join(names[1:-1]), names[-1]] if len(names) > 2 else names[1:]),
            models=models,
            held_out=held_out_losses(found["models"]),
            verdicts=[_verdicts(found["tasks"], n, name) for n, name in enumerate(names[1:])],
            forest=_forest(found["tasks"], names),
            tables=[_table(found["tasks"], n, name) for n, name in enumerate(names[1:])],
            flips=_flips(found["tasks"], names),
            curves=curves_of(_runs(found["models"])),
            data=made_on(found.get("data")),
            level=readable.percent(LEVEL).replace(".0", ""),
        )
    )


def held_out_losses(models: Sequence[Mapping[str, Any]]) -> str:
    """The held-out losses of the models that have one, in a sentence; empty if fewer than two do."""
    known = [(printable(model["name"]), model["held_out"]) for model in models if model.get("held_out")]
    if len(known) < 2:
        return ""
    said = ", ".join(f"{name} {loss_text(number(held_out.get('loss')))}" for name, held_out in known)
    if comparable([held_out for _, held_out in known]):
        return f"Held-out loss: {said}"
    return f"Held-out loss: {said}; not comparable, as objectives, weights, data.batch or samples differ"


def signed(key: str, value: float) -> str:
    """A signed difference of scores, in percentage points if the scores are fractions."""
    size = f"{100 * abs(value):.1f} pp" if is_fraction(key) else readable.decimal(abs(value), 3)
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{size}"


def verdict(key: str, change: Mapping[str, Any]) -> str:
    """ "better" or "worse", or an empty text if the difference is not significant."""
    lower = lower_is_better(key)
    if lower is None or change["adjusted"] is None or change["adjusted"] >= LEVEL:
        return ""
    return "better" if (change["value"] < 0) == lower else "worse"


def _model(model: Mapping[str, Any]) -> ComparisonView:
    return {
        "name": printable(model["name"]),
        "commit": printable(masked(str(model["commit"]))),
        "parameters": readable.compact(number(model.get("parameters"))),
        "samples": readable.exact(number(model.get("samples"))),
    }


def _verdicts(tasks: Sequence[Mapping[str, Any]], model: int, name: str) -> ComparisonView:
    results = [verdict(task["key"], task["changes"][model]) for task in tasks]
    better, worse = results.count("better"), results.count("worse")
    return {"name": name, "better": better, "worse": worse, "even": len(results) - better - worse}


def _forest(tasks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> ComparisonView | None:
    """Differences of scores that are fractions, in percentage points."""
    rows = []
    for task in tasks:
        if is_fraction(task["key"]) and any(change["low"] is not None for change in task["changes"]):
            marks = [_mark(task["key"], c, n) for c, n in zip(task["changes"], names[1:], strict=True)]
            rows.append((score_title(task["key"]), marks))
    if not rows:
        return None
    plot = Forest(f"Difference from {names[0]}, in percentage points, with 95% intervals", names[1:], rows)
    return {"wide": plot.svg(960, "forest-wide"), "narrow": plot.svg(380, "forest-narrow")}


def _mark(key: str, change: Mapping[str, Any], name: str) -> Mark | None:
    if change["low"] is None:
        return None
    low, high = signed(key, change["low"]), signed(key, change["high"])
    result = verdict(key, change) or "not significant"
    text = f"{name} {signed(key, change['value'])} ({low} to {high}), {result}"
    return Mark(100 * change["value"], 100 * change["low"], 100 * change["high"], result != "not significant", text)


def _table(tasks: Sequence[Mapping[str, Any]], model: int, name: str) -> ComparisonView:
    rows = []
    for task in tasks:
        key, change, result = task["key"], task["changes"][model], verdict(task["key"], task["changes"][model])
        within = f"{signed(key, change['low'])} to {signed(key, change['high'])}" if change["low"] is not None else ""
        rows.append(
            {
                "key": printable(key),
                "name": score_title(key),
                "queries": f"{readable.exact(task['queries'])} queries" if task["queries"] else "",
                "first": score(key, task["values"][0]),
                "other": score(key, task["values"][model + 1]),
                "difference": signed(key, change["value"]),
                "interval": within,
                "lost": readable.exact(change["lost"]) if change["lost"] is not None else readable.MISSING,
                "won": readable.exact(change["won"]) if change["won"] is not None else readable.MISSING,
                "p": readable.decimal(change["adjusted"], 2),
                "verdict": result,
                "mark": {"better": "▲", "worse": "▼"}.get(result, ""),
            }
        )
    return {"name": name, "rows": rows}


def _flips(tasks: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[ComparisonView]:
    """The first queries of each task that another model gets wrong and the baseline right."""
    return [
        {
            "task": score_title(task["key"]),
            "name": name,
            "count": readable.exact(change["lost"]),
            "queries": [printable(query)[:200] for query in change["flips"]],
        }
        for task in tasks
        for name, change in zip(names[1:], task["changes"], strict=True)
        if change["flips"] and counts_first(task["key"])
    ]


def _runs(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, RecordedRun]]:
    return [(printable(model["name"]), read_run(Path(model["run"]))) for model in models if model.get("run")]


def curves_of(runs: Sequence[tuple[str, RecordedRun]]) -> list[LineChart]:
    """Charts over samples of several named runs: the loss, and the scores that at least two of them have."""
    if len(runs) < 2:
        return []
    loss = [Series(n, [(s["samples"], number(s.get("loss"))) for s in run.events("step")]) for n, run in runs]
    held = [Series(n, held_out_points(run), dots=True) for n, run in runs]
    charts = [
        LineChart(title, [each for each in lines if each.values], labelled=False)
        for title, lines in (("Total loss", loss), ("Held-out loss", held))
    ]
    keys = dict.fromkeys(key for _, run in runs for e in run.events("eval") for key in e.get("scores") or {})
    for key in keys:
        lines = [
            Series(name, [(e["samples"], number((e.get("scores") or {}).get(key))) for e in run.events("eval")])
            for name, run in runs
        ]
        if sum(bool(line.values) for line in lines) > 1:
            form = readable.percent if is_fraction(key) else readable.decimal
            charts.append(LineChart(score_title(key), lines, y_format=form, dots=True, labelled=False))
    return [chart for chart in charts if chart.series][:_CURVES]
