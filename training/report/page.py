"""Sets a `RecordedRun` into page.html: one document, everything in it, nothing fetched.

The page forbids itself every request by its content security policy, so that hostile captions cannot make one even if
an escape were forgotten.
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
    """The whole page as HTML text."""
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
    """Where templates come from, and what all of them use; whatever is set into one is escaped."""
    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals |= {"figure": figure, "bare": bare, "style": Markup((HERE / "page.css").read_text(encoding="utf-8"))}
    return found


def bare(text: str) -> Markup:
    """A name from a file, which may be written from right to left, kept from turning what stands around it."""
    return Markup("<bdi>{}</bdi>").format(text)


def figure(chart: LineChart, identity: str, size: str) -> Markup:
    """A chart: "small" serves desk and phone alike, "large" is drawn for each and the style sheet shows one."""
    if size == "small":
        return chart.svg(320, 210 + 20 * max(0, len(chart.series) - 2), identity)  # the legend may take a row a line
    wide, narrow = chart.svg(960, 340, f"{identity}-wide"), chart.svg(380, 300, f"{identity}-narrow")
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide, narrow)
