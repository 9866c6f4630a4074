"""Random draws for the samples of a batch, all at once.

A numpy Generator for each sample (order.stream) costs as much as a tenth of decoding a photo. Here the draws of a
position are a row of a table that is computed for many positions at a time: a pure function of (seed, name, position,
place in the row), the same on every machine and in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..order import stable_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """One position's draws, taken one after another; a small part of numpy's Generator."""

    __slots__ = ("_next", "_row")

    def __init__(self, row: list[float]) -> None:
        self._row, self._next = row, 0

    def random(self) -> float:
        """From 0 to 1, without 1."""
        self._next += 1
        return self._row[self._next - 1]

    def uniform(self, low: float, high: float) -> float:
        """From low to high."""
        return low + (high - low) * self.random()

    def integers(self, count: int) -> int:
        """One of range(count), each as likely to within count / 2^53."""
        return int(self.random() * count)


def draw_rows(seed: int, name: str, positions: NDArray[np.int64], most: int) -> list[list[float]]:
    """For each position the row of its first `most` draws, from 0 to 1 without 1.

    Row `p` is what a splitmix64 generator (Steele, Lea and Flood 2014) yields whose seed is the hash of p.
    """
    key = np.uint64(stable_hash("draws", seed, name))
    states = _mixed(key + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    numbers = _mixed(states[:, None] + np.arange(1, most + 1, dtype=np.uint64) * _GOLDEN)
    return ((numbers >> np.uint64(11)) * 2.0**-53).tolist()


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
