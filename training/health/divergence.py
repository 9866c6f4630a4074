"""Divergence: whether gradients are finite and the loss is stable, and when the run must go back.

The engine skips single steps whose gradient is not finite. If that persists, or the loss spikes for as long, the run
returns at its next log line to its last good commit and skips the samples since. Each step is judged by itself, by the
objectives' own losses at the weights of that step, so a schedule of weights is not a spike. The history is part of the
run's state, so a resumed run decides as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import fsum
from statistics import median
from typing import Annotated

from pydantic import BaseModel, Field, field_validator

_STEPS, _FEWEST = 100, 10
"""healthy steps whose losses are kept, and the number needed before a loss can be called a spike"""


class RecoveryConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When a run goes back to its last good commit automatically."""

    bad_steps: int = Field(
        10,
        gt=0,
        description="consecutive steps without a finite gradient, or with a loss spike, after which the run goes back "
        "to its last good commit and skips the samples since",
    )
    spike_factor: float | None = Field(
        3.0,
        gt=1,
        description="a loss above this multiple of the median of the last 100 healthy steps is a spike; null: none is",
    )
    max_rollbacks: int = Field(10, ge=0, description="rollbacks in the whole run, after which it gives up")


class Health(BaseModel, frozen=True, extra="forbid", strict=True):
    """The health of a run, from the steps of the current stage."""

    losses: dict[str, Annotated[tuple[float, ...], Field(strict=False)]] = Field(default_factory=dict)
    """of each objective, before weighting: those of the latest healthy steps"""
    bad_steps: int = 0
    """consecutive bad steps up to now; once there are too many, the run is ill until it goes back"""
    spiked: bool = False
    """whether a loss spiked since then: the weights may be damaged, which skipped steps cannot do"""
    healthy_step: int = 0
    """the last healthy step"""

    @field_validator("losses", mode="before")
    @classmethod
    def _of_each_objective(cls, value: object) -> object:
        return value if isinstance(value, dict) else {}  # of a commit from before they were kept by objective

    def after_step(
        self,
        config: RecoveryConfig,
        step: int,
        losses: Mapping[str, float],
        weights: Mapping[str, float],
        finite: bool,
    ) -> Health:
        """The health after a step with these losses, before weighting, and whether its gradient was finite."""
        spiked = finite and config.spike_factor is not None and self._spiked(config.spike_factor, losses, weights)
        if not finite or spiked or self.bad_steps >= config.bad_steps:
            return self.model_copy(update={"bad_steps": self.bad_steps + 1, "spiked": self.spiked or spiked})
        kept = {name: (*self.losses.get(name, ()), loss)[-_STEPS:] for name, loss in losses.items()}
        return Health(losses=kept, healthy_step=step)

    def _spiked(self, factor: float, losses: Mapping[str, float], weights: Mapping[str, float]) -> bool:
        """Whether the loss is `factor` times what it would be with every objective at its median, or more."""
        known = [name for name in losses if len(self.losses.get(name, ())) >= _FEWEST]
        usual = fsum(weights[name] * median(self.losses[name]) for name in known)
        return fsum(weights[name] * losses[name] for name in known) > factor * usual > 0
