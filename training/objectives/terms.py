"""The terms of a run's loss: the recipe's `objectives:` block, and the objectives built from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self, get_args

from pydantic import BaseModel, SerializeAsAny, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from ...models.spec import ModelSpec
from . import balance as _third  # noqa: F401
from . import caption as _second  # noqa: F401
from . import contrastive as _first  # noqa: F401  importing registers; this order is the order of the loss terms
from .base import Objective, scheduled
from .config import ObjectiveConfig
from .registry import names, registered

Term = SerializeAsAny[ObjectiveConfig] | tuple[SerializeAsAny[ObjectiveConfig], ...]


class ObjectivesConfig(BaseModel, frozen=True, extra="allow"):
    """The weighted terms of the loss by name; an objective that is not listed does not run."""

    __pydantic_extra__: dict[str, Term]

    @model_validator(mode="before")
    @classmethod
    def _each_by_its_own_config(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        terms: dict[str, Any] = {}
        wrong: list[InitErrorDetails] = []
        for name, term in value.items():
            if term is None:
                continue
            try:
                objective = registered(str(name))
            except ValueError as error:
                unknown = PydanticCustomError("unknown_objective", "{reason}", {"reason": str(error)})
                wrong.append(InitErrorDetails(type=unknown, loc=(name,), input=term))
                continue
            try:
                terms[name] = objective.validate(term)
            except ValidationError as error:  # prefix the error's location with the name of the term
                wrong += [
                    InitErrorDetails(type=_kind(d), loc=(name, *d["loc"]), input=d["input"], ctx=d.get("ctx", {}))
                    for d in error.errors()
                ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return {name: terms[name] for name in sorted(terms)}

    @model_validator(mode="after")
    def _embeddings_are_trained(self) -> Self:
        if not any(objective.needs & {"embeddings", "tokens"} for objective in build_objectives(self)):
            raise ValueError(
                "objectives has no contrastive term to train the embeddings; add `contrastive: {weight: 1.0}`"
            )
        return self

    @classmethod
    def recipe_fields(cls, key: str = "") -> dict[str, FieldInfo]:
        """The terms that a recipe may have: the registered ones, and `key` if an installed package provides it."""
        with suppress(ValueError):
            registered(key)
        entries = {name: registered(name) for name in names()}
        return {
            name: FieldInfo(annotation=entry.annotation, default=None, description=entry.config.__doc__)
            for name, entry in entries.items()
        }

    def items(self) -> Iterator[tuple[str, ObjectiveConfig]]:
        """Pairs of a registered name and a config; a list entry gives one pair for each config."""
        for name, term in self.__pydantic_extra__.items():
            for one in term if isinstance(term, tuple) else (term,):
                yield name, one


def _kind(detail: ErrorDetails) -> str | PydanticCustomError:
    """The type of an error: pydantic's name for it, or an error of the config's own with its message."""
    if detail["type"] in get_args(core_schema.ErrorType):
        return detail["type"]
    return PydanticCustomError("own_error", "{reason}", {"reason": detail["msg"]})


def build_objectives(config: ObjectivesConfig, spec: ModelSpec | None = None, seed: int = 0) -> list[Objective]:
    """The objectives of a recipe, in a fixed order; given a `spec`, only those whose needed parts the model has."""
    built = [registered(name).build(one, seed) for name, one in config.items()]
    return [objective for objective in built if spec is None or not _missing(objective, spec)]


def check_needs(config: ObjectivesConfig, spec: ModelSpec) -> None:
    """Raises ValueError if an objective needs a part that `spec` lacks, or if no objective trains a part of it."""
    parts = {
        "bias": ("a learned bias", "add `logit_bias: true` to model"),
        "caption": ("a captioner", "add `captioner: {depth: 2}` to model"),
        "routing": ("a mixture of experts", "set model.image.experts or model.text.experts to 2 or more"),
    }
    objectives = build_objectives(config)
    for objective in objectives:
        for need in _missing(objective, spec):
            part, remedy = parts.get(need) or (f"a tower called {need!r}", f"describe it under model.modalities.{need}")
            raise ValueError(f"objectives.{objective.name} needs {part}; {remedy}, or drop the objective")
    trained = {need for objective in objectives for need in objective.needs}
    if spec.captioner is not None and "caption" not in trained:
        raise ValueError(
            "model.captioner is never trained; add `caption: {weight: 2.0}` to objectives, or drop model.captioner"
        )
    if spec.logit_bias and "bias" not in trained:
        raise ValueError(
            "model.logit_bias is never trained, because a softmax does not depend on it; "
            "set objectives.contrastive.kind: sigmoid, or drop model.logit_bias"
        )


def _missing(objective: Objective, spec: ModelSpec) -> list[str]:
    mixtures = any(tower.experts > 1 for tower in spec.towers().values())
    present = {"caption": spec.captioner is not None, "bias": spec.logit_bias, "routing": mixtures}
    return sorted(need for need in objective.needs if not present.get(need, True)) or sorted(
        objective.modalities - spec.modalities.keys()
    )


def advance(objectives: list[Objective], config: ObjectivesConfig, progress: float) -> None:
    """Set the weights of all objectives to their scheduled values after a fraction `progress` of the run."""
    weights = weights_at(config, progress)
    for objective in objectives:
        objective.weight = weights[objective.name]


def weights_at(config: ObjectivesConfig, progress: float) -> dict[str, float]:
    """The weight of every objective by its name in logs, after a fraction `progress` of the run."""
    configs = {registered(name).build(one, 0).name: one for name, one in config.items()}
    return {name: one.weight * scheduled(one.schedule, progress) for name, one in configs.items()}
