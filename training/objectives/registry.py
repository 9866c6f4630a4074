"""Which objectives there are: each registers itself where it stands, those of other packages too."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter

from .base import Objective
from .config import ObjectiveConfig

GROUP = "treering.objectives"
"""The entry points of other packages' objectives: name = module, and importing the module registers."""

Config = TypeVar("Config", bound=ObjectiveConfig)


class Registered(NamedTuple):
    """How an objective is configured and made."""

    config: type[ObjectiveConfig]
    build: Callable[[Any, int], Objective]
    """(config, seed) -> the objective"""
    annotation: Any
    """what stands under its name in a recipe: a config, or a tuple of them"""

    def validate(self, value: Any) -> ObjectiveConfig | tuple[ObjectiveConfig, ...]:
        """What a recipe says under the name, checked. Raises pydantic's ValidationError."""
        checked: ObjectiveConfig | tuple[ObjectiveConfig, ...] = TypeAdapter(self.annotation).validate_python(value)
        return checked


_registry: dict[str, Registered] = {}


def register(
    name: str, config: type[Config], several: Callable[[tuple[Config, ...]], tuple[Config, ...]] | None = None
) -> Callable[[Callable[[Config, int], Objective]], Any]:
    """Decorator of a function (config, seed) -> objective; the recipe then knows `name` under `objectives`.

    With `several` the recipe has a list of such terms under the name, which `several` returns or refuses by ValueError.
    """
    many = Annotated[tuple[config, ...], Field(strict=False), AfterValidator(several)]  # type: ignore[valid-type]

    def keep(build: Callable[[Config, int], Objective]) -> Callable[[Config, int], Objective]:
        assert name not in _registry, f"there are two objectives called {name!r}"
        _registry[name] = Registered(config, build, many if several else config)
        return build

    return keep


def names() -> list[str]:
    """The objectives that are registered."""
    return sorted(_registry)


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
