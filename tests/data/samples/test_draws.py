"""Draws against splitmix64 written out on plain integers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treering.data.order import stable_hash
from treering.data.samples.draws import Draws, draw_rows

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


@given(st.integers(0, 1 << 70), st.lists(st.integers(0, (1 << 63) - 2), min_size=1, max_size=5), st.integers(1, 9))
def test_rows_are_splitmix64(seed: int, positions: list[int], most: int) -> None:
    found = draw_rows(seed, "crop", np.array(positions), most)
    for position, row in zip(positions, found, strict=True):
        state = mixed((stable_hash("draws", seed, "crop") + (position + 1) * GOLDEN) & MASK)
        expected = [(mixed((state + i * GOLDEN) & MASK) >> 11) / 2**53 for i in range(1, most + 1)]
        assert row == expected
        assert all(0 <= value < 1 for value in row)


def test_rows_differ_and_fill_the_range() -> None:
    found = np.array(draw_rows(0, "crop", np.arange(5000), 8))
    assert np.unique(found).size == found.size
    assert np.abs(found.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(found.T) - np.eye(8)).max() < 0.06
    for other in (draw_rows(1, "crop", np.arange(5000), 8), draw_rows(0, "flip", np.arange(5000), 8)):
        assert not np.isin(other, found).any()


def test_draws_are_taken_in_turn() -> None:
    draws = Draws([0.25, 0.5, 0.0, 1 - 2**-53])
    assert [draws.random(), draws.uniform(2, 4), draws.integers(7), draws.integers(7)] == [0.25, 3.0, 0, 6]
    values = [Draws([i / 1000]).integers(10) for i in range(1000)]
    assert [values.count(i) for i in range(10)] == [100] * 10
    assert all(a <= b for a, b in pairwise(values))
