"""What a recipe's `eval:` block says, and what a suite is: a name, data, and a protocol.

A suite is a YAML file, or one of the names in `BUILT_IN`, which run on the run's own evaluation data. A recipe that
names a file takes its content in, with the paths in it made absolute, so that the resolved recipe says everything.
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

BUILT_IN = ("retrieval", "zero_shot", "geometry", "captioning")
_LARGEST = 1 << 20  # bytes of a suite's file
_JAVA = {"meteor", "spice", "ptb"}

PromptTexts = Annotated[tuple[str, ...], Field(strict=False)]


class SuiteData(BaseModel, frozen=True, extra="forbid", strict=True):
    """The pictures of a suite."""

    source: str = Field(description="a folder, a .tsv, .csv or .jsonl table, or a glob/brace URL of tar shards")
    train: str | None = Field(None, description="of a probe: what it is fitted on, in the form of `source`")
    images: str | None = Field(None, description="where the paths of a table begin; left out: beside the table")
    label: str | None = Field(
        None, description="the column, or the label of a shard's .json, with the class; left out: label, or the .cls"
    )


class ZeroShot(BaseModel, frozen=True, extra="forbid", strict=True):
    """Classification by the class whose prompts are nearest (Radford et al., arXiv 2103.00020, section 3.1)."""

    kind: Literal["zero_shot"] = "zero_shot"
    classes: str | None = Field(
        None, description="class names, one a line or as JSON, in the order of the class numbers; left out: the labels"
    )
    templates: str | PromptTexts = Field(("{}",), description="prompts, {} or {c} for the class; or a file of them")
    prompts: str | None = Field(
        None, description="JSON {class: [prompt or {text, weight}, ...]}: a description set, in place of templates"
    )
    broader: str | None = Field(None, description="JSON {class: broader class}, any levels deep: a score a level")
    dataset: str | None = Field(None, description="the key in JSON files that hold several data sets")

    @model_validator(mode="after")
    def _one_kind_of_prompts(self) -> ZeroShot:
        if self.prompts is not None and self.templates != ("{}",):
            raise ValueError("prompts and templates are both given; a description set stands in place of templates")
        if isinstance(self.templates, tuple):
            check_templates(self.templates, "templates")
        return self


class Retrieval(BaseModel, frozen=True, extra="forbid", strict=True):
    """Recall at 1, 5 and 10 both ways (Karpathy and Fei-Fei, arXiv 1412.2306)."""

    kind: Literal["retrieval"] = "retrieval"


class LinearProbe(BaseModel, frozen=True, extra="forbid", strict=True):
    """Logistic regression on picture embeddings, its L2 strength swept on a part of the training set."""

    kind: Literal["linear_probe"] = "linear_probe"


class KnnProbe(BaseModel, frozen=True, extra="forbid", strict=True):
    """A vote of the nearest training pictures (Wu et al., arXiv 1805.01978)."""

    kind: Literal["knn_probe"] = "knn_probe"
    neighbours: int = Field(20, gt=0)
    temperature: float = Field(0.07, gt=0)


class Captioning(BaseModel, frozen=True, extra="forbid", strict=True):
    """Captions the model writes, by BLEU and CIDEr against the true ones."""

    kind: Literal["captioning"] = "captioning"
    decoding: Literal["greedy", "beam", "nucleus"] = "greedy"
    max_tokens: int = Field(40, gt=1, description="tokens of a caption, if the model's context is not shorter")
    metrics: PromptTexts = ("bleu", "cider")

    @field_validator("metrics")
    @classmethod
    def _that_can_be(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name in _JAVA:
                raise ValueError(f"metrics has {name!r}, which only exists as a Java program; there are bleu and cider")
            if name not in ("bleu", "cider"):
                raise ValueError(f"metrics has {name!r}, which is not known; there are bleu and cider")
        return names


class Geometry(BaseModel, frozen=True, extra="forbid", strict=True):
    """Modality gap, alignment and uniformity of the embeddings."""

    kind: Literal["geometry"] = "geometry"


class Pairs(BaseModel, frozen=True, extra="forbid", strict=True):
    """Whether the true caption is nearer than one made from it by swapping words (Yuksekgonul et al., 2210.01936)."""

    kind: Literal["pairs"] = "pairs"
    swapped: str = Field("swapped", description="the column, or the key of a shard's .json, with the wrong caption")


Protocol = ZeroShot | Retrieval | LinearProbe | KnnProbe | Captioning | Geometry | Pairs
_KINDS = {cls.model_fields["kind"].default: cls for cls in get_args(Protocol)}
_PROBES = (LinearProbe, KnnProbe)


class SuiteConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """A named evaluation on data of its own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="the scores begin with it")
    data: SuiteData
    protocol: Protocol = Field(discriminator="kind")

    @field_validator("name")
    @classmethod
    def _of_its_own(cls, name: str) -> str:
        if name in BUILT_IN:
            raise ValueError(f"a suite of your own cannot be called {name}, which is a built-in one; give another name")
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
            raise ValueError(f"protocol {value.get('kind')!r} is not known; there are {', '.join(_KINDS)}")
        return value

    @model_validator(mode="after")
    def _probes_are_fitted(self) -> SuiteConfig:
        if isinstance(self.protocol, _PROBES) != (self.data.train is not None):
            said = "is missing: name what the probe is fitted on" if self.data.train is None else "is only for probes"
            raise ValueError(f"data.train {said} (protocol {self.protocol.kind})")
        return self


