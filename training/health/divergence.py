"""Divergence: whether gradients are finite and the loss is stable, and when the run must go back.

The engine skips single steps whose gradient is not finite. Log lines decide whether that persists: after some
consecutive bad steps the run returns to its last good commit and skips the samples since. The history is part of the
run's state, so a resumed run decides as the uninterrupted one does.
"""

from __future__ import annotations

from math import isfinite
from statistics import median

from pydantic import BaseModel, Field

_LINES, _FEWEST = 20, 10
"""log lines whose losses are kept, and the number needed before a loss can be called a spike"""


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
        description="a loss above this multiple of the median of the last 20 log lines is a spike; null: none is",
    )
    max_rollbacks: int = Field(
        3, ge=0, description="rollbacks without a good step in between, after which the run gives up"
    )


class Health(BaseModel, frozen=True, extra="forbid", strict=True):
    """The health of a run, from the log lines of the current stage."""

    losses: tuple[float, ...] = Field((), strict=False)
    """losses of the latest healthy log lines"""
    bad_steps: int = 0
    """consecutive bad steps up to now"""
    spiked: bool = False
    """whether a loss spiked since then: the weights may be damaged, which skipped steps cannot do"""
    healthy_step: int = 0
    """the step of the last healthy log line"""

    def after_line(self, config: RecoveryConfig, step: int, steps: int, skipped: int, loss: float) -> Health:
        """The health after a log line at `step` over the last `steps` steps, of which `skipped` had no finite
        gradient."""
        usual = median(self.losses) if len(self.losses) >= _FEWEST else None
        factor = config.spike_factor
        spiked = usual is not None and factor is not None and isfinite(loss) and loss > factor * usual > 0
        if spiked or skipped == steps:
            return self.model_copy(update={"bad_steps": self.bad_steps + steps, "spiked": self.spiked or spiked})
        losses = (*self.losses, loss)[-_LINES:] if isfinite(loss) else self.losses
        return Health(losses=losses, healthy_step=step)
