"""The recipe's `eval:` block, and the config of a suite: a name, data, and a protocol.

A suite is a YAML file, or one of the names in `BUILT_IN`, which run on the run's evaluation data. The content of a
suite's file is copied into the recipe, with absolute paths, so that the resolved recipe is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from ...data.samples.templates import check_templates
from ...models.wording import what_is_wrong

BUILT_IN = ("retrieval", "zero_shot", "geometry", "captioning")
_LARGEST = 1 << 20  # bytes of a suite's file
_JAVA = {"meteor", "spice", "ptb"}

PromptTexts = Annotated[tuple[str, ...], Field(strict=False)]


class SuiteData(BaseModel, frozen=True, extra="forbid", strict=True):
    """The pictures of a suite."""

    source: str = Field(description="a folder, a .tsv, .csv or .jsonl table, or a glob/brace URL of tar shards")
    train: str | None = Field(None, description="for a probe: its training data, in the form of `source`")
    images: str | None = Field(
        None, description="folder that a table's paths are relative to; default: the table's folder"
    )
    label: str | None = Field(
        None,
        description="the column, or the label in a shard's .json, with the class; default: `label`, or the .cls member",
    )


class ZeroShot(BaseModel, frozen=True, extra="forbid", strict=True):
    """Classification by the class whose prompts are nearest (Radford et al., arXiv 2103.00020, section 3.1)."""

    kind: Literal["zero_shot"] = "zero_shot"
    classes: str | None = Field(
        None, description="class names, one per line or as JSON, in the order of the class numbers; default: the labels"
    )
    templates: str | PromptTexts = Field(("{}",), description="prompts with {} or {c} for the class, or a file of them")
    prompts: str | None = Field(
        None, description="JSON {class: [prompt or {text, weight}, ...]}: a description set, instead of templates"
    )
    broader: str | None = Field(
        None, description="JSON {class: broader class}, any number of levels: one score per level"
    )
    dataset: str | None = Field(None, description="the key to use in JSON files that hold several data sets")

    @model_validator(mode="after")
    def _one_kind_of_prompts(self) -> ZeroShot:
        if self.prompts is not None and self.templates != ("{}",):
            raise ValueError(
                "prompts and templates are both given; remove one, as a description set replaces templates"
            )
        if isinstance(self.templates, tuple):
            check_templates(self.templates, "templates")
        return self


class Retrieval(BaseModel, frozen=True, extra="forbid", strict=True):
    """Recall at 1, 5 and 10 in both directions (Karpathy and Fei-Fei, arXiv 1412.2306)."""

    kind: Literal["retrieval"] = "retrieval"


class LinearProbe(BaseModel, frozen=True, extra="forbid", strict=True):
    """Logistic regression on picture embeddings, with the L2 strength chosen on a held-out part of the training set."""

    kind: Literal["linear_probe"] = "linear_probe"


class KnnProbe(BaseModel, frozen=True, extra="forbid", strict=True):
    """A weighted vote of the nearest training pictures (Wu et al., arXiv 1805.01978)."""

    kind: Literal["knn_probe"] = "knn_probe"
    neighbours: int = Field(20, gt=0)
    temperature: float = Field(0.07, gt=0)


class Captioning(BaseModel, frozen=True, extra="forbid", strict=True):
    """BLEU and CIDEr of generated captions against the true ones."""

    kind: Literal["captioning"] = "captioning"
    decoding: Literal["greedy", "beam", "nucleus"] = "greedy"
    max_tokens: int = Field(40, gt=1, description="maximum tokens of a caption; at most the model's context")
    metrics: PromptTexts = ("bleu", "cider")

    @field_validator("metrics")
    @classmethod
    def _are_supported(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name in _JAVA:
                raise ValueError(f"metrics has {name!r}, which only exists as a Java program; use bleu or cider")
            if name not in ("bleu", "cider"):
                raise ValueError(f"metrics has {name!r}, which is not known; use bleu or cider")
        return names


class Geometry(BaseModel, frozen=True, extra="forbid", strict=True):
    """Modality gap, alignment and uniformity of the embeddings."""

    kind: Literal["geometry"] = "geometry"


class Pairs(BaseModel, frozen=True, extra="forbid", strict=True):
    """Whether the true caption is nearer than one made from it by swapping words (Yuksekgonul et al., 2210.01936)."""

    kind: Literal["pairs"] = "pairs"
    swapped: str = Field("swapped", description="the column, or the key in a shard's .json, with the wrong caption")


Protocol = ZeroShot | Retrieval | LinearProbe | KnnProbe | Captioning | Geometry | Pairs
_KINDS = {cls.model_fields["kind"].default: cls for cls in get_args(Protocol)}
_PROBES = (LinearProbe, KnnProbe)


class SuiteConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """A named evaluation on separate data."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="prefix of the scores")
    data: SuiteData
    protocol: Protocol = Field(discriminator="kind")

    @field_validator("name")
    @classmethod
    def _is_not_built_in(cls, name: str) -> str:
        if name in BUILT_IN:
            raise ValueError(f"name = {name} is the name of a built-in suite; choose another name")
        return name

    @field_validator("data", mode="before")
    @classmethod
    def _only_a_source(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("protocol", mode="before")
    @classmethod
    def _known(cls, value: object) -> object:
        value = {"kind": value} if isinstance(value, str) else value
        if isinstance(value, dict) and value.get("kind") not in _KINDS:
            raise ValueError(f"protocol {value.get('kind')!r} is not known; the protocols are {', '.join(_KINDS)}")
        return value

    @model_validator(mode="after")
    def _probes_are_fitted(self) -> SuiteConfig:
        if isinstance(self.protocol, _PROBES) != (self.data.train is not None):
            reason = "is missing; name the probe's training data" if self.data.train is None else "is only for probes"
            raise ValueError(f"data.train {reason} (protocol {self.protocol.kind})")
        return self


def read_suite(value: object) -> str | SuiteConfig:
    """A suite given by built-in name, path of a YAML file, or content. Raises ValueError with a sentence for the
    user."""
    if isinstance(value, SuiteConfig) or (isinstance(value, str) and value in BUILT_IN):
        return value
    if isinstance(value, str):
        if not value.endswith((".yaml", ".yml")):
            names = ", ".join(map(repr, BUILT_IN))
            raise ValueError(f"suite {value!r} is not known; use {names}, or the path of a YAML file")
        return _checked(_read_file(Path(value)), f"{value}: ")
    return _checked(value, "")


def _checked(content: object, where: str) -> SuiteConfig:
    try:
        return SuiteConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in _KINDS)
        known = {"missing": "is missing; add it", "extra_forbidden": "is not a known key; correct or remove it"}
        reason = known.get(first["type"]) or what_is_wrong([first])
        raise ValueError(f"{where}{place}: {reason}" if place else f"{where}{reason}") from None


