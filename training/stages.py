"""Stages: parts of a run with one model shape and one mixture of the sources, budgeted in samples seen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import inf
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from ..models.flops import training_flops
from ..models.growth.options import DepthInit, DropBlocks, InheritFrom, WidthInit
from ..models.growth.plan import changes, check_tokens
from ..models.spec import ModelSpec
from .sample_rng import count_of


class GrowthConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a model is resized: how new weights are initialised, and what happens to the optimizer's state."""

    width_init: WidthInit = Field(
        "noise",
        description="new channels, heads and hidden units are copies of old ones; noise: with added noise that sums to "
        "zero, so that they learn different things; duplicate: exact copies, which stay equal; lemon: with fresh "
        "random values",
    )
    depth_init: DepthInit = Field(
        "zero",
        description="new blocks; zero: copies whose output starts at zero, exact; stack: the whole stack repeated on "
        "top, lossy; interleave: each block doubled, lossy",
    )
    drop_blocks: DropBlocks = Field(
        "last", description="blocks that go when a depth shrinks: the last, or those that write least"
    )
    token_init: tuple[Annotated[tuple[int, ...], Field(strict=False)], ...] = Field(
        (),
        strict=False,
        description="for each new row of text.vocabulary the ids that it is the mean of; empty: all",
    )
    inherit: InheritFrom = Field(
        1.0,
        description="fraction of the inherited weights; the rest is fresh random values, lossy; 1: inherit all; ema: "
        "old parts keep their weights, new ones take those of the average of optimizer.ema (both are our readings of "
        "GrowCLIP's inheriting with momentum)",
    )
    moments: Literal["map", "keep_v", "reset"] = Field(
        "map",
        description="the optimizer's moments; map: resized with the weights; keep_v: only the second; reset: zero",
    )
    rewarmup: int = Field(0, ge=0, description="samples of a new learning-rate warm-up after growth; 0: none")
    multiplier_fade: int = Field(
        0, ge=0, description="samples over which the learning-rate multipliers of growth return to 1; 0: they stay"
    )

    @field_validator("inherit")
    @classmethod
    def _is_a_fraction(cls, value: InheritFrom) -> InheritFrom:
        if value != "ema" and not 0 <= value <= 1:
            raise ValueError(f"inherit = {value} is not a fraction; write one from 0 to 1, or ema")
        return value


class PlateauConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The rule that ends a stage early: when the loss falls more slowly per FLOP than the next size is expected to make
    it fall."""

    window: int = Field(gt=0, description="samples over which the slope of the loss is measured, repeatedly")
    exponent: float = Field(
        0.1,
        gt=0,
        le=1,
        description="exponent of the power law by which the loss falls with compute; larger: the stage ends sooner",
    )

    def steps(self, batch: int) -> int:
        """Optimizer steps of a window at a global batch of `batch` pairs; at least two."""
        return max(2, -(-self.window // batch))


_TOKENS = 16
"""assumed caption length where candidates are compared before data is read"""
_MOST_CANDIDATES = 256


class SearchConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a stage may grow into: the search space, its limit, and how long each candidate is trained."""

    space: dict[str, Annotated[tuple[int | float, ...], Field(strict=False)]] = Field(
        min_length=1,
        description="sizes to choose among, as in {image.depth: [6, 8], text.width: [256, 384]}; every combination is "
        "a candidate, and the current size is always among them",
    )
    max_flops: float = Field(gt=1, description="limit on FLOPs per sample, as a multiple of the current model's")
    samples: int = Field(gt=0, description="samples that each candidate is trained on, from the newest sources")

    @field_validator("space")
    @classmethod
    def _few_enough(cls, value: dict[str, tuple[int | float, ...]]) -> dict[str, tuple[int | float, ...]]:
        count = 1
        for path, sizes in value.items():
            count *= len(sizes) + 1
            if not sizes:
                raise ValueError(f"search.space.{path} is empty; name the sizes to try")
        if count > _MOST_CANDIDATES:
            raise ValueError(f"search.space has {count} candidates, more than {_MOST_CANDIDATES}; name fewer sizes")
        return value


