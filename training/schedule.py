"""The learning-rate schedule: warm up, stay, decay (WSD), as a pure function of samples seen.

A plateau in the middle is what growth wants: growth points sit on it, and the cool-down happens once, at the end. The
schedule knows nothing of stages or model shapes, so growth cannot break it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ScheduleConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Shape of the learning rate over a run: warm-up, stable, decay (WSD)."""

    kind: Literal["wsd"] = Field(
        "wsd",
        description="warm-up, stable, decay: the rate rises linearly, stays, and falls linearly at the end; no cosine "
        "is offered: the constant part in the middle is where a model grows and where a run is continued or branched",
    )
    warmup: int = Field(0, ge=0, description="samples over which the rate rises linearly from zero")
    cooldown: float = Field(0.2, ge=0, le=1, description="last fraction of the run, over which the rate falls linearly")
    final_fraction: float = Field(0.0, ge=0, le=1, description="final rate, as a fraction of the peak")

    def factor(self, samples: int, batch: int, total: int) -> float:
        """Multiplier of the peak rate for the step that starts after `samples` samples and takes `batch` more.

        The first step of a warm-up has a rate above zero and the last step of a cool-down one at or above `final`.
        """
        done = samples + batch
        if done <= self.warmup:
            return done / self.warmup
        start = total * (1 - self.cooldown)
        if samples >= start and self.cooldown > 0:
            left = (total - samples) / (total - start)
            return self.final_fraction + (1 - self.final_fraction) * left
        return 1.0
