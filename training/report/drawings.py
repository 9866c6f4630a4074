"""Other SVG drawings of the page: the timeline, the towers in each stage, the rings next to the name, small bars.

`charts` explains why no plotting library is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .readable import duration_text


@dataclass(frozen=True)
class Span:
    """A period of one kind of work; times in seconds since the run began.

    A period of training may contain an evaluation or a commit, which are drawn over it and not counted in `seconds`.
    `data_wait` is the fraction of `seconds` spent waiting for data.
    """

    start: float
    end: float
    kind: str
    label: str
    seconds: float
    data_wait: float = 0.0


def timeline(spans: Sequence[Span], breaks: Sequence[float], total: float, width: int, identity: str) -> Markup:
    """One bar over the run's time, with a block per span; waiting for data fills a training block from below.

    `breaks` are the times between two attempts, in seconds, like `total`. Short spans are at least 2 px wide, so that
    they stay visible.
    """
    height, top = 40, 4
    spans = _merged(spans, total / 300)
    scale = width / total if total > 0 else 0.0
    parts = [Markup('<rect class="t-rest" x="0" y="{}" width="{}" height="{}"/>').format(top, width, height)]
    for span in sorted(spans, key=lambda s: s.kind != "training"):
        x, w = span.start * scale, max((span.end - span.start) * scale, 0.4 if span.kind == "training" else 2.0)
        x = min(x, width - w)
        parts.append(
            _block(
                span.kind,
                x,
                top,
                w,
                height,
                f"{span.label}: {duration_text(span.seconds)}, from {duration_text(span.start)}",
            )
        )
        if span.kind == "training" and span.data_wait > 0:
            h = height * min(span.data_wait, 1.0)
            parts.append(_block("data", x, top + height - h, w, h, "waiting for data"))
    parts += [
        Markup('<line class="t-break" x1="{}" x2="{}" y1="0" y2="{}"/>').format(x, x, height + 8)
        for x in (round(b * scale, 1) for b in breaks)
    ]
    base = top + height + 18
    ends = Markup(
        '<text class="tick" x="0" y="{}">start</text><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(base, width, base, duration_text(total))
    return Markup(
        '<svg class="chart timeline" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-t">'
        '<title id="{}-t">Where the time went, from start to end; the table below gives the sums</title>{}{}</svg>'
    ).format(width, base + 6, identity, identity, Markup("").join(parts), ends)


def _merged(spans: Sequence[Span], least: float) -> list[Span]:
    """The spans, with neighbouring training spans merged until they last `least` seconds, to limit the blocks."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        near = last is not None and span.start - last.end < least / 4
        if last is not None and near and last.kind == span.kind == "training" and last.end - last.start < least:
            seconds = last.seconds + span.seconds
            waited = (last.data_wait * last.seconds + span.data_wait * span.seconds) / (seconds or 1.0)
            merged[-1] = Span(last.start, span.end, span.kind, span.label, seconds, waited)
        else:
            merged.append(span)
    return merged


def _block(kind: str, x: float, y: float, width: float, height: float, title: str) -> Markup:
    return Markup('<rect class="t-{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        kind, round(x, 1), round(y, 1), round(width, 1), round(height, 1), title
    )


def towers(shapes: Sequence[Mapping[str, float]], names: Sequence[str], identity: str) -> Markup:
    """The model in each stage as stacks of blocks, as wide as their channels; blocks from the last growth are filled.

    `shapes` gives `image.depth`, `image.width`, `text.depth`, ... of each stage. If a stack has more than 24 blocks,
    one drawn block stands for several.
    """
    kinds = list(dict.fromkeys(path.removesuffix(".depth") for s in shapes for path in s if path.endswith(".depth")))
    deepest = max((s.get(f"{k}.depth", 0) for s in shapes for k in kinds), default=1)
    widest = max((s.get(f"{k}.width", 0) for s in shapes for k in kinds), default=1) or 1
    per_block = max(1.0, deepest / 24)
    column, pitch, group = 58, 10, 58 * len(kinds) + 34
    height = int(pitch * deepest / per_block) + 46
    parts = []
    for s, shape in enumerate(shapes):
        for k, kind in enumerate(kinds):
            depth, previous = shape.get(f"{kind}.depth", 0), (shapes[s - 1] if s else shape).get(f"{kind}.depth", 0)
            channels = shape.get(f"{kind}.width") or shape.get("text.width") or widest
            w = 14 + 32 * channels / widest
            x = s * group + k * column + (column - w) / 2
            for n in range(round(depth / per_block)):
                fresh = n >= round(previous / per_block) or channels > (
                    (shapes[s - 1] if s else shape).get(f"{kind}.width") or channels
                )
                parts.append(
                    Markup('<rect class="block{}" x="{}" y="{}" width="{}" height="7" rx="1.5"/>').format(
                        " new" if fresh else "", round(x, 1), height - 42 - pitch * n, round(w, 1)
                    )
                )
            middle = s * group + k * column + column / 2
            parts.append(
                Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                    middle, height - 20, kind.rpartition(".")[2]
                )
            )
        parts.append(
            Markup('<text class="key" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                s * group + column * len(kinds) / 2, height - 3, names[s]
            )
        )
    total = group * len(shapes) - 34
    words = "; ".join(
        f"{name}: "
        + ", ".join(f"{kind} {shape[f'{kind}.depth']:g} blocks" for kind in kinds if f"{kind}.depth" in shape)
        for name, shape in zip(names, shapes, strict=True)
    )
    return Markup(
        '<svg class="chart towers{}" viewBox="0 0 {} {}" width="{}" role="img" aria-labelledby="{}-t">'
        '<title id="{}-t">The model in each stage. {}.</title>{}</svg>'
    ).format(
        " many" if len(shapes) > 2 else "", total, height, total, identity, identity, words, Markup("").join(parts)
    )


def rings(samples: Sequence[float]) -> Markup:
    """A decoration: a cut through a trunk, with a ring per stage as thick as the stage's part of `samples`."""
    done, circles = 0.0, Markup("")
    total = sum(samples) or 1.0
    for n, count in enumerate(samples):
        done += count
        circles = (
            Markup('<circle class="ring r{}" cx="24" cy="24" r="{}"/>').format(n % 2, round(5 + 17 * done / total, 1))
            + circles
        )
    return Markup(
        '<svg class="rings" viewBox="0 0 48 48" aria-hidden="true">{}<circle class="pith" cx="24" cy="24" r="2"/></svg>'
    ).format(circles)


def bar(fraction: float, mark: float | None = None) -> Markup:
    """A fraction between 0 and 1 as a bar, with a tick at `mark`; the page shows the number next to it."""
    tick = (
        Markup('<rect class="bar-mark" x="{}" y="0" width="0.8" height="10"/>').format(round(100 * mark, 2))
        if mark is not None
        else ""
    )
    return Markup(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="bar-track" x="0" y="2" width="100" height="6"/>'
        '<rect class="bar-fill" x="0" y="2" width="{}" height="6"/>{}</svg>'
    ).format(round(100 * min(max(fraction, 0.0), 1.0), 2), tick)
