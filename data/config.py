"""What a recipe's `data:` block says."""

from __future__ import annotations

import re
from typing import Self

from pydantic import BaseModel, Field, field_validator, model_validator

_SIZE = re.compile(r"(\d+(?:\.\d+)?)(MB|GB|TB)")
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


class DataError(ValueError):
    """Data that cannot be read or used; the message names the place, what is wrong with it and the remedy."""


class SourceConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """One collection of shards and its share of the stream."""

    source: str = Field(min_length=1, description="samples://NAME, or a glob/brace URL of tar shards")
    weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="share of the stream, relative to the other sources; stages may change it",
    )
    name: str = Field("", description="what stages and logs call it; the URL where it has none")

    @property
    def label(self) -> str:
        """What it is called."""
        return self.name or self.source


class AugmentConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Random changes to training pictures, drawn from the stream `augment` of the run's seed."""

    crop_scale: tuple[float, float] = Field(
        (0.9, 1.0), strict=False, description="area of the random crop, least and most"
    )
    crop_ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), strict=False, description="width / height of the random crop"
    )
    flip: bool = Field(False, description="mirror every second picture left to right; wrong for writing and arrows")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop_scale = {list(self.crop_scale)} must be two rising shares of the area, as in [0.9, 1.0]"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = {list(self.crop_ratio)} must be two rising ratios, as in [0.75, 1.33]")
        return self


class CacheConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a node keeps of remote shards in its cache folder ($TREERING_CACHE); local ones are read where they lie."""

    limit: str | None = Field(
        "50GB", description="500MB, 50GB, 1TB, or null for none; sources that do not fit are read sample by sample"
    )

    @field_validator("limit")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None and not _SIZE.fullmatch(value):
            raise ValueError(f"{value!r} is no size; write one such as 500MB, 50GB or 1TB, or null for no cache")
        return value

    @property
    def bytes(self) -> int:
        """The limit in bytes, 0 for no cache."""
        match = _SIZE.fullmatch(self.limit or "")
        return int(float(match[1]) * _UNITS[match[2]]) if match else 0


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The stream of training samples."""

    train: tuple[SourceConfig, ...] = Field(min_length=1, strict=False, description="sources, mixed by weight")
    batch: int = Field(gt=0, description="pairs in a global batch, over all processes")
    workers: int = Field(0, ge=0, description="decoding processes beside each training process; 0: decode in line")
    bad_samples: float = Field(
        0.01, ge=0, lt=1, description="share of a source that may be unusable before the run stops"
    )
    shuffle: int = Field(
        131_072,
        gt=0,
        description="samples among which the order is random; larger sources are read in lanes, each shuffled in "
        "windows of shuffle / lanes samples",
    )
    lanes: int = Field(
        1_024, gt=0, description="places at which a large source is read at once; at best a multiple of the world size"
    )
    augment: AugmentConfig = AugmentConfig()
    cache: CacheConfig = CacheConfig()
