"""A snapshot: everything that one commit holds, as it is at a step edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...models.spec import ModelSpec
from ..engines.layout import Layout
from ..state import RunState
from ..world import World


def commit_name(step: int, attempt: int) -> str:
    """What the commit of an attempt at a step is called."""
    return f"step-{step:012d}-attempt-{attempt:04d}"


@dataclass(frozen=True)
class Snapshot:
    """What this rank has of a run's state."""

    spec: ModelSpec
    state: RunState
    recipe: Mapping[str, Any]
    """the whole recipe as plain data"""
    tensors: Mapping[str, Tensor]
    """the live tensors that this rank holds, by `kind/name`"""
    layout: Layout | None = None
    """the flat range of each whole tensor that this rank holds; None: all of it"""
    copies: World | None = None
    """the ranks that hold the same tensors; None: all ranks if there is no layout, otherwise only this one"""
    reason: str = "interval"
    """why the commit is made: interval, growth, signal, end or import"""
    scores: Mapping[str, float] = field(default_factory=dict)
    """of an evaluation at this very step"""

    @property
    def name(self) -> str:
        """What the commit is called: unique by step and attempt."""
        return commit_name(self.state.step, self.state.attempt)
