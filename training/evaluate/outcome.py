"""What an evaluation found: scores with their chance levels and intervals, and what each query contributed to them.

Most scores are means over queries (pictures, captions, pairs). Keeping the values of the queries makes the interval of
a score, and lets two models be compared query by query; they stay in memory and out of the run's records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .reliability import interval


@dataclass
class Evaluation:
    """What an evaluation found; rates are fractions from 0 to 1."""

    scores: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """captions of a retrieval, classes of a built-in task, samples of a suite"""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% bootstrap intervals of scores that have one"""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    """ledger entries of evaluation samples that could not be used"""
    queries: dict[str, Tensor] = field(default_factory=dict)
    """of scores that are means: bool or float [n], what each query contributed"""
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    """of the same scores: what each query is called"""
    points: tuple[Tensor, list[str]] | None = None
    """float [2 k, e], unit rows: of k pairs the pictures, then their first captions; and what each is"""

    def add(self, name: str, value_n: Tensor, names: Sequence[str], chance: float | None = None) -> None:
        """A score that is the mean of what queries contributed."""
        self.put(name, value_n.double().mean().item(), interval(value_n), chance)
        self.queries[name], self.names[name] = value_n, names

    def put(
        self, name: str, score: float, within: tuple[float, float] | None = None, chance: float | None = None
    ) -> None:
        """A score that is no mean."""
        self.scores[name] = score
        if within is not None:
            self.intervals[name] = within
        if chance is not None:
            self.chance[name] = chance

    def json(self) -> dict[str, Any]:
        """As a plain object, without the queries."""
        kept = ("scores", "chance", "sizes", "intervals", "examples", "bad")
        return {name: getattr(self, name) for name in kept}
