"""Specs: pure data that says what a model is. Growth leads from one spec to another.

A spec holds no tensors and only checks itself; `treering.models.model` builds a model from one, `treering.models.parts`
lists its parts, and `treering.models.growth` plans the way from one to the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, Self, TypeGuard

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .wording import first_mistake

CLIP_VOCABULARY = 49408
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_MODALITY_SIZE = re.compile(r"modalities\.([a-z][a-z0-9_]{0,31})\.([a-z_]+)")
# The constants that CLIP normalises pictures with (Radford et al., arXiv 2103.00020); weights depend on them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SpecError(ValueError):
    """A model that cannot be built or grown as asked; the message has the field, the value and the remedy."""


def nearest_multiple(size: int, of: int) -> int:
    """The positive multiple of `of` that is nearest to `size`; of two equally near ones the larger."""
    return max(1, (2 * size + of) // (2 * of)) * of


def padding_variance(old: int, new: int) -> float:
    """Factor on a stream's variance when whole copies of it are padded with its mean, from `old` to `new` channels."""
    return new // old * old / new


class TowerSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """One transformer: `depth` pre-LN blocks on a stream of `width` channels."""

    width: int = Field(gt=0, description="channels of the residual stream")
    depth: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="attention heads of every block")
    head_dim: int | None = Field(None, gt=0, description="channels of one head; left out: width / heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden units of the MLP per channel of the stream")
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = Field(
        "gelu", description="activation of the MLP; quick_gelu: that of OpenAI's CLIP; swiglu: gated, with a third map"
    )
    layer_scale: float | None = Field(
        None, gt=0, description="initial value of a learned gain on the output of attention and MLP; left out: no gain"
    )
    experts: int = Field(1, ge=1, description="MLPs in every block; 1: dense, more: a mixture with a router")
    experts_per_token: int = Field(2, ge=1, description="experts that the router chooses for each token")
    norm_eps: float = Field(
        1e-5, gt=0, description="added to the variance in every norm; growth by a fractional factor scales it"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.head_dim is None and self.width % self.heads:
            fitting = [h for h in range(1, self.width + 1) if self.width % h == 0]
            nearest = min(fitting, key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"heads = {self.heads} does not divide width = {self.width}; set heads: {nearest}, or set head_dim"
            )
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if 1 < self.experts < self.experts_per_token:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} is more than experts = {self.experts}; "
                f"set experts_per_token: {self.experts}"
            )
        return self

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Channels of the queries of all heads together, and of the keys and values."""
        return self.heads * self.head_width

    @property
    def mlp_width(self) -> int:
        """Hidden units of each block's MLP."""
        return round(self.width * self.mlp_ratio)


class ImageSpec(TowerSpec, frozen=True, extra="forbid", strict=True):
    """A vision transformer over square patches."""

    patch: int = Field(gt=0, description="side of a square patch in pixels")
    resolution: int = Field(gt=0, description="side of the square input in pixels")
    patch_bias: bool = Field(True, description="whether the linear map of patches has a bias")
    class_token: bool = Field(False, description="a learned token before the patches, as in CLIP")
    pre_norm: bool = Field(False, description="a norm before the first block, as in CLIP")
    pool: Literal["mean", "class", "attention"] = Field(
        "mean",
        description="what the embedding is read from: the mean of the patches, the class token, or the first query of "
        "CoCa's attention pooler, whose other queries are the image tokens of a captioner",
    )
    norm_after_pool: bool = Field(
        False, description="apply the last norm after the mean; tokens are then not normalised"
    )
    queries: int = Field(256, gt=1, description="learned queries of the attention pooler")
    pool_heads: int = Field(8, gt=0, description="heads of the attention pooler")
    mean: tuple[float, float, float] = Field(CLIP_MEAN, strict=False, description="subtracted from pixels in 0..1")
    std: tuple[float, float, float] = Field(CLIP_STD, strict=False, description="pixels are then divided by it")
    resize: Literal["crop", "squash"] = Field(
        "crop", description="how pictures are made square without augmentation; squash: by distortion"
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="filter of that resizing")

    @model_validator(mode="after")
    def _pool_has_its_parts(self) -> Self:
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool = class needs a class token; set class_token: true")
        if self.norm_after_pool and self.pool != "mean":
            raise ValueError(f"norm_after_pool = true needs pool: mean, not pool = {self.pool}; leave it out")
        if min(self.std) <= 0:
            raise ValueError(f"std = {self.std} is not valid, as pixels are divided by it; set three positive numbers")
        return self

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
    """A transformer over the tokens of a text; by default causal, and pooled at the end-of-text token."""

    context: int = Field(77, ge=3, description="longest text in tokens, start and end included; longer ones are cut")
    vocabulary: int = Field(
        CLIP_VOCABULARY, gt=0, description="rows of the token table: at least the ids of data.tokenizer"
    )
    causal: bool = Field(True, description="whether a token sees only earlier ones; false: texts are padded, see pool")
    pool: Literal["end", "first", "last", "class"] = Field(
        "end",
        description="what the embedding is read from: the end-of-text token; the first or last place of the context, "
        "to which texts are padded with token 0 (always so without a causal mask); or CoCa's class token",
    )
    projection_bias: bool = Field(False, description="whether the projection to the joint space has a bias")

    @model_validator(mode="after")
    def _class_token_is_causal(self) -> Self:
        if self.pool == "class" and not self.causal:
            raise ValueError("pool = class, as in CoCa, needs a causal mask; set causal: true")
        return self

    @property
    def padded(self) -> bool:
        """Whether texts are padded to the context with token 0, which attention does not mask."""
        return not self.causal or self.pool == "last"


class CaptionerSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """CoCa's multimodal half: blocks on the text tower's stream that also attend to the image tokens."""

    depth: int = Field(gt=0, description="number of cross-attending blocks on top of the text tower")
    cross_attention: Literal["inside", "after"] = Field(
        "inside",
        description="where a block attends to the picture: between attention and MLP or, as in open_clip's CoCa, after "
        "both, with a norm of the image tokens and a second MLP",
    )
    tied_embeddings: bool = Field(
        True, description="whether the output table is the token table; false: a table of its own"
    )


class SharedSpec(TowerSpec, frozen=True, extra="forbid", strict=True):
    """Blocks that the tokens of both towers go through before pooling, behind a learned gate each (after GrowCLIP)."""


class ModalitySpec(TowerSpec, frozen=True, extra="forbid", strict=True):
    """A transformer over the frames of another modality: a sample is a matrix of frames, all of one shape."""

    features: int = Field(gt=0, description="numbers per frame, such as the bands of a spectrogram")
    frames: int = Field(1, gt=0, description="frames per sample; 1: a sample is a vector")


class ModelSpec(BaseModel, frozen=True, extra="forbid", strict=True):
    """A dual encoder, with a captioner on its text tower if `captioner` is given."""

    embed_dim: int = Field(gt=0, description="channels of the joint embedding space")
    image: ImageSpec
    text: TextSpec
    captioner: CaptionerSpec | None = Field(None, description="left out: a pure dual encoder")
    shared: SharedSpec | None = Field(None, description="blocks that both towers share; left out: none")
    modalities: dict[str, ModalitySpec] = Field(
        default_factory=dict, description="towers of other modalities, by the name of the data column that each reads"
    )
    logit_bias: bool = Field(False, description="learn a bias on similarities; the sigmoid loss needs it")

    @field_validator("modalities")
    @classmethod
    def _names(cls, value: dict[str, ModalitySpec]) -> dict[str, ModalitySpec]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"modalities: {name[:40]!r} is not a valid name; use that of a data column")
            if name in ("image", "text"):
                raise ValueError(
                    f"modalities: the model already has a tower called {name}; give the modality another name"
                )
        return value

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.captioner and self.text.padded:
            raise ValueError(
                "captioner needs a causal text tower without padding; set text.causal: true and text.pool: end or class"
            )
        if self.shared and (self.text.padded or self.text.pool != "end" or self.image.pool != "mean"):
            raise ValueError("shared blocks need image.pool: mean and text.pool: end; set these")
        if self.shared and self.image.norm_after_pool:
            raise ValueError("shared blocks need normalised tokens; set image.norm_after_pool: false")
        if self.image.pool == "attention" and self.embed_dim % self.image.pool_heads:
            raise ValueError(
                f"image.pool_heads = {self.image.pool_heads} does not divide embed_dim = {self.embed_dim}, "
                f"the pooler's width; set image.pool_heads: 1, or another divisor"
            )
        return self

    @property
    def memory_width(self) -> int:
        """Channels of the image tokens that a captioner attends to."""
        return self.embed_dim if self.image.pool == "attention" else self.image.width

    def grown(self, targets: Mapping[str, int | float]) -> ModelSpec:
        """The spec with dotted fields set to larger sizes, as in `{"image.depth": 8}`.

        Without a head_dim, heads that are not set follow their tower's width, so that a head keeps its channels.
        `captioner.depth` adds a captioner, and the sizes of a new modality, as in `{"modalities.audio.depth": 2, ...}`,
        add its tower. A patch may become smaller or larger.
        Raises SpecError if a field does not exist, shrinks, or the model would be invalid.
        """
        return self._resized("grow", targets)

    def shrunk(self, targets: Mapping[str, int | float]) -> ModelSpec:
        """The spec with dotted fields set to smaller sizes; for the rest see `grown`."""
        return self._resized("shrink", targets)

    def _resized(self, word: str, targets: Mapping[str, int | float]) -> ModelSpec:
        tree: dict[str, Any] = self.model_dump()
        for path, value in targets.items():
            current = self._current(word, path, value)
            if word == "grow" and value < current and path != "image.patch":
                raise SpecError(
                    f"grow: {path} = {value} is smaller than the model's {current}; "
                    f"set {path}: {current} or more, or write it under shrink (growing never shrinks)"
                )
            if word == "shrink" and value > current:
                raise SpecError(
                    f"shrink: {path} = {value} is larger than the model's {current}; "
                    f"set {path}: {current} or less, or write it under grow"
                )
            *parents, key = path.split(".")
            branch = tree
            for part in parents:
                branch[part] = branch.get(part) or {}
                branch = branch[part]
            branch[key] = value
        for tower, old in self.towers().items():
            if f"{tower}.width" in targets:
                block, _, name = tower.partition(".")
                self._follow_width(word, tower, old, tree[block][name] if name else tree[block], targets)
        try:
            return ModelSpec.model_validate(tree)
        except ValidationError as error:
            raise SpecError(f"{word}: {dict(targets)} does not give a valid model: {first_mistake(error)}") from None

    def _current(self, word: str, path: str, value: int | float) -> int | float:
        """The size at `path` now."""
        known = self.sizes() | {f"{name}.head_dim": spec.head_width for name, spec in self.towers().items()}
        if word == "grow":
            for part in ("captioner.depth", "shared.depth", "shared.width", "shared.heads", *self._new_tower(path)):
                known.setdefault(part, 0)
        if path not in known:
            near, *_ = [one for one in known if one.endswith(f".{path}")] or get_close_matches(path, known, 1, 0.0)
            raise SpecError(
                f"{word}: {path} = {value}: the model has no such size, the nearest is {near}; "
                f"it has {', '.join(known)}"
            )
        return known[path]

    def _new_tower(self, path: str) -> list[str]:
        """All sizes of the modality that `path` names, if the model does not have it yet."""
        place = _MODALITY_SIZE.fullmatch(path)
        if place is None or place[1] in self.modalities or place[1] in ("image", "text"):
            return []
        return [f"modalities.{place[1]}.{key}" for key in ModalitySpec.model_fields if key not in ("mlp", "norm_eps")]

    def _follow_width(
        self, word: str, tower: str, old: TowerSpec, new: dict[str, Any], targets: Mapping[str, int | float]
    ) -> None:
        """Set what depends on a new width: the number of heads, and the eps of norms over a padded stream."""
        width = int(new["width"])
        if old.head_dim is None and not {f"{tower}.heads", f"{tower}.head_dim"} & targets.keys():
            if width % old.head_width:
                raise SpecError(
                    f"{word}: {tower}.width = {width} is not a whole number of heads of {old.head_width} channels; set "
                    f"{tower}.width: {nearest_multiple(width, old.head_width)}, or set {tower}.head_dim and heads too"
                )
            new["heads"] = width // old.head_width
        if width > old.width and width % old.width:
            reason = self._whole_factors_only(tower)
            if reason:
                raise SpecError(
                    f"grow: {tower}.width = {width} is not a multiple of {old.width}, and with {reason} only whole "
                    f"factors keep the function; "
                    f"set {tower}.width: {max(nearest_multiple(width, old.width), 2 * old.width)}"
                )
            new["norm_eps"] = old.norm_eps * padding_variance(old.width, width)

    def check_samples(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise SpecError if a tower cannot read the samples of its data column; `shapes` are theirs, by column."""
        for name, tower in self.modalities.items():
            *frames, features = shapes.get(name, (tower.frames, tower.features))
            there = frames[0] if frames else 1
            if (tower.frames, tower.features) != (there, features):
                raise SpecError(
                    f"model.modalities.{name}: frames = {tower.frames} and features = {tower.features}, but a sample "
                    f"of column {name} is {list(shapes[name])}; set frames: {there}, features: {features}"
                )

    def _whole_factors_only(self, tower: str) -> str | None:
        """What of the model, if anything, does not keep its function when the stream is padded with its mean."""
        if self.towers()[tower].layer_scale is not None:
            return f"{tower}.layer_scale"
        if tower == "text" and self.captioner:  # it reads the stream behind a norm
            return "a captioner"
        if tower != "image":
            return None
        crossed = self.captioner is not None and self.captioner.cross_attention == "after"
        found = {
            "image.pre_norm": self.image.pre_norm,
            "image.pool: attention": self.image.pool == "attention",
            "captioner.cross_attention: after": crossed,
        }
        return next((name for name, present in found.items() if present), None)

    def towers(self) -> dict[str, TowerSpec]:
        """The specs of transformers by the path of their sizes; the captioner has the sizes of the text tower."""
        found: dict[str, TowerSpec] = {}
        for field, value in self:
            group = value if isinstance(value, dict) else {"": value}
            found |= {f"{field}.{name}".rstrip("."): one for name, one in group.items() if isinstance(one, TowerSpec)}
        return found

    def sizes(self) -> dict[str, int | float]:
        """Every size of the spec by its dotted path, as `grow:` names them."""
        flat: dict[str, int | float] = {}

        def walk(prefix: str, tree: Mapping[str, Any]) -> None:
            for key, value in tree.items():
                if isinstance(value, Mapping):
                    walk(f"{prefix}{key}.", value)
                elif _is_size(value) and key not in _FIXED:
                    flat[prefix + key] = value

        walk("", self.model_dump())
        return flat


_FIXED = ("norm_eps", "layer_scale", "queries", "pool_heads")
"""numbers of a spec that growth does not change"""


def _is_size(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a spec is a number; to Python True and False are numbers, too."""
    return isinstance(value, int | float) and not isinstance(value, bool)
