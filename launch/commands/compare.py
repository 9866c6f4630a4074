"""`treering compare`: two or more commits on the same suites, task by task, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...training.report.comparison_page import signed, verdict
from ...training.report.readable import score
from ..errors import RecipeError, safe_text
from .eval import evaluate_opened, evaluation_of, open_model, parse_suites

if TYPE_CHECKING:
    from rich.table import Table


def compare_runs(urls: Sequence[str], suites: list[str] | None, data: str | None) -> dict[str, Any]:
    """Compare every score of the models at `urls` (commits, run folders, `open_clip:...`) with those of the first.

    `suites` and `data` default to those of the first model's recipe. Raises RecipeError, StoreError, DataError.
    """
    if len(urls) < 2:
        raise RecipeError("there is only one model to compare; name two or more commits or run folders")
    config = parse_suites(suites) if suites else None
    from ...training.evaluate.comparing import comparison, tasks
    from ...training.world import World

    opened = [open_model(url) for url in urls]
    first, source = evaluation_of(opened[0], config, data)
    for each in opened[1:]:
        evaluation_of(each, first, source)
    world = World.join()
    try:
        found = [evaluate_opened(each, first, source, world) for each in opened]
    finally:
        world.leave()
    names = _names(urls)
    models = [
        {
            "name": name,
            "commit": each.url,
            "run": url if Path(url).is_dir() and (Path(url) / "metrics.jsonl").is_file() else None,
            "samples": each.samples,
            "parameters": sum(p.numel() for p in _parameters(each.spec)),
            "held_out": result.held_out and result.held_out.json(),
        }
        for name, url, each, result in zip(names, urls, opened, found, strict=True)
    ]
    return {**comparison(models, tasks(names, found)), "data": found[0].data}


def _parameters(spec: Any) -> Any:
    from ...models.model import empty

    return empty(spec).parameters()


def _names(urls: Sequence[str]) -> list[str]:
    """Short distinct names: the URLs without the leading and trailing path segments that all have in common."""
    parts = {url: url.rstrip("/").split("/") for url in urls}
    for end in (0, -1):
        while min(map(len, parts.values())) > 1 and len({each[end] for each in parts.values()}) == 1:
            for each in parts.values():
                each.pop(end)
    names = ["/".join(parts[url]) for url in urls]
    return [f"{name} ({i + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def comparison_table(found: Mapping[str, Any]) -> Table:
    """A table of the scores; for each other model the difference from the first, its interval, flips and p-value."""
    from rich.table import Table
    from rich.text import Text

    names = [model["name"] for model in found["models"]]
    table = Table(box=None, pad_edge=False)
    table.add_column("score", overflow="fold")
    for head in (*names, "difference", "95% interval", "lost", "won", "p", ""):
        table.add_column(Text(safe_text(head)), justify="right")
    for task in found["tasks"]:
        key, values = task["key"], task["values"]
        for number, change in enumerate(task["changes"]):
            shown = [score(key, value) for value in values] if not number else [""] * len(values)
            title = key if not number else f"  {safe_text(names[number + 1])}"
            table.add_row(Text(title), *shown, *_cells(key, change))
    return table


def _cells(key: str, change: Mapping[str, Any]) -> list[str]:
    ends = [signed(key, change[end]) for end in ("low", "high")] if change["low"] is not None else []
    flips = ["" if change[name] is None else str(change[name]) for name in ("lost", "won")]
    p_value = "" if change["adjusted"] is None else f"{change['adjusted']:.2g}"
    return [signed(key, change["value"]), " to ".join(ends), *flips, p_value, verdict(key, change)]
