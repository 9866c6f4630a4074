"""Stages: stretches of a run with one model shape, budgeted in samples seen."""

from __future__ import annotations

from pydantic import BaseModel, Field

from ..models.growth.plan import Copies


class StageConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """One stretch of a run. `grow` happens before its first step."""

    samples: int = Field(gt=0, description="budget of the stage, in samples seen; rounded up to whole batches")
    grow: dict[str, int | float] = Field(
        default_factory=dict, description="sizes to reach before the stage, as in {image.depth: 8}"
    )
    copies: Copies = Field(
        "noise",
        description="new channels, heads and hidden units are copies of old ones; noise: told apart by noise that "
        "sums to zero, so that they learn different things; duplicate: plain copies, which stay alike for ever",
    )

    def steps(self, batch: int) -> int:
        """Optimizer steps of the stage at a global batch of `batch` pairs."""
        return -(-self.samples // batch)
