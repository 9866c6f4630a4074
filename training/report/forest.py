"""A forest plot as SVG: differences with their intervals, one row per task, around the line of no difference.

`charts` explains why no plotting library is used. Like a line chart this is data, drawn for a given width: on a narrow
screen the name of a row stands above it. Models differ in colour and in their place within the row. A mark is hollow
where the difference is not significant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .charts import nice_ticks, text_width
from .readable import decimal

_PITCH = 16  # px from one mark of a row to the next
_BESIDE = 640  # px of width from which names stand left of their rows


@dataclass(frozen=True)
class Mark:
    """One difference: its value and the ends of its interval, in percentage points; significance; a description."""

    value: float
    low: float
    high: float
    significant: bool
    text: str


@dataclass(frozen=True)
class Forest:
    """The data of one plot: `rows` are names with one mark for each of `series` (None: no value)."""

    title: str
    series: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Mark | None]]]

    @property
    def description(self) -> str:
        """The plot in words, for screen readers."""
        return " ".join(
            f"{name}: " + "; ".join(mark.text for mark in marks if mark is not None) + "." for name, marks in self.rows
        )

    def svg(self, width: int, identity: str) -> Markup:
        """Draw the plot `width` px wide; `identity` must be unique on the page."""
        return _Drawing(self, width).svg(identity)


class _Drawing:
    """The layout of one plot: from percentage points to px, and from px to markup."""

    def __init__(self, plot: Forest, width: int) -> None:
        self.plot, self.width = plot, width
        ends = [end for _, marks in plot.rows for mark in marks if mark for end in (mark.low, mark.high, mark.value)]
        self.ticks = nice_ticks(min([0.0, *ends]), max([0.0, *ends]), 7 if width >= _BESIDE else 5)
        self.beside = width >= _BESIDE
        widest = max((text_width(name) for name, _ in plot.rows), default=0)
        self.left = min(widest + 16, width * 0.45) if self.beside else 10
        self.right = width - 14
        self.above = 0 if self.beside else 17
        self.legend = len(plot.series) > 1
        self.top = 8 + 20 * len(plot.series) * self.legend
        self.row = self.above + _PITCH * len(plot.series) + 8
        self.bottom = self.top + self.row * len(plot.rows)

    def x(self, points: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return round(self.left + (self.right - self.left) * (points - low) / (high - low), 1)

    def svg(self, identity: str) -> Markup:
        rows = [self._row(number, name, marks) for number, (name, marks) in enumerate(self.plot.rows)]
        inside = Markup("").join([self._legend(), self._axis(), *rows])
        return Markup(
            '<svg class="chart forest" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">'
            '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>{}</svg>'
        ).format(
            self.width,
            self.bottom + 40,
            identity,
            identity,
            identity,
            self.plot.title,
            identity,
            self.plot.description,
            inside,
        )

    def _axis(self) -> Markup:
        lines = [
            Markup(
                '<line class="grid{}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>'
            ).format(
                " base" if tick == 0 else "",
                self.x(tick),
                self.x(tick),
                self.top,
                self.bottom,
                self.x(tick),
                self.bottom + 16,
                f"+{decimal(tick)}" if tick > 0 else decimal(tick).replace("-", "−"),
            )
            for tick in self.ticks
        ]
        name = Markup('<text class="tick name" x="{}" y="{}" text-anchor="end">points</text>')
        return Markup("").join([*lines, name.format(self.right, self.bottom + 33)])

    def _row(self, number: int, name: str, marks: Sequence[Mark | None]) -> Markup:
        top = self.top + number * self.row
        middle = top + self.above + _PITCH * len(marks) / 2
        y = middle + 8 if self.beside else top + 13
        drawn = [
            Markup('<text class="key" x="{}" y="{}">{}</text>').format(0 if self.beside else 10, round(y, 1), name)
        ]
        for place, mark in enumerate(marks):
            if mark is not None:
                drawn.append(self._mark(mark, place, top + self.above + 4 + _PITCH * (place + 0.5)))
        return Markup("").join(drawn)

    def _mark(self, mark: Mark, series: int, y: float) -> Markup:
        return Markup(
            '<g><title>{}</title><line class="whisker s{}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<circle class="point s{}{}" cx="{}" cy="{}" r="4.5"/></g>'
        ).format(
            mark.text,
            series,
            self.x(mark.low),
            self.x(mark.high),
            round(y, 1),
            round(y, 1),
            series,
            "" if mark.significant else " hollow",
            self.x(mark.value),
            round(y, 1),
        )

    def _legend(self) -> Markup:
        return Markup("").join(
            Markup(
                '<circle class="point s{}" cx="8" cy="{}" r="4.5"/><text class="key" x="20" y="{}">{}</text>'
            ).format(n, 10 + 20 * n, 14 + 20 * n, name)
            for n, name in enumerate(self.plot.series if self.legend else ())
        )
