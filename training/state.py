"""What a run is at a step edge, declared once: commits save it, resumes restore it, tests compare it.

Tensors (weights and moments) travel by logical name beside it. Random streams need no state: every draw is a function
of the seed, the stream's name and the position in the run.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, Field


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names what happened, where, and the remedy."""


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
    """The counters of a run. `step * batch` is the cursor: the position in the data order."""

    step: int = 0
    """optimizer steps taken, skipped ones included"""
    samples: int = 0
    """samples seen: the cursor"""
    stage: int = 0
    """the stage whose model shape the tensors have"""
    applied: int = 0
    """steps whose gradient was applied: the optimizer's own count"""
    skipped: int = 0
    """steps whose gradient was not finite"""
    multipliers: dict[str, float] = Field(default_factory=dict)
    """by parameter name, the factor on its learning rate that growth left; 1 where none is given"""
    flops: float = 0.0
    """floating-point operations spent on training so far"""
    seconds: float = 0.0
    """wall-clock time of all lives so far"""
    decisions: tuple[Decision, ...] = Field((), strict=False)
    """what the recipe left open, as far as it is decided"""
    window: tuple[tuple[float, float], ...] = Field((), strict=False)
    """loss and mean caption length of each step since the stage's rule last measured a slope"""
    life: int = 0
    """how many times the run was started or resumed"""
    lineage: tuple[Event, ...] = Field((), strict=False)
    """every start, resume and growth since the first step"""
