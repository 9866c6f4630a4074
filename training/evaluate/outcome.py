"""The result of an evaluation: scores with chance levels and intervals, and the value of each query.

Most scores are means over queries (pictures, captions, pairs). The values of the queries give a score its interval and
let two models be compared query by query. They stay in memory and are not written to the run's records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import fsum, isfinite
from typing import Any

from torch import Tensor

from .reliability import interval


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a run on samples that it does not train on."""

    losses: dict[str, float]
    """each objective, before weighting"""
    weights: dict[str, float]
    samples: int
    batch: int
    """pairs in a batch: those of the recipe, or all samples where there are fewer"""
    data: str
    """where the samples come from, as it is shown"""
    without: list[str]
    """objectives of the run that cannot be computed on these samples"""

    @property
    def loss(self) -> float:
        """The weighted sum."""
        return fsum(weight * self.losses[name] for name, weight in self.weights.items())

    def json(self) -> dict[str, Any]:
        """As a plain object, with None for what is not finite."""
        losses = {"loss": self.loss, **self.losses}
        loss, *each = (value if isfinite(value) else None for value in losses.values())
        return {**asdict(self), "loss": loss, "losses": dict(zip(self.losses, each, strict=True))}


@dataclass
class Evaluation:
    """The result of an evaluation; rates are fractions from 0 to 1."""

    scores: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """number of captions (retrieval), of pictures (retrieval/text_to_image), of classes (built-in zero-shot task) or of
    samples (other suites)"""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95% intervals, for scores that have one"""
    held_out: HeldOutLoss | None = None
    """None if it was not asked for or cannot be computed"""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    undefined: list[str] = field(default_factory=list)
    """scores that are not finite on this data or with this model; they are not among `scores`"""
    notes: list[str] = field(default_factory=list)
    """sentences for the user about what these figures count"""
    data: dict[str, str] = field(default_factory=dict)
    """by suite: what it was evaluated on, as it is shown"""
    contents: dict[str, str] = field(default_factory=dict)
    """what identifies the samples of each set, by its URL"""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """ledger entries of evaluation samples that could not be used"""
    queries: dict[str, Tensor] = field(default_factory=dict)
    """for scores that are means: the value of each query, bool or float [n]"""
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    """for the same scores: the name of each query"""
    groups: dict[str, Tensor] = field(default_factory=dict)
    """for those whose queries are not independent (several captions of one picture): the group of each query, int64"""
    points: tuple[Tensor, list[str]] | None = None
    """float [2 k, e], unit rows: the pictures of k pairs, then their first captions; and a description of each row"""

    def add(
        self,
        name: str,
        value_n: Tensor,
        names: Sequence[str],
        chance: float | None = None,
        group_n: Tensor | None = None,
    ) -> None:
        """Add a score that is the mean of its queries' values; those of equal `group_n` are not independent."""
        score, several = value_n.double().mean().item(), group_n is not None and len(group_n.unique()) < len(group_n)
        groups = group_n if several else None
        self.put(name, score, interval(value_n, group_n=groups) if isfinite(score) else None, chance)
        if name in self.scores:
            self.queries[name], self.names[name] = value_n, names
            if groups is not None:
                self.groups[name] = groups

    def put(
        self, name: str, score: float, within: tuple[float, float] | None = None, chance: float | None = None
    ) -> None:
        """Add a score that is not a mean over queries. One that is not finite is noted and left out."""
        if not isfinite(score):
            self.undefined.append(name)
            self.notes.append(f"{name} is {score} here and is left out: it has no value on this data with this model")
            return
        self.scores[name] = score
        if within is not None:
            self.intervals[name] = within
        if chance is not None:
            self.chance[name] = chance

    def json(self) -> dict[str, Any]:
        """As a plain object, without the queries."""
        kept = ("scores", "chance", "sizes", "intervals", "data", "notes", "examples", "bad")
        loss = {"held_out": self.held_out.json()} if self.held_out else {}
        return {name: getattr(self, name) for name in kept} | loss
