"""Charts, ticks and figures of the report, against counting."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.tests.support.made_up_run import (
    BEGAN,
)
from treering.training.report import readable
from treering.training.report.charts import LineChart, Marker, Series, downsample, nice_ticks


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=1500), st.integers(10, 400))
def test_downsampling_keeps_ends_extremes_and_order(values: list[float | None], limit: int) -> None:
    points = [(float(n), v) for n, v in enumerate(values)]
    kept = downsample(points, limit)
    assert len(kept) <= max(limit, 0)
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    seen = [v for v in values if v is not None]
    if seen:
        assert {min(seen), max(seen)} <= {y for _, y in kept}
        assert kept[0] == points[0]
        assert kept[-1] == points[-1]


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 9))
def test_ticks_are_round_few_and_enclose(low: float, length: float, count: int) -> None:
    high = low + length
    if high - low < abs(low) * 1e-9:
        return
    ticks = nice_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    slack = step * 1e-6
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= count + 2
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert any(math.isclose(mantissa, m, rel_tol=1e-5) for m in (1, 2, 2.5, 5))


def test_a_chart_draws_its_points_where_they_belong() -> None:
    chart = LineChart(
        "t",
        [Series("a", [(0, 0.0), (50, 10.0), (100, 5.0)], chance=5.0)],
        [Marker(50, ("w 1 → 2",), "growth")],
        x_end=100,
    )
    text = str(chart.svg(400, 230, "c"))
    path = re.search(r'class="line s0" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', text)
    assert path
    x0, y0, x1, y1, x2, y2 = map(float, path.groups())
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.11)
    assert math.isclose(y0 - y1, 2 * (y0 - y2), abs_tol=0.11)
    assert y1 < y2 < y0  # up is less in SVG
    chance = re.search(r'class="chance s0" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)"', text)
    assert chance
    assert float(chance[1]) == y2
    mark = re.search(r'class="mark growth" x1="([\d.]+)"', text)
    assert mark
    assert float(mark[1]) == x1
    assert "a: 0 at 0 samples, 5 at 100; lowest 0, highest 10; chance 5." in text


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (readable.compact, 14_091_264, "14.1 M"),
        (readable.compact, 340_224, "340 k"),
        (readable.compact, 999_700, "1.00 M"),
        (readable.compact, 834, "834"),
        (readable.compact, 0, "0"),
        (readable.compact, 1_240_000_000, "1.24 B"),
        (readable.exact, 60416, "60,416"),
        (readable.exact, None, "–"),
        (readable.percent, 0.613, "61.3%"),
        (readable.percent, 0.0016, "0.16%"),
        (readable.percent, 0.0, "0.0%"),
        (readable.percent, None, "–"),
        (readable.duration_text, 200, "3 min 20 s"),
        (readable.duration_text, 3840, "1 h 04 min"),
        (readable.duration_text, 0.35, "0.3 s"),
        (readable.duration_text, 0.004, "0.004 s"),
        (readable.duration_text, 59.6, "1 min 00 s"),
        (readable.duration_text, 9.97, "10 s"),
        (readable.duration_text, 183_600, "2 d 3 h"),
        (readable.decimal, 1e-5, "1e-5"),
        (readable.decimal, 3.21449, "3.214"),
        (readable.decimal, None, "–"),
        (readable.decimal, float("nan"), "nan"),
        (readable.bytes_text, 170_000_000, "170 MB"),
        (readable.flops, 7.3e13, "73.0 TFLOP"),
        (readable.moment, BEGAN, "22 November 2026, 16:00 UTC"),
        (readable.printable, "a\x1b[2Jb\x00\u202e\n\U0001f469\u200d\U0001f692", "a�[2Jb��\n\U0001f469\u200d\U0001f692"),
    ],
)
def test_numbers_as_people_read_them(form: Any, value: Any, text: str) -> None:
    assert form(value) == text