def _read_file(path: Path) -> object:
    """The content of a suite's file; its paths, relative to the file, are made absolute."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
        content = yaml.safe_load(text.decode("utf-8-sig")) if len(text) <= _LARGEST else None
    except OSError as error:
        raise ValueError(
            f"the suite {str(path)!r} cannot be read: {error.strerror}; give the path of a YAML file"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the suite {str(path)!r} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"the suite {str(path)!r} must be a mapping with the keys name, data and protocol")
    data, protocol = content.get("data"), content.get("protocol")
    if isinstance(data, str):
        content["data"] = data = {"source": data}
    for part, keys in ((data, ("source", "train", "images")), (protocol, ("classes", "prompts", "broader"))):
        if isinstance(part, dict):
            part.update({key: _absolute(path, part[key]) for key in keys if isinstance(part.get(key), str)})
    if isinstance(protocol, dict) and isinstance(protocol.get("templates"), str):
        protocol["templates"] = _absolute(path, protocol["templates"])
    return content


def _absolute(file: Path, value: str) -> str:
    return value if "://" in value else str(file.absolute().parent / value)


def _plain(suite: str | SuiteConfig) -> str | dict[str, Any]:
    return suite if isinstance(suite, str) else suite.model_dump(mode="json")


Suite = Annotated[str | SuiteConfig, PlainValidator(read_suite), PlainSerializer(_plain)]


class EvalConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When and on which data the model is evaluated; the end of the run is always evaluated."""

    every: int | None = Field(None, gt=0, description="samples between two evaluations; default: only at the end")
    suites: tuple[Suite, ...] = Field((), strict=False)
    data: str | None = Field(
        None, description="shards to evaluate on; default: the held-out split of a samples:// source"
    )
    batch: int = Field(128, gt=0, description="pairs embedded at once by each process")
    held_out: int = Field(
        1_024,
        ge=0,
        description="samples of the evaluation data on which every objective is computed at each evaluation, rounded "
        "up to whole batches of data.batch: the held-out loss; 0: none",
    )
    templates: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(
        default_factory=dict,
        description="zero-shot prompts by label, as in {animal: ['a photo of a {}']}; default: the bare class name",
    )
    caption_decoding: Literal["greedy", "beam", "nucleus"] = Field(
        "greedy", description="decoding of the report's captions; beam: width 4; nucleus: top-p 0.9"
    )
    examples: int = Field(12, ge=0, description="number of pictures in the report with their nearest captions")

    @field_validator("suites")
    @classmethod
    def _differ(cls, suites: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [suite if isinstance(suite, str) else suite.name for suite in suites]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two suites are called {twice!r}; rename one, as their scores would have the same names")
        return suites

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to evaluate: suites, or data that are named for the held-out loss."""
        return bool(self.suites or (self.data and self.held_out))

    @property
    def built_in(self) -> tuple[str, ...]:
        """The suites that run on the run's evaluation data."""
        return tuple(suite for suite in self.suites if isinstance(suite, str))

    @property
    def own(self) -> tuple[SuiteConfig, ...]:
        """The suites with separate data."""
        return tuple(suite for suite in self.suites if isinstance(suite, SuiteConfig))

    @property
    def needs_captioner(self) -> bool:
        """Whether a suite needs generated captions."""
        return "captioning" in self.suites or any(isinstance(suite.protocol, Captioning) for suite in self.own)
