"""What a recipe's `objectives:` block says."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator

Point = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]], Field(strict=False)]


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What every objective has."""

    weight: float = Field(1.0, ge=0, description="factor of the term in the loss")
    schedule: tuple[Point, ...] = Field(
        (),
        strict=False,
        description="factors on the weight over the run, as in [[0.8, 0.0], [1.0, 1.0]]: after each share of the run "
        "a factor, linear in between; empty: 1 throughout",
    )

    @field_validator("schedule")
    @classmethod
    def _forward_in_time(cls, value: tuple[Point, ...]) -> tuple[Point, ...]:
        for (earlier, _), (later, _) in pairwise(value):
            if later <= earlier:
                raise ValueError(f"schedule goes from {earlier} to {later}; list its points in the order of the run")
        return value


class ContrastiveConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """Which picture belongs to which caption, over all pairs of the global batch."""

    kind: Literal["softmax", "sigmoid", "filip"] = Field(
        "softmax",
        description="softmax: InfoNCE both ways; sigmoid: SigLIP, needs model.logit_bias; filip: InfoNCE of token-wise "
        "maximum similarity",
    )
    positives: Literal["own", "caption", "picture"] = Field(
        "own",
        description="own: a pair's own, and pairs of equal caption or picture are left out; caption, picture: those of "
        "equal caption or equal picture are positives, too",
    )
    softening: float = Field(0.0, ge=0, lt=1, description="share of each target that is spread over all candidates")


class BetweenConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """Which sample of a further modality belongs to which caption, picture or sample of another one (InfoNCE)."""

    between: tuple[str, str] = Field(
        strict=False,
        description="a further tower, and image, text or another further tower, as in [audio, text]; the temperature "
        "is that of the first",
    )
    positives: Literal["own", "caption", "picture"] = Field("own", description="as in contrastive")
    softening: float = Field(0.0, ge=0, lt=1, description="share of each target that is spread over all candidates")

    @field_validator("between")
    @classmethod
    def _begins_with_a_further_tower(cls, value: tuple[str, str]) -> tuple[str, str]:
        first, second = value
        if first == second:
            raise ValueError(f"between = [{first}, {second}] compares a tower with itself; name another one")
        if first in ("image", "text"):
            remedy = "that is `contrastive`" if second in ("image", "text") else f"write [{second}, {first}]"
            raise ValueError(f"between = [{first}, {second}] has to begin with a further tower; {remedy}")
        return value


class CaptionObjectiveConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """Next-token prediction of the caption from the picture (CoCa)."""

    weight: float = Field(2.0, ge=0)
    parallel: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the captions whose tokens are all predicted at once, from the picture and masked inputs "
        "(CapPa)",
    )


class BalanceConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """Equal work for all experts of a mixture (Switch)."""

    weight: float = Field(0.01, ge=0)
