"""Random draws for the samples of a batch, computed together.

A separate numpy Generator per sample (order.stream) costs a tenth of decoding a photo. Here the draws of a position are
one row of a table computed for many positions at once: a pure function of (seed, name, position, column), the same on
every machine and in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..order import stable_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """One position's draws, used one after another; a subset of numpy's Generator interface."""

    __slots__ = ("_next", "_row")

    def __init__(self, row: list[float]) -> None:
        self._row, self._next = row, 0

    def random(self) -> float:
        """Uniform in [0, 1)."""
        self._next += 1
        return self._row[self._next - 1]

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.random()

    def integers(self, count: int) -> int:
        """One of range(count), uniform to within count / 2^53."""
        return int(self.random() * count)


def draw_rows(seed: int, name: str, positions: NDArray[np.int64], most: int) -> list[list[float]]:
    """The first `most` draws of each position, uniform in [0, 1): one list per position.

    The row of position p is the output of a splitmix64 generator (Steele, Lea and Flood 2014) seeded with a hash of p.
    """
    key = np.uint64(stable_hash("draws", seed, name))
    states = _mix(key + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    numbers = _mix(states[:, None] + np.arange(1, most + 1, dtype=np.uint64) * _GOLDEN)
    return ((numbers >> np.uint64(11)) * 2.0**-53).tolist()


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser, elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
