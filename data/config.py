"""What a recipe's `data:` block says."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from .units import size_in_bytes

_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,31}")
UNTAGGED = "untagged"  # the tag of a caption that has none
CAPTION_UNIT = 1_000_000  # weights of captions count to a millionth


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
    filter: str | None = Field(
        None,
        description="keep the samples whose metadata fit, as in similarity > 0.28 and not nsfw (docs/sources.md)",
    )
    caption_weights: dict[str, float] = Field(
        default_factory=dict,
        description="weights of caption tags, as in {alt: 1, recaption: 3}; left out: all captions of a sample alike",
    )
    boxes: Literal["pixels", "relative"] | None = Field(
        None, description="deliver the boxes in the samples' .json: their unit; left out: none are read"
    )

    @field_validator("filter")
    @classmethod
    def _is_a_filter(cls, value: str | None) -> str | None:
        if value is not None:
            from .shards.filter import Filter  # brings numpy, which a recipe without filters does not need

            Filter(value)
        return value

    @field_validator("caption_weights")
    @classmethod
    def _drawable(cls, value: dict[str, float]) -> dict[str, float]:
        for tag, weight in value.items():
            if not 1 / CAPTION_UNIT <= weight <= CAPTION_UNIT:
                raise ValueError(
                    f"captions.{tag} = {weight} must be a weight from 0.000001 to 1000000; leave a tag out to never "
                    f"draw it"
                )
        return value

    @property
    def caption_shares(self) -> dict[str, int]:
        """The weights of the tags in millionths, in the order of their names, which is the order of the draw."""
        return {tag: round(weight * CAPTION_UNIT) for tag, weight in sorted(self.caption_weights.items())}

    @property
    def label(self) -> str:
        """What it is called."""
        return self.name or self.source


class JitterConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Random changes of colour, as torchvision's ColorJitter and RandomGrayscale make them; all 0: none."""

    brightness: float = Field(0.0, ge=0, le=1, description="factor on the light, drawn from 1 - x to 1 + x")
    contrast: float = Field(0.0, ge=0, le=1, description="factor on the distance to the mean grey")
    saturation: float = Field(0.0, ge=0, le=1, description="factor on the distance to the pixel's own grey")
    hue: float = Field(0.0, ge=0, le=0.5, description="turn of the colour circle, drawn from -x to x")
    probability: float = Field(0.8, ge=0, le=1, description="share of the pictures that are changed")
    grayscale: float = Field(0.0, ge=0, le=1, description="share of the pictures that are made grey")

    @property
    def active(self) -> bool:
        """Whether it changes any picture."""
        strength = self.brightness + self.contrast + self.saturation + self.hue
        return strength * self.probability + self.grayscale > 0


class AugmentConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Random changes to training pictures, drawn from the stream `augment` of the run's seed."""

    crop_scale: tuple[float, float] = Field(
        (0.9, 1.0), strict=False, description="area of the random crop, least and most"
    )
    crop_ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), strict=False, description="width / height of the random crop"
    )
    flip: bool = Field(False, description="mirror every second picture left to right; wrong for writing and arrows")
    color_jitter: JitterConfig = JitterConfig()
    min_box_fraction: float = Field(
        0.25, ge=0, le=1, description="share of a box that must be left in the crop; boxes with less are dropped"
    )

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
        if value is not None and size_in_bytes(value) is None:
            raise ValueError(f"{value!r} is no size; write one such as 500MB, 50GB or 1TB, or null for no cache")
        return value

    @property
    def bytes(self) -> int:
        """The limit in bytes, 0 for no cache."""
        return size_in_bytes(self.limit or "") or 0


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The stream of training samples."""

    train: tuple[SourceConfig, ...] = Field(min_length=1, strict=False, description="sources, mixed by weight")
    batch: int = Field(gt=0, description="pairs in a global batch, over all processes")
    workers: int = Field(0, ge=0, description="decoding processes beside each training process; 0: decode in line")
    decode: Literal["exact", "scaled"] = Field(
        "exact", description="scaled: large JPEGs are decoded at a smaller size, which is faster, and visibly softer"
    )
    decode_timeout: float = Field(
        300.0, gt=0, description="seconds that a decoding process may be at one sample; then the run ends, naming it"
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, lt=1, description="share of a source that may be unusable before the run stops"
    )
    tokenizer: str = Field(
        "clip", min_length=1, description="clip, or the path or URL of a Hugging Face tokenizer.json"
    )
    columns: dict[str, Literal["npy"]] = Field(
        default_factory=dict,
        description="further members to deliver: {teacher: npy} reads a vector or a matrix from key.teacher.npy, or "
        "from key.npy",
    )
    shuffle_window: int = Field(
        131_072,
        gt=0,
        description="samples among which the order is random; larger sources are read in lanes, each shuffled in "
        "windows of shuffle / lanes samples",
    )
    lanes: int = Field(
        1_024, gt=0, description="places at which a large source is read at once; at best a multiple of the world size"
    )
    bad_shards: Literal["refuse", "skip"] = Field(
        "refuse", description="a damaged shard: refuse the source, or leave the shard out of it and tell the ledger"
    )
    augment: AugmentConfig = AugmentConfig()
    cache: CacheConfig = CacheConfig()

    @field_validator("columns")
    @classmethod
    def _nameable(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _COLUMN.fullmatch(name):
                raise ValueError(f"columns: {name!r} is no name; use small letters, digits and _, as in teacher")
        return value
