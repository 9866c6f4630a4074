"""Stages: stretches of a run with one model shape, budgeted in samples seen."""

from __future__ import annotations

from pydantic import BaseModel, Field


class StageConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """One stretch of a run. `grow` happens before its first step."""

    samples: int = Field(gt=0, description="budget of the stage, in samples seen; rounded up to whole batches")
    grow: dict[str, int | float] = Field(
        default_factory=dict, description="sizes to reach before the stage, as in {image.depth: 8}"
    )

    def steps(self, batch: int) -> int:
        """Optimizer steps of the stage at a global batch of `batch` pairs."""
        return -(-self.samples // batch)
