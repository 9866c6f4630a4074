"""Specs: pure data that says what a model is. Growing is going from one spec to another.

A spec holds no tensors and no behaviour beyond checking itself; `treering.models.model` builds a model from one and
`treering.models.growth` plans the way from one to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeGuard

from pydantic import BaseModel, Field, ValidationError, model_validator

CLIP_VOCABULARY = 49408


class SpecError(ValueError):
    """A model that cannot be built or grown as asked; the message names the field, the value and the remedy."""


def check_whole_factor(path: str, old: int, new: int) -> None:
    """Raise SpecError if the width at `path` cannot grow from `old` to `new`: its norms allow whole factors only."""
    if new % old:
        below = new - new % old
        nearest = below if new - below <= below + old - new else below + old
        raise SpecError(
            f"grow: {path} = {new} is no multiple of {old}, and the norms on a stream of {old} channels keep their "
            f"statistics only under whole factors; set {path}: {nearest}"
        )


class TowerSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """One transformer: `depth` pre-LN blocks on a stream of `width` channels."""

    width: int = Field(gt=0, description="channels of the residual stream")
    depth: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="attention heads of every block")
    head_dim: int | None = Field(None, gt=0, description="channels of one head; left out: width / heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden units of the MLP per channel of the stream")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.head_dim is None and self.width % self.heads:
            fitting = [h for h in range(1, self.width + 1) if self.width % h == 0]
            nearest = min(fitting, key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; "
                f"set heads: {nearest}, or give head_dim to make it independent of the width"
            )
        return self

    @property
    def attention_width(self) -> int:
        """Channels of queries, keys and values together over all heads."""
        return self.heads * (self.head_dim or self.width // self.heads)

    @property
    def mlp_width(self) -> int:
        """Hidden units of each block's MLP."""
        return round(self.width * self.mlp_ratio)


class ImageSpec(TowerSpec, frozen=True, extra="forbid", strict=True):
    """A vision transformer over square patches."""

    patch: int = Field(gt=0, description="side of a patch in pixels")
    resolution: int = Field(gt=0, description="side of the square input in pixels")

    @model_validator(mode="after")
    def _patch_divides_resolution(self) -> Self:
        if self.resolution % self.patch:
            below = self.resolution - self.resolution % self.patch
            raise ValueError(
                f"patch = {self.patch} does not divide resolution = {self.resolution}; "
                f"set resolution: {below or self.patch} or {below + self.patch}"
            )
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.resolution // self.patch


class TextSpec(TowerSpec, frozen=True, extra="forbid", strict=True):
    """A causal transformer over a text's tokens, pooled at the last of them, which ends the text."""

    context: int = Field(77, ge=3, description="longest caption in tokens, start and end included; longer ones are cut")
    vocabulary: int = Field(
        CLIP_VOCABULARY, gt=0, description="rows of the token table: at least the ids of data.tokenizer"
    )


class CaptionSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """CoCa's multimodal half: blocks on the text tower's stream that also attend to the image tokens."""

    depth: int = Field(gt=0, description="number of cross-attending blocks on top of the text tower")


class ModelSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """A dual encoder, with a captioner on its text tower if `caption` is given."""

    embed_dim: int = Field(gt=0, description="channels of the joint embedding space")
    image: ImageSpec
    text: TextSpec
    caption: CaptionSpec | None = Field(None, description="leave out for a pure dual encoder")
    logit_bias: bool = Field(False, description="learn a bias on similarities, as the sigmoid loss needs")

    def grown(self, targets: Mapping[str, int | float]) -> ModelSpec:
        """The spec with dotted fields set, as in `{"image.depth": 8}`.

        Without a head_dim, heads that are not set follow their tower's width, so that a head keeps its channels.
        Raises SpecError if a field does not exist, shrinks, or makes a model that cannot be.
        """
        tree: dict[str, Any] = self.model_dump()
        for path, value in targets.items():
            branch, parts = tree, path.split(".")
            for part in parts[:-1]:
                branch = branch.get(part) or {}
            current = branch.get(parts[-1]) if isinstance(branch, dict) else None
            if not _is_size(current):
                raise SpecError(f"grow: {path} = {value}: the model has no such size; it has {', '.join(self.sizes())}")
            if value < current:
                raise SpecError(
                    f"grow: {path} = {value} is smaller than the model's {current}; "
                    f"set {path}: {current} or more (growing never shrinks)"
                )
            branch[parts[-1]] = value
        for tower, old in (("image", self.image), ("text", self.text)):
            if f"{tower}.width" in targets:
                width = int(targets[f"{tower}.width"])
                check_whole_factor(f"{tower}.width", old.width, width)
                if old.head_dim is None and f"{tower}.heads" not in targets:
                    tree[tower]["heads"] = old.heads * width // old.width
        try:
            return ModelSpec.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise SpecError(f"grow: {dict(targets)} gives no possible model: {place}: {first['msg']}") from None

    def sizes(self) -> dict[str, int | float]:
        """Every number of the spec by its dotted path, as `grow:` names them."""
        flat: dict[str, int | float] = {}

        def walk(prefix: str, tree: Mapping[str, Any]) -> None:
            for key, value in tree.items():
                if isinstance(value, Mapping):
                    walk(f"{prefix}{key}.", value)
                elif _is_size(value):
                    flat[prefix + key] = value

        walk("", self.model_dump())
        return flat


def _is_size(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a spec is a number that can grow; Python counts True and False as numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)
