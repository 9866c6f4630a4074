"""What a run is at a step edge, declared once: commits save it, resumes restore it, tests compare it.

Tensors (weights and moments) travel by logical name beside it. Random streams need no state: every draw is a function
of the seed, the stream's name and the position in the run.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, Field

from .health.divergence import Health


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names what happened, where, and the remedy."""


class RolledBack(Exception):
    """A run leaves for the commit before things went wrong; who starts it again there gives it this."""

    def __init__(self, cursor: int, times: int, reason: str) -> None:
        """`cursor` is where the data goes on; it is the `times`-th rollback without a good step between."""
        super().__init__(reason)
        self.cursor, self.times, self.reason = cursor, times, reason


class Decision(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a run decided about one of its stages where the recipe left it open."""

    stage: int
    samples: int | None = None
    """the samples after which the stage ended; what was left of its budget is the next one's"""
    grow: dict[str, int | float] | None = None
    """the sizes that a search chose for it"""


class Event(BaseModel, frozen=True, extra="forbid", strict=True):
    """One line of the lineage."""

    event: str
    step: int
    samples: int
    time: float = Field(default_factory=time.time)
    world: int = 1
    detail: dict[str, Any] = Field(default_factory=dict)


class RunState(BaseModel, frozen=True, extra="forbid", strict=True):
    """The counters of a run. `cursor` is the position in the data order, in global batches."""

    step: int = 0
    """optimizer steps taken, skipped ones included"""
    samples: int = 0
    """samples trained on: those that a rollback passed over do not count"""
    stage: int = 0
    """the stage whose model shape the tensors have"""
    applied: int = 0
    """steps whose gradient was applied: the optimizer's own count"""
    skipped: int = 0
    """steps whose gradient was not finite"""
    multipliers: dict[str, float] = Field(default_factory=dict)
    """by parameter name, the factor on its learning rate that growth left; 1 where none is given"""
    objectives: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """by objective name, the state of those that have one"""
    flops: float = 0.0
    """floating-point operations spent on training so far"""
    seconds: float = 0.0
    """wall-clock time of all attempts so far"""
    decisions: tuple[Decision, ...] = Field((), strict=False)
    """what the recipe left open, as far as it is decided"""
    window: tuple[tuple[float, float], ...] = Field((), strict=False)
    """loss and mean caption length of each step since the stage's rule last measured a slope"""
    attempt: int = 0
    """how many times the run was started or resumed"""
    health: Health = Health()
    """what the log lines of this stage said"""
    lineage: tuple[Event, ...] = Field((), strict=False)
    """every start, resume, rollback and growth since the first step"""

    @property
    def cursor(self) -> int:
        """The number of the global batch that comes next: the step, and what rollbacks passed over."""
        return self.step + self.passed()

    def passed(self, before: int | None = None) -> int:
        """Global batches that rollbacks passed over, of those up to now or of those at steps before `before`."""
        return sum(
            event.detail["batches"]
            for event in self.lineage
            if event.event == "rollback" and (before is None or event.step < before)
        )
