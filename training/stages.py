"""Stages: stretches of a run with one model shape and one mixture of the sources, budgeted in samples seen."""

from __future__ import annotations

from math import inf

from pydantic import BaseModel, Field, field_validator

from ..models.growth.plan import Copies


class StageConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """One stretch of a run. `grow` happens before its first step."""

    samples: int = Field(gt=0, description="budget of the stage, in samples seen; rounded up to whole batches")
    grow: dict[str, int | float] = Field(
        default_factory=dict, description="sizes to reach before the stage, as in {image.depth: 8}"
    )
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="weights of the sources from here on, by name, as in {photos: 3, drawings: 1}; those not named "
        "rest; empty: as before",
    )
    patches: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each picture's patches that is looked at, drawn anew each time (FLIP); end with a stage "
        "of 1",
    )
    copies: Copies = Field(
        "noise",
        description="new channels, heads and hidden units are copies of old ones; noise: told apart by noise that "
        "sums to zero, so that they learn different things; duplicate: plain copies, which stay alike for ever",
    )

    @field_validator("mixture")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name, weight in value.items() if not 0 <= weight < inf), None)
        if wrong is not None:
            raise ValueError(f"mixture.{wrong} = {value[wrong]} is no weight; set a number of 0 or more")
        if value and not any(value.values()):
            raise ValueError("mixture gives every source weight 0; give one of them more")
        return value

    def steps(self, batch: int) -> int:
        """Optimizer steps of the stage at a global batch of `batch` pairs."""
        return -(-self.samples // batch)
