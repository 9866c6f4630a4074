"""The state of a run at a step edge, declared once: commits save it, resumes restore it, tests compare it.

Tensors (weights and moments) are saved separately, by logical name. Random streams need no state: every draw is a
function of the seed, the stream's name and the position in the run.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, Field

from ..data.identity import SourceIdentity
from .health.divergence import Health


class TrainingError(RuntimeError):
    """A run that cannot continue; the message names what happened, where, and the remedy."""


class RolledBack(Exception):
    """Raised to restart a run from the last good commit; passed to the restarted run."""

    def __init__(self, cursor: int, times: int, reason: str) -> None:
        """`cursor` is the position at which the data continues; `times` counts the rollbacks of the run."""
        super().__init__(reason)
        self.cursor, self.times, self.reason = cursor, times, reason


class Decision(BaseModel, frozen=True, extra="forbid", strict=True):
    """A decision about a stage that the recipe leaves to the run."""

    stage: int
    samples: int | None = None
    """samples after which the stage ended early; the rest of its budget goes to the next stage"""
    grow: dict[str, int | float] | None = None
    """sizes that a search chose for it"""


class Trial(BaseModel, frozen=True, extra="forbid", strict=True):
    """One candidate of a search and its result."""

    sizes: dict[str, int | float]
    """the sizes that change"""
    parameters: int
    flops_per_sample: float
    loss: float | None
    """None if a loss was not finite"""
    spent: float
    """FLOPs of the trial"""
    steps: int
    """steps that it was trained for"""


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
    """samples trained on, without those that a rollback skipped"""
    stage: int = 0
    """the stage whose model shape the tensors have"""
    applied: int = 0
    """steps whose gradient was applied: the optimizer's own count"""
    skipped: int = 0
    """steps whose gradient was not finite"""
    multipliers: dict[str, float] = Field(default_factory=dict)
    """factors on the learning rate that growth left, by parameter name; 1 for the others"""
    data: tuple[SourceIdentity, ...] = Field((), strict=False)
    """what identifies the samples of each source of the recipe; empty in commits of earlier releases"""
    tokenizer: str = ""
    """what identifies the tokenizer, likewise"""
    evaluated: dict[str, str] = Field(default_factory=dict)
    """what identifies the samples of each evaluation set, by its URL, at its latest evaluation"""
    objectives: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """states of the objectives that have one, by name"""
    flops: float = 0.0
    """floating-point operations spent on training so far"""
    seconds: float = 0.0
    """wall-clock time of all attempts so far"""
    decisions: tuple[Decision, ...] = Field((), strict=False)
    """what the run has decided so far where the recipe leaves it open"""
    trials: tuple[Trial, ...] = Field((), strict=False)
    """finished trials of the search that the run is in the middle of"""
    window: tuple[tuple[float, float], ...] = Field((), strict=False)
    """loss and mean caption length of each step since the stage's rule last measured a slope"""
    attempt: int = 0
    """how many times the run was started or resumed"""
    health: Health = Health()
    """health of the run, from the steps of this stage"""
    best: float | None = None
    """the best value so far of the score that `checkpoint.keep_best` names"""
    lineage: tuple[Event, ...] = Field((), strict=False)
    """every start, resume, rollback and growth since the first step"""

    @property
    def cursor(self) -> int:
        """The number of the next global batch: the step plus the batches that rollbacks skipped."""
        return self.step + self.skipped_batches()

    def skipped_batches(self, before: int | None = None) -> int:
        """Global batches that rollbacks skipped up to now, or at steps before `before`."""
        return sum(
            event.detail["batches"]
            for event in self.lineage
            if event.event == "rollback" and (before is None or event.step < before)
        )
