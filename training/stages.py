"""Stages: stretches of a run with one model shape and one mixture of the sources, budgeted in samples seen."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from ..models.growth.plan import Copies, Drops, Layers, changes, check_tokens
from ..models.spec import ModelSpec


class GrowthConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a model is resized: what new parts are made of, and what becomes of the optimizer's state."""

    copies: Copies = Field(
        "noise",
        description="new channels, heads and hidden units are copies of old ones; noise: told apart by noise that "
        "sums to zero, so that they learn different things; duplicate: plain copies, which stay alike for ever; "
        "lemon: told apart by fresh draws",
    )
    layers: Layers = Field(
        "zero",
        description="new blocks; zero: copies that add nothing at first, exact; stack: the stack once more on top, "
        "lossy; interleave: each block doubled, lossy",
    )
    drop: Drops = Field("last", description="blocks that go when a depth shrinks: the last, or those that write least")
    tokens: tuple[Annotated[tuple[int, ...], Field(strict=False)], ...] = Field(
        (), strict=False, description="of each new row of text.vocabulary the ids it is the mean of; empty: of all"
    )
    inherit: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the inherited weights, the rest is drawn afresh, lossy (a reconstruction of GrowCLIP's "
        "inheriting with momentum); 1: all",
    )
    moments: Literal["map", "keep_v", "reset"] = Field(
        "map",
        description="the optimizer's moments; map: resized with the weights; keep_v: the second only; reset: none",
    )
    rewarm: int = Field(0, ge=0, description="samples over which the learning rate rises again after growth; 0: none")
    fade: int = Field(
        0, ge=0, description="samples over which the learning-rate multipliers of growth go back to 1; 0: they stay"
    )


class StageConfig(GrowthConfig, frozen=True, extra="forbid", strict=True):
    """One stretch of a run. `shrink` and then `grow` happen before its first step."""

    samples: int = Field(gt=0, description="budget of the stage, in samples seen; rounded up to whole batches")
    grow: dict[str, int | float] = Field(
        default_factory=dict, description="sizes to reach before the stage, as in {image.depth: 8}"
    )
    shrink: dict[str, int | float] = Field(
        default_factory=dict, description="smaller sizes to reach before the stage, as in {image.depth: 4}; lossy"
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

    @field_validator("mixture")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name, weight in value.items() if not 0 <= weight < inf), None)
        if wrong is not None:
            raise ValueError(f"mixture.{wrong} = {value[wrong]} is no weight; set a number of 0 or more")
        if value and not any(value.values()):
            raise ValueError("mixture gives every source weight 0; give one of them more")
        return value

    @model_validator(mode="after")
    def _new_joint_channels_need_momentum(self) -> Self:
        if "embed_dim" in self.grow and self.moments != "map":
            raise ValueError(
                f"moments = {self.moments} would leave new channels of embed_dim at zero for ever: only their momentum "
                f"moves them; set moments: map, or grow embed_dim in a stage of its own"
            )
        return self

    def resized(self, spec: ModelSpec) -> ModelSpec:
        """The spec in this stage after `spec` in the one before. Raises SpecError for what cannot be."""
        resized = spec.shrunk(self.shrink).grown(self.grow)
        changes(spec, resized)
        check_tokens(spec, resized, self.tokens)
        return resized

    def steps(self, batch: int) -> int:
        """Optimizer steps of the stage at a global batch of `batch` pairs."""
        return -(-self.samples // batch)


def since_growth(stages: Sequence[StageConfig], stage: int, samples: int, batch: int) -> tuple[StageConfig, int]:
    """The last stage up to `stage` that changed the model (or the first one), and the samples seen since it began."""
    last = max((i for i, s in enumerate(stages[: stage + 1]) if s.grow or s.shrink), default=0)
    return stages[last], samples - batch * sum(s.steps(batch) for s in stages[:last])


def rewarmed(stages: Sequence[StageConfig], stage: int, samples: int, batch: int) -> float:
    """Factor on the learning rate of the step that starts after `samples` samples of the run: a re-warm-up's, or 1."""
    grown, since = since_growth(stages, stage, samples, batch)
    return min(1.0, (since + batch) / grown.rewarm) if grown.rewarm else 1.0


def faded(stages: Sequence[StageConfig], stage: int, samples: int, batch: int) -> float:
    """The power that the multipliers of growth are raised to after `samples` samples of the run: from 1 down to 0."""
    grown, since = since_growth(stages, stage, samples, batch)
    return max(0.0, 1 - since / grown.fade) if grown.fade else 1.0
