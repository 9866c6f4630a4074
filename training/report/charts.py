"""Line charts as SVG: axes, ticks, a legend, and markers where the model grew or the run resumed.

Why not matplotlib, Vega-Lite or Plotly: a report is one file of about 60 KB that opens anywhere without a network, and
their charts need fonts or a library of megabytes, or have no text alternative.

A chart is data (`LineChart`) and is drawn for a given width, so that its text stays readable on wide and narrow
screens. Colours are CSS classes defined in page.css; lines also differ in their dashes, and every chart has a text
alternative for screen readers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .readable import compact, decimal, exact

MAX_POINTS = 400
FONT = 12  # px; page.css sets the same size

ChartPoint = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points with increasing x; y None: a gap. `chance`: a reference level to draw; `dots`: its points
    too."""

    name: str
    points: Sequence[ChartPoint]
    chance: float | None = None
    dots: bool = False

    @property
    def values(self) -> list[float]:
        """All y that are not None."""
        return [y for _, y in self.points if y is not None]


@dataclass(frozen=True)
class Marker:
    """A vertical line at `x`. `kind` is "growth" or "resume"."""

    x: float
    labels: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class LineChart:
    """The data of one chart. `x_end` is where the run will end, to show how far an unfinished run is."""

    title: str
    series: Sequence[Series]
    markers: Sequence[Marker] = ()
    x_end: float = 0.0
    y_format: Callable[[float], str] = decimal
    dots: bool = False
    labelled: bool = True

    @property
    def latest(self) -> str:
        """The last value of a chart with one line, for its heading; empty for several lines."""
        return self.y_format(self.series[0].values[-1]) if len(self.series) == 1 and self.series[0].values else ""

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        parts = []
        for series in self.series:
            seen = [(x, y) for x, y in series.points if y is not None]
            if not seen:
                continue
            (x0, first), (x1, last) = seen[0], seen[-1]
            text = f"{series.name}: {self.y_format(first)} at {exact(x0)} samples, {self.y_format(last)} at {exact(x1)}"
            low, high = min(y for _, y in seen), max(y for _, y in seen)
            text += f"; lowest {self.y_format(low)}, highest {self.y_format(high)}"
            parts.append(text + (f"; chance {self.y_format(series.chance)}" if series.chance is not None else "") + ".")
        words = {"growth": "The model grew", "resume": "The run resumed"}
        parts += [
            f"{words[m.kind]} at {exact(m.x)} samples" + (f": {', '.join(m.labels)}." if m.labels else ".")
            for m in self.markers
        ]
        return " ".join(parts)

    def svg(self, width: int, height: int, identity: str) -> Markup:
        """Draw the chart in a box of `width` x `height` px; `identity` must be unique on the page."""
        return _Drawing(self, width, height).svg(identity)


