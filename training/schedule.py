"""The learning-rate schedules, as pure functions of samples seen: warm up, stay, decay (WSD), or warm up and cosine.

WSD is the default: a plateau in the middle is what growth wants, growth points sit on it, a run can be continued from
it, and the cool-down happens once, at the end. A cosine falls from the end of the warm-up on, so its length must be
known when it begins. A schedule knows nothing of stages or model shapes, so growth cannot break it.
"""

from __future__ import annotations

from math import cos, pi
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag


class _Schedule(BaseModel, frozen=True, extra="forbid", strict=True):
    """What both have: a linear warm-up, and a final rate."""

    warmup: int = Field(0, ge=0, description="samples over which the rate rises linearly from zero")
    final_fraction: float = Field(0.0, ge=0, le=1, description="final rate, as a fraction of the peak")

    def falls_from(self, total: int) -> float:
        """The number of samples, of `total`, after which the rate falls and the length of the run is fixed."""
        raise NotImplementedError

    def remaining(self, samples: int, total: int) -> float:
        """How far the rate is above the final one, 1 to 0, after `samples` samples, which are at or after
        `falls_from`."""
        raise NotImplementedError

    def factor(self, samples: int, batch: int, total: int) -> float:
        """Multiplier of the peak rate for the step that starts after `samples` samples and takes `batch` more.

        The first step of a warm-up has a rate above zero and the last step of a run one at or above the final.
        """
        done = samples + batch
        if done <= self.warmup:
            return done / self.warmup
        start = self.falls_from(total)
        if samples < start or start >= total:
            return 1.0
        return self.final_fraction + (1 - self.final_fraction) * self.remaining(samples, total)


class WsdConfig(_Schedule, frozen=True, extra="forbid", strict=True):
    """Warm-up, stable, decay: the rate rises linearly, stays, and falls linearly at the end."""

    kind: Literal["wsd"] = Field(
        "wsd", description="the shape: wsd (warm-up, stable, decay), the default, or cosine (warm-up, half a cosine)"
    )
    cooldown: float = Field(0.2, ge=0, le=1, description="last fraction of the run, over which the rate falls linearly")

    def falls_from(self, total: int) -> float:
        return total * (1 - self.cooldown)

    def remaining(self, samples: int, total: int) -> float:
        start = self.falls_from(total)
        return (total - samples) / (total - start)


class CosineConfig(_Schedule, frozen=True, extra="forbid", strict=True):
    """Warm-up and cosine: the rate rises linearly, then falls along half a cosine to the end of the run."""

    kind: Literal["cosine"] = Field("cosine", description="the shape")

    def falls_from(self, total: int) -> float:
        return float(self.warmup)

    def remaining(self, samples: int, total: int) -> float:
        return 0.5 * (1 + cos(pi * (samples - self.warmup) / (total - self.warmup)))


def _kind(value: Any) -> Any:
    return value.get("kind", "wsd") if isinstance(value, dict) else getattr(value, "kind", "wsd")


ScheduleConfig = Annotated[
    Annotated[WsdConfig, Tag("wsd")] | Annotated[CosineConfig, Tag("cosine")], Discriminator(_kind)
]
"""The learning rate over a run."""
