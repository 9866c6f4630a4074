"""From a recipe's `objectives:` block to the terms of the loss, and how other packages add theirs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ...models.spec import ModelSpec
from .balance import Balance
from .base import Objective, scheduled
from .caption import Caption
from .config import BalanceConfig, BetweenConfig, CaptionObjectiveConfig, ContrastiveConfig, ObjectiveConfig
from .contrastive import Between, Contrastive, LateContrastive, SigmoidContrastive

GROUP = "treering.objectives"
"""The entry points of other packages' objectives: name = module, and importing the module registers."""

Config = TypeVar("Config", bound=ObjectiveConfig)


class Registered(NamedTuple):
    """How an objective is configured and made."""

    config: type[ObjectiveConfig]
    build: Callable[[Any, int], Objective]
    """(config, seed) -> the objective"""


_registry: dict[str, Registered] = {}


def register(name: str, config: type[Config]) -> Callable[[Callable[[Config, int], Objective]], Any]:
    """Decorator of a function (config, seed) -> objective; the recipe then knows `name` under `objectives.more`."""

    def keep(build: Callable[[Config, int], Objective]) -> Callable[[Config, int], Objective]:
        assert name not in _registry, f"there are two objectives called {name!r}"
        _registry[name] = Registered(config, build)
        return build

    return keep


def registered(name: str) -> Registered:
    """The objective called `name`, from this package or another one that is installed. Raises ValueError."""
    if name not in _registry:
        for entry in entry_points(group=GROUP, name=name):
            entry.load()
    if name not in _registry:
        raise ValueError(
            f"there is no objective {name!r}; there are {', '.join(sorted(_registry))}. "
            f"A package offers its own through the entry point group {GROUP}"
        )
    return _registry[name]


@register("contrastive", ContrastiveConfig)
def _contrastive(config: ContrastiveConfig, seed: int) -> Objective:
    if config.kind == "sigmoid":
        return SigmoidContrastive(config.weight, config.positives, config.softening)
    kind = LateContrastive if config.kind == "filip" else Contrastive
    return kind(config.weight, config.positives, config.softening)


@register("caption", CaptionObjectiveConfig)
def _caption(config: CaptionObjectiveConfig, seed: int) -> Objective:
    return Caption(config.weight, config.parallel, seed)


@register("balance", BalanceConfig)
def _balance(config: BalanceConfig, seed: int) -> Objective:
    return Balance(config.weight)


@register("further", BetweenConfig)
def _further(config: BetweenConfig, seed: int) -> Objective:
    return Between(config.weight, config.positives, config.softening, config.between)


def _configs(config: ObjectivesConfig) -> dict[str, tuple[str, ObjectiveConfig]]:
    """By the objective's name, what it is registered under and its block."""
    own = {"contrastive": config.contrastive, "caption": config.caption, "balance": config.balance}
    more = {name: registered(name).config.model_validate(fields) for name, fields in config.more.items()}
    found = {name: (name, one) for name, one in {**own, **more}.items() if one is not None}
    return found | {_further(term, 0).name: ("further", term) for term in config.further}


def build_objectives(config: ObjectivesConfig, spec: ModelSpec | None = None, seed: int = 0) -> list[Objective]:
    """The objectives of a recipe, in a fixed order; with a `spec`, those that a model of it has the parts for."""
    built = [registered(name).build(one, seed) for name, one in _configs(config).values()]
    return [objective for objective in built if spec is None or not _missing(objective, spec)]


def check_needs(config: ObjectivesConfig, spec: ModelSpec) -> None:
    """Raises ValueError for an objective that a model of `spec` lacks a part for."""
    parts = {
        "bias": ("a learned bias", "add `logit_bias: true` to model"),
        "caption": ("a captioner", "add `caption: {depth: 2}` to model"),
        "routing": ("a mixture of experts", "set model.image.experts or model.text.experts to 2 or more"),
    }
    for objective in build_objectives(config):
        for need in _missing(objective, spec):
            part, remedy = parts.get(need) or (f"a tower called {need!r}", f"describe it under model.further.{need}")
            key = f"{'more.' if objective.name in config.more else ''}{objective.name}"
            raise ValueError(f"objectives.{key} needs {part}; {remedy}, or drop the objective")


def _missing(objective: Objective, spec: ModelSpec) -> list[str]:
    mixtures = any(tower.experts > 1 for tower in spec.transformers().values())
    there = {"caption": spec.caption is not None, "bias": spec.logit_bias, "routing": mixtures}
    return sorted(need for need in objective.needs if not there.get(need, True)) or sorted(
        objective.further - spec.further.keys()
    )


def advance(objectives: list[Objective], config: ObjectivesConfig, progress: float) -> None:
    """Set the weights for the step at a share `progress` of the run."""
    configs = _configs(config)
    for objective in objectives:
        _, one = configs[objective.name]
        objective.weight = one.weight * scheduled(one.schedule, progress)


class ObjectivesConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The weighted terms of the loss; an objective left out does not run."""

    contrastive: ContrastiveConfig | None = None
    caption: CaptionObjectiveConfig | None = None
    balance: BalanceConfig | None = None
    further: tuple[BetweenConfig, ...] = Field(
        (), strict=False, description="contrastive terms of further towers, as in [{between: [audio, text]}]"
    )
    more: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="other registered objectives by name, as in {uniformity: {weight: 0.1}}"
    )

    @model_validator(mode="after")
    def _contrastive_present(self) -> Self:
        if self.contrastive is None:
            raise ValueError(
                "objectives has no contrastive term to train the embeddings; add `contrastive: {weight: 1.0}`"
            )
        return self

    @field_validator("further")
    @classmethod
    def _each_once(cls, value: tuple[BetweenConfig, ...]) -> tuple[BetweenConfig, ...]:
        seen: set[frozenset[str]] = set()
        for term in value:
            if frozenset(term.between) in seen:
                raise ValueError(f"further compares {' and '.join(term.between)} twice; give one of them more weight")
            seen.add(frozenset(term.between))
        return value

    @field_validator("more")
    @classmethod
    def _registered(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        pass

        resolved = {}
        for name, fields in value.items():
            if name in cls.model_fields:
                raise ValueError(f"{name} has a key of its own; write it as objectives.{name}")
            try:
                resolved[name] = registered(name).config.model_validate(fields).model_dump(mode="json")
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{name}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return resolved