def read_suite(value: object) -> str | SuiteConfig:
    """A suite by its built-in name, the path of its YAML file, or its content. Raises ValueError in a sentence."""
    if isinstance(value, SuiteConfig) or (isinstance(value, str) and value in BUILT_IN):
        return value
    if isinstance(value, str):
        if not value.endswith((".yaml", ".yml")):
            names = ", ".join(map(repr, BUILT_IN))
            raise ValueError(f"there is no suite {value!r}; there are {names}, and YAML files by their path")
        return _checked(_read_file(Path(value)), f"{value}: ")
    return _checked(value, "")


def _checked(content: object, where: str) -> SuiteConfig:
    try:
        return SuiteConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in _KINDS)
        known = {"missing": "is missing", "extra_forbidden": "no such key"}
        reason = known.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise ValueError(f"{where}{place}: {reason}" if place else f"{where}{reason}") from None


def _read_file(path: Path) -> object:
    """The content of a suite's file, its paths made absolute: they are relative to the file."""
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
        raise ValueError(f"the suite {str(path)!r} is no YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"the suite {str(path)!r} does not hold the keys name, data and protocol")
    data, protocol = content.get("data"), content.get("protocol")
    if isinstance(data, str):
        content["data"] = data = {"source": data}
    for part, keys in ((data, ("source", "train", "images")), (protocol, ("classes", "prompts", "broader"))):
        if isinstance(part, dict):
            part.update({key: _absolute(path, part[key]) for key in keys if isinstance(part.get(key), str)})
    if isinstance(protocol, dict) and isinstance(protocol.get("templates"), str):
        protocol["templates"] = _absolute(path, protocol["templates"])
    return content


def _absolute(beside: Path, value: str) -> str:
    return value if "://" in value else str(beside.absolute().parent / value)


def check_templates(templates: tuple[str, ...], where: str) -> None:
    """Raises ValueError unless every template has a place for the class."""
    if not templates:
        raise ValueError(f"{where} is empty; write a prompt a line, {{}} for the class")
    wrong = next((each for each in templates if "{}" not in each and "{c}" not in each), None)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong!r} is the same for all classes; write {{}} or {{c}} where the class stands")


def _plain(suite: str | SuiteConfig) -> str | dict[str, Any]:
    return suite if isinstance(suite, str) else suite.model_dump(mode="json")


Suite = Annotated[str | SuiteConfig, PlainValidator(read_suite), PlainSerializer(_plain)]


class EvalConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """When and on what the model is evaluated; it always is at the end."""

    every: int | None = Field(None, gt=0, description="samples between two evaluations; left out: only at the end")
    suites: tuple[Suite, ...] = Field((), strict=False)
    data: str | None = Field(
        None, description="shards to evaluate on; left out: the held-out split of a samples:// source"
    )
    batch: int = Field(128, gt=0, description="pairs embedded at once by each process")
    templates: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(
        default_factory=dict,
        description="zero-shot prompts by label, as in {animal: ['a photo of a {}']}; left out: the bare class name",
    )
    caption_decoding: Literal["greedy", "beam", "nucleus"] = Field(
        "greedy", description="how the captions of the report are written; beam: 4 wide, nucleus: draws from 90%"
    )
    examples: int = Field(12, ge=0, description="pictures shown in the report with their nearest captions")

    @field_validator("suites")
    @classmethod
    def _differ(cls, suites: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [suite if isinstance(suite, str) else suite.name for suite in suites]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two suites are called {twice!r}; their scores could not be told apart, rename one")
        return suites

    @property
    def built_in(self) -> tuple[str, ...]:
        """The suites that run on the run's own evaluation data."""
        return tuple(suite for suite in self.suites if isinstance(suite, str))

    @property
    def own(self) -> tuple[SuiteConfig, ...]:
        """The suites that bring their data."""
        return tuple(suite for suite in self.suites if isinstance(suite, SuiteConfig))

    @property
    def needs_captioner(self) -> bool:
        """Whether one of the suites has the model write captions."""
        return "captioning" in self.suites or any(isinstance(suite.protocol, Captioning) for suite in self.own)