class StageConfig(GrowthConfig, frozen=True, extra="forbid", strict=True):
    """One part of a run. `shrink` and then `grow` are applied before its first step."""

    samples: int = Field(gt=0, description="budget of the stage, in samples seen; rounded up to whole batches")
    grow: dict[str, int | float] = Field(
        default_factory=dict, description="sizes to reach before the stage, as in {image.depth: 8}"
    )
    shrink: dict[str, int | float] = Field(
        default_factory=dict, description="smaller sizes to reach before the stage, as in {image.depth: 4}; lossy"
    )
    plateau: PlateauConfig | None = Field(
        None,
        description="ends the stage early when its loss flattens, as in {window: 8_000}; the rest of its samples go to "
        "the next stage; default: it ends with its budget",
    )
    search: SearchConfig | None = Field(
        None, description="sizes to choose from before the stage, by short trials, instead of `grow`"
    )
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="weights of the sources from this stage on, by name, as in {photos: 3, drawings: 1}; sources not "
        "named are not read; empty: as before",
    )
    patch_keep: float = Field(
        1.0,
        gt=0,
        le=1,
        description="fraction of each picture's patches that is used, drawn anew each time (FLIP); the last stage "
        "should use 1",
    )
    context: int | None = Field(
        None,
        ge=3,
        description="longest caption of the stage in tokens, start and end included; longer ones are truncated "
        "(CLIPA); default: model.text.context, which the last stage should use",
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of the samples that comes from the mixture before this stage; the rest from `mixture`",
    )

    @field_validator("mixture")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name, weight in value.items() if not 0 <= weight < inf), None)
        if wrong is not None:
            raise ValueError(f"mixture.{wrong} = {value[wrong]} is not a valid weight; set a number of 0 or more")
        if value and not any(value.values()):
            raise ValueError("mixture gives every source weight 0; give one of them more")
        return value

    @model_validator(mode="after")
    def _new_joint_channels_grow_fast(self) -> Self:
        if "embed_dim" in self.grow and self.moments != "map":
            raise ValueError(
                f"moments = {self.moments} would leave new channels of embed_dim near zero for many steps: it is their "
                f"momentum that moves them at once; set moments: map, or grow embed_dim in a stage of its own"
            )
        return self

    @model_validator(mode="after")
    def _sizes_are_said_once(self) -> Self:
        if self.search and (self.grow or self.shrink):
            raise ValueError("search chooses the sizes of the stage; leave out grow and shrink, or search")
        if self.replay and not self.mixture:
            raise ValueError(f"replay = {self.replay} is of the mixture before; name the new sources in mixture")
        return self

    def candidates(self, spec: ModelSpec) -> list[tuple[dict[str, int | float], ModelSpec]]:
        """What `search` may make of `spec`: sizes and their spec, those of fewer FLOPs first, `spec` itself included.

        Sizes below the present one are left out. Raises SpecError for what cannot be."""
        assert self.search
        present, found = spec.sizes(), []
        choices = [
            (None, *sorted({size for size in sizes if size > present.get(path, 0)}))
            for path, sizes in self.search.space.items()
        ]
        for picked in product(*choices):
            sizes = {p: size for p, size in zip(self.search.space, picked, strict=True) if size is not None}
            grown = spec.grown(sizes)
            changes(spec, grown)
            found.append((sizes, grown))
        most = self.search.max_flops * training_flops(spec, _TOKENS)
        costs = [training_flops(grown, _TOKENS) for _, grown in found]
        order = sorted((i for i, cost in enumerate(costs) if cost <= most), key=lambda i: costs[i])
        return [found[i] for i in order]

    def resized(self, spec: ModelSpec) -> ModelSpec:
        """The spec in this stage after `spec` in the one before: of a search that has not chosen yet, the largest that
        it may choose. Raises SpecError for what cannot be."""
        if self.search:
            return self.candidates(spec)[-1][1]
        resized = spec.shrunk(self.shrink).grown(self.grow)
        changes(spec, resized)
        check_tokens(spec, resized, self.token_init)
        return resized

    def longest(self, spec: ModelSpec) -> int:
        """The longest caption of the stage in tokens, for a model of `spec`."""
        return min(self.context or spec.text.context, spec.text.context)

    def kept_patches(self, spec: ModelSpec) -> int:
        """The number of patches of a picture that are used."""
        return count_of(spec.image.grid**2, self.patch_keep)

    def steps(self, batch: int) -> int:
        """Optimizer steps of the stage at a global batch of `batch` pairs."""
        return -(-self.samples // batch)


def since_growth(stages: Sequence[StageConfig], stage: int, samples: int, batch: int) -> tuple[StageConfig, int]:
    """The last stage up to `stage` that changed the model (or the first one), and the samples seen since it began."""
    last = max((i for i, s in enumerate(stages[: stage + 1]) if s.grow or s.shrink), default=0)
    return stages[last], samples - batch * sum(s.steps(batch) for s in stages[:last])


def steady_from(stages: Sequence[StageConfig], stage: int, batch: int, warmup: int) -> int:
    """The number of samples after which the learning rate of a stage is constant: warm-ups are over."""
    begin = batch * sum(s.steps(batch) for s in stages[:stage])
    grown, since = since_growth(stages, stage, begin, batch)
    return max(begin, warmup, begin - since + grown.rewarmup)


def rewarmed(stages: Sequence[StageConfig], stage: int, samples: int, batch: int) -> float:
    """Factor on the learning rate of the step after `samples` samples of the run: that of a re-warm-up, or 1."""
    grown, since = since_growth(stages, stage, samples, batch)
    return min(1.0, (since + batch) / grown.rewarmup) if grown.rewarmup else 1.0


def faded(stages: Sequence[StageConfig], stage: int, samples: int, batch: int) -> float:
    """The exponent of growth's multipliers after `samples` samples of the run: from 1 down to 0."""
    grown, since = since_growth(stages, stage, samples, batch)
    return max(0.0, 1 - since / grown.multiplier_fade) if grown.multiplier_fade else 1.0
