"""Health: whether a run's gradients are finite and its loss where it was, and when it should rather go back.

Single steps whose gradient is not finite are skipped by the engine. What is judged here, at log lines, is whether it
stays that way: after some steps in a row the run returns to its last good commit and passes over the samples since.
What is known of the past is part of the run's state, so a resumed run judges as the uninterrupted one does.
"""

from __future__ import annotations

from math import isfinite
from statistics import median

from pydantic import BaseModel, Field

_LINES, _FEWEST = 20, 10
"""log lines whose losses are remembered, and those that are needed to call a loss high"""


class RecoveryConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When a run goes back to its last commit by itself."""

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
    """What the log lines of a stage said up to now."""

    losses: tuple[float, ...] = Field((), strict=False)
    """of the latest lines that were well"""
    ill: int = 0
    """steps since the last line that was well, if the latest is not"""
    leapt: bool = False
    """whether any line since then had a loss that leapt: the weights may be spoilt, which skipped steps do not do"""
    well: int = 0
    """the step of the last line that was well"""

    def after_line(self, config: RecoveryConfig, step: int, steps: int, skipped: int, loss: float) -> Health:
        """After a log line at `step` about the last `steps` steps, of which `skipped` had no finite gradient."""
        usual = median(self.losses) if len(self.losses) >= _FEWEST else None
        factor = config.spike_factor
        leapt = usual is not None and factor is not None and isfinite(loss) and loss > factor * usual > 0
        if leapt or skipped == steps:
            return self.model_copy(update={"ill": self.ill + steps, "leapt": self.leapt or leapt})
        losses = (*self.losses, loss)[-_LINES:] if isfinite(loss) else self.losses
        return Health(losses=losses, well=step)