def downsample(points: Sequence[ChartPoint], limit: int = MAX_POINTS) -> list[ChartPoint]:
    """At most `limit` points that keep the extremes: the lowest and highest of each bucket, and both ends.

    A mean would hide a loss spike; this does not. A bucket without any value stays a gap.
    """
    if len(points) <= limit:
        return list(points)
    buckets = (limit - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for b in range(buckets):
        bucket = inner[len(inner) * b // buckets : len(inner) * (b + 1) // buckets]
        seen = [(x, y) for x, y in bucket if y is not None]
        if not seen:
            kept.append(bucket[0])
            continue
        low, high = min(seen, key=lambda p: p[1]), max(seen, key=lambda p: p[1])
        kept += sorted({low, high})
    return [*kept, points[-1]]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def text_width(text: str, font: float = FONT) -> float:
    """Estimated width of `text` in px, rather too large than too small."""
    return 0.61 * font * len(text)


def _short(tick: str) -> str:
    """A tick's text without trailing zeros: 10.0 k becomes 10 k."""
    return re.sub(r"\.(?!\d)", "", re.sub(r"(\.\d*?)0+(?!\d)", r"\1", tick))


class _Drawing:
    """The layout of one chart: from data to px, and from px to markup."""

    def __init__(self, chart: LineChart, width: int, height: int) -> None:
        self.chart, self.width, self.height = chart, width, height
        values = [v for s in chart.series for v in (*s.values, *([s.chance] if s.chance is not None else []))]
        low, high = min(values, default=0.0), max(values, default=1.0)
        self.y_ticks = nice_ticks(min(low, 0.0), high, 5)
        xs = [x for s in chart.series for x, _ in s.points]
        self.x_max = max([chart.x_end, *xs, *(m.x for m in chart.markers)]) or 1.0
        self.x_ticks = [t for t in nice_ticks(0.0, self.x_max, max(5, width // 110)) if t <= self.x_max * 1.001]
        self.legend, rows = self._legend()
        labels = max((len(m.labels) for m in chart.markers if m.kind == "growth"), default=0) if chart.labelled else 0
        self.top = 10 + 20 * rows + 15 * labels
        self.bottom = height - 38
        self.left = 14 + max(text_width(self._y_text(t)) for t in self.y_ticks)
        self.right = width - 14

    def x(self, value: float) -> float:
        return round(self.left + (self.right - self.left) * value / self.x_max, 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.bottom - (self.bottom - self.top) * (value - low) / (high - low), 1)

    def svg(self, identity: str) -> Markup:
        parts = [self._axes(), self._chances(), self._markers(), self._lines(), self.legend]
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t {}-d">'
            '<title id="{}-t">{}</title><desc id="{}-d">{}</desc>{}</svg>'
        ).format(
            self.width,
            self.height,
            identity,
            identity,
            identity,
            self.chart.title,
            identity,
            self.chart.description,
            Markup("").join(parts),
        )

    def _y_text(self, tick: float) -> str:
        return _short(self.chart.y_format(tick))

    def _axes(self) -> Markup:
        rows = [
            Markup(
                '<line class="grid{}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(
                " base" if n == 0 else "",
                round(self.left, 1),
                self.right,
                self.y(t),
                self.y(t),
                round(self.left - 7, 1),
                self.y(t) + 4,
                self._y_text(t),
            )
            for n, t in enumerate(self.y_ticks)
        ]
        columns = [
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                self.x(t), self.bottom + 17, "middle" if self.x(t) < self.right - 16 else "end", _short(compact(t))
            )
            for t in self.x_ticks
        ]
        name = Markup('<text class="tick name" x="{}" y="{}" text-anchor="end">samples seen</text>').format(
            self.right, self.bottom + 33
        )
        return Markup("").join([*rows, *columns, name])

    def _chances(self) -> Markup:
        return Markup("").join(
            Markup(
                '<line class="chance s{}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}: chance {}</title></line>'
            ).format(
                n,
                round(self.left, 1),
                self.right,
                self.y(s.chance),
                self.y(s.chance),
                s.name,
                self.chart.y_format(s.chance),
            )
            for n, s in enumerate(self.chart.series)
            if s.chance is not None
        )

    def _lines(self) -> Markup:
        drawn = []
        for n, series in enumerate(self.chart.series):
            points = downsample(series.points)
            path, pen_down = [], False
            for px, py in points:
                if py is not None:
                    path.append(f"{'L' if pen_down else 'M'}{self.x(px)} {self.y(py)}")
                pen_down = py is not None
            drawn.append(Markup('<path class="line s{}" d="{}"/>').format(n, "".join(path)))
            if self.chart.dots or series.dots or len(series.values) == 1:
                drawn += [
                    Markup(
                        '<circle class="dot s{}" cx="{}" cy="{}" r="3.5"><title>{}: {} at {} samples</title></circle>'
                    ).format(n, self.x(px), self.y(py), series.name, self.chart.y_format(py), exact(px))
                    for px, py in points
                    if py is not None
                ]
        return Markup("").join(drawn)

    def _markers(self) -> Markup:
        return Markup("").join(self._marker(marker) for marker in self.chart.markers)

    def _marker(self, marker: Marker) -> Markup:
        x = self.x(marker.x)
        words = {"growth": "grown", "resume": "resumed"}[marker.kind]
        full = f"{words} at {exact(marker.x)} samples" + (f": {', '.join(marker.labels)}" if marker.labels else "")
        line = Markup('<line class="mark {}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>').format(
            marker.kind, x, x, self.top - (4 if marker.kind == "growth" else 0), self.bottom, full
        )
        if marker.kind == "resume":
            return line + Markup('<path class="mark resume flag" d="M{} {}l4 7h-8z"/>').format(x, self.bottom - 1)
        if not self.chart.labelled:
            return line
        labels = Markup("")
        widest = max((text_width(label) for label in marker.labels), default=0)
        half = widest / 2
        centre = min(max(x, self.left + half), self.right - half)
        for n, label in enumerate(marker.labels):
            labels += Markup('<text class="growth" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                round(centre, 1), self.top - 10 - 15 * (len(marker.labels) - 1 - n), label
            )
        return line + labels

    def _legend(self) -> tuple[Markup, int]:
        """The legend with each line's last value, wrapped to the width, and its number of rows; empty for one line."""
        if len(self.chart.series) == 1 and self.chart.series[0].chance is None:
            return Markup(""), 0
        x, row, parts = 0.0, 0, []
        for n, series in enumerate(self.chart.series):
            last = f" {self.chart.y_format(series.values[-1])}" if series.values else ""
            width = 30 + text_width(series.name + last) + 14
            if x and x + width > self.width:
                x, row = 0.0, row + 1
            y = 14 + 20 * row
            parts.append(
                Markup(
                    '<line class="line s{}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                    '<text class="key" x="{}" y="{}">{}<tspan class="last">{}</tspan></text>'
                ).format(n, round(x, 1), round(x + 22, 1), y - 4, y - 4, round(x + 29, 1), y, series.name, last)
            )
            x += width
        if any(s.chance is not None for s in self.chart.series):
            text = "chance"
            if x and x + 30 + text_width(text) > self.width:
                x, row = 0.0, row + 1
            y = 14 + 20 * row
            parts.append(
                Markup(
                    '<line class="chance" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                    '<text class="key" x="{}" y="{}">chance</text>'
                ).format(round(x, 1), round(x + 22, 1), y - 4, y - 4, round(x + 29, 1), y)
            )
        return Markup("").join(parts), row + 1
