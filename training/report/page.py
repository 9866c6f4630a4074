"""Renders a `RecordedRun` with page.html: one self-contained document that fetches nothing.

The page's content security policy forbids all requests, so hostile captions could not cause one even if an escape were
missing.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import history, sections
from .charts import LineChart
from .reading import RecordedRun

HERE = Path(__file__).parent


def render(run: RecordedRun) -> str:
    """The page as HTML text."""
    return (
        environment()
        .get_template("page.html")
        .render(
            head=sections.headline(run),
            scores=sections.scores(run),
            curves=sections.curves(run),
            time=history.time(run),
            retrieval=sections.retrieval(run),
            captions=sections.captions(run),
            bad=sections.bad_samples(run),
            growth=history.growth(run),
            lineage=history.lineage(run),
            recipe=run.recipe_text,
            credits=sections.credits(run),
        )
    )


def environment() -> Environment:
    """The jinja2 environment of the templates, with the functions they use; values are escaped."""
    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals |= {"figure": figure, "bare": bare, "style": Markup((HERE / "page.css").read_text(encoding="utf-8"))}
    return found


def bare(text: str) -> Markup:
    """A name from a file, isolated so that right-to-left text does not affect the text around it."""
    return Markup("<bdi>{}</bdi>").format(text)


def figure(chart: LineChart, identity: str, size: str) -> Markup:
    """A chart: "small" fits any screen; "large" is drawn wide and narrow, and the style sheet shows one of them."""
    if size == "small":
        return chart.svg(320, 210 + 20 * max(0, len(chart.series) - 2), identity)  # the legend may need a row per line
    wide, narrow = chart.svg(960, 340, f"{identity}-wide"), chart.svg(380, 300, f"{identity}-narrow")
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow)
