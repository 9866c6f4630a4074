"""The recipe fields that every objective has; each objective's config subclasses this, in the objective's file."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, Field, field_validator

SchedulePoint = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]], Field(strict=False)
]


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The fields of every objective."""

    weight: float = Field(1.0, ge=0, description="factor of the term in the loss")
    schedule: tuple[SchedulePoint, ...] = Field(
        (),
        strict=False,
        description="factors on the weight over the run, as in [[0.8, 0.0], [1.0, 1.0]]: pairs of a fraction of the "
        "run and the factor there, linear in between; empty: 1 throughout",
    )

    @field_validator("schedule")
    @classmethod
    def _forward_in_time(cls, value: tuple[SchedulePoint, ...]) -> tuple[SchedulePoint, ...]:
        for (earlier, _), (later, _) in pairwise(value):
            if later <= earlier:
                raise ValueError(f"schedule goes from {earlier} to {later}; list its points in increasing order")
        return value
