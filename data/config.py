"""The `data:` block of a recipe: sources, batch, decoding, order and augmentation."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from .errors import DataError
from .samples.templates import check_templates
from .units import duration, size_in_bytes

_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,31}")
UNTAGGED = "untagged"  # the tag of a caption that has none
CAPTION_UNIT = 1_000_000  # caption weights are integers in millionths


def _is_a_duration(value: str) -> str:
    if duration(value) is None:
        raise ValueError(f"{value!r} is not a valid time; write one such as 30s, 10min or 1h")
    return value


Duration = Annotated[str, AfterValidator(_is_a_duration)]
"""a time such as 30s, 10min or 1h, in a config"""


class SourceConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """One collection of shards and its weight in the mixture."""

    source: str = Field(min_length=1, description="samples://NAME, or a glob/brace URL of tar shards")
    weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="relative weight of this source in the mixture; stages may change it",
    )
    name: str = Field("", description="name used in stages and logs; default: the URL")
    filter: str | None = Field(
        None,
        description="keep only samples whose metadata match, as in similarity > 0.28 and not nsfw (docs/sources.md)",
    )
    caption_weights: dict[str, float] = Field(
        default_factory=dict,
        description="weights of caption tags, as in {alt: 1, recaption: 3}; default: captions are drawn "
        "regardless of tag",
    )
    labels: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        strict=False,
        description="labels of the samples that become captions, with their templates, as in "
        "{animal: [a photo of a {}]}; the tag of such a caption, for caption_weights, is label:animal",
    )
    boxes: Literal["pixels", "relative"] | None = Field(
        None,
        description="unit of the boxes in the samples' .json; setting it delivers them; default: boxes are not read",
    )

    @field_validator("filter")
    @classmethod
    def _is_a_filter(cls, value: str | None) -> str | None:
        if value is not None:
            from .shards.filter import Filter  # brings numpy, which a recipe without filters does not need

            Filter(value)
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        lists = {name: [each] if isinstance(each, str) else each for name, each in value.items()}
        return {name: tuple(each) if isinstance(each, list) else each for name, each in lists.items()}

    @field_validator("labels")
    @classmethod
    def _fillable(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, templates in value.items():
            check_templates(templates, f"labels.{name}")
        return value

    @field_validator("caption_weights")
    @classmethod
    def _drawable(cls, value: dict[str, float]) -> dict[str, float]:
        for tag, weight in value.items():
            if not 1 / CAPTION_UNIT <= weight <= CAPTION_UNIT:
                raise ValueError(
                    f"caption_weights.{tag} = {weight} must be from 0.000001 to 1000000; to never draw a tag, do not "
                    f"list it"
                )
        return value

    @property
    def tag_weights(self) -> dict[str, int]:
        """The weights of the tags in millionths, sorted by name; the draw uses this order."""
        return {tag: round(weight * CAPTION_UNIT) for tag, weight in sorted(self.caption_weights.items())}

    @property
    def label(self) -> str:
        """The name used in stages and logs: `name`, or the URL without one."""
        return self.name or self.source


class JitterConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Random colour changes as in torchvision's ColorJitter and RandomGrayscale; all 0 turns them off."""

    brightness: float = Field(0.0, ge=0, le=1, description="brightness factor, drawn from 1 - x to 1 + x")
    contrast: float = Field(
        0.0, ge=0, le=1, description="contrast factor (distance to the mean grey), drawn from 1 - x to 1 + x"
    )
    saturation: float = Field(
        0.0, ge=0, le=1, description="saturation factor (distance to the pixel's grey), drawn from 1 - x to 1 + x"
    )
    hue: float = Field(
        0.0, ge=0, le=0.5, description="hue shift as a fraction of the colour circle, drawn from -x to x"
    )
    probability: float = Field(0.8, ge=0, le=1, description="fraction of the pictures whose colours are changed")
    grayscale: float = Field(0.0, ge=0, le=1, description="fraction of the pictures that are converted to grey")

    @property
    def active(self) -> bool:
        """Whether it changes any picture."""
        strength = self.brightness + self.contrast + self.saturation + self.hue
        return strength * self.probability + self.grayscale > 0


class AugmentConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Random changes to training pictures, drawn from the run's seed and the sample's position."""

    crop_scale: tuple[float, float] = Field(
        (0.9, 1.0),
        strict=False,
        description="smallest and largest area of the random crop, as fractions of the picture",
    )
    crop_ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), strict=False, description="smallest and largest width / height of the random crop"
    )
    flip: bool = Field(
        False, description="mirror half of the pictures left to right; unsuitable for pictures with text or arrows"
    )
    color_jitter: JitterConfig = JitterConfig()
    min_box_fraction: float = Field(
        0.25, ge=0, le=1, description="fraction of a box's area that must lie in the crop; boxes with less are dropped"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop_scale = {list(self.crop_scale)} must be two rising fractions of the area, as in [0.9, 1.0]"
            )
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = {list(self.crop_ratio)} must be two rising ratios, as in [0.75, 1.33]")
        return self


class CacheConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The node's cache of remote shards, in the cache folder ($TREERING_CACHE); local shards are read in place."""

    limit: str | None = Field(
        "50GB",
        description="size limit such as 500MB, 50GB or 1TB; null: no cache; sources that do not fit are read sample by "
        "sample",
    )

    @field_validator("limit")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None and size_in_bytes(value) is None:
            raise ValueError(
                f"{value!r} is not a valid size; write one such as 500MB, 50GB or 1TB, or null for no cache"
            )
        return value

    @property
    def bytes(self) -> int:
        """The limit in bytes, 0 for no cache."""
        return size_in_bytes(self.limit or "") or 0


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The stream of training samples."""

    train: tuple[SourceConfig, ...] = Field(strict=False, description="data sources, mixed by weight")
    batch: int = Field(gt=0, description="pairs in a global batch, summed over all processes")
    workers: int = Field(
        0, ge=0, description="decoding processes per training process; 0: decode in the training process"
    )
    decode: Literal["exact", "scaled"] = Field(
        "exact", description="scaled: large JPEGs are decoded at a reduced size, which is faster but visibly softer"
    )
    decode_timeout: float = Field(
        300.0,
        gt=0,
        description="seconds a decoding process may spend on one sample, which is then bad; ten of them end a run",
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, lt=1, description="fraction of a source's samples that may be unusable before the run stops"
    )
    tokenizer: str = Field(
        "clip", min_length=1, description="clip, or the path or URL of a Hugging Face tokenizer.json"
    )
    columns: dict[str, Literal["npy"]] = Field(
        default_factory=dict,
        description="additional members to deliver: {teacher: npy} reads a vector or a matrix from key.teacher.npy, or "
        "from key.npy",
    )
    shuffle_window: int | None = Field(
        None,
        gt=0,
        description="number of samples shuffled together; larger sources are read in lanes, each shuffled in "
        "windows of shuffle_window / lanes samples; default: 131,072, or 128 batches if that is more",
    )
    lanes: int = Field(
        1_024,
        gt=0,
        description="number of places in a large source that are read concurrently; best a multiple of the world size",
    )
    bad_shards: Literal["refuse", "skip"] = Field(
        "refuse",
        description="what to do with a damaged shard: refuse the source, or skip the shard and record it in the ledger",
    )
    unfinished_jpegs: Literal["keep", "refuse"] = Field(
        "keep",
        description="JPEGs without their end mark: keep them if all their rows decode, or refuse them as bad samples",
    )
    augment: AugmentConfig = AugmentConfig()
    cache: CacheConfig = CacheConfig()

    def check_train(self) -> None:
        """Raises DataError without a source. (Not a validator: weights that were imported have a recipe before anybody
        knows what they will be trained on; it can be evaluated and grown.)"""
        if not self.train:
            raise DataError(
                "data.train is empty; name the shards to train on, as in 'data.train=[{source: \"shards/*.tar\"}]'"
            )

    @field_validator("columns")
    @classmethod
    def _nameable(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _COLUMN.fullmatch(name):
                raise ValueError(
                    f"columns: {name!r} is not a valid name; use lower-case letters, digits and _, as in teacher"
                )
        return value
