"""The registry of objectives: each registers itself in its own file; other packages use an entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter

from .base import Objective
from .config import ObjectiveConfig

GROUP = "treering.objectives"
"""entry-point group for objectives of other packages: name = module; importing the module registers the objective"""

Config = TypeVar("Config", bound=ObjectiveConfig)


class Registered(NamedTuple):
    """How an objective is configured and built."""

    config: type[ObjectiveConfig]
    build: Callable[[Any, int], Objective]
    """(config, seed) -> the objective"""
    annotation: Any
    """the type of its recipe entry: a config, or a tuple of configs"""

    def validate(self, value: Any) -> ObjectiveConfig | tuple[ObjectiveConfig, ...]:
        """The recipe entry `value` as config objects. Raises pydantic's ValidationError."""
        checked: ObjectiveConfig | tuple[ObjectiveConfig, ...] = TypeAdapter(self.annotation).validate_python(value)
        return checked


_registry: dict[str, Registered] = {}


def register(
    name: str, config: type[Config], several: Callable[[tuple[Config, ...]], tuple[Config, ...]] | None = None
) -> Callable[[Callable[[Config, int], Objective]], Any]:
    """Decorator for a function (config, seed) -> objective; adds the key `name` to the recipe's `objectives`.

    With `several` the entry is a list of configs; `several` checks the list and returns it, or raises ValueError.
    """
    many = Annotated[tuple[config, ...], Field(strict=False), AfterValidator(several)]  # type: ignore[valid-type]

    def keep(build: Callable[[Config, int], Objective]) -> Callable[[Config, int], Objective]:
        assert name not in _registry, f"two objectives are called {name!r}"
        _registry[name] = Registered(config, build, many if several else config)
        return build

    return keep


def names() -> list[str]:
    """The names of the registered objectives, sorted."""
    return sorted(_registry)


def registered(name: str) -> Registered:
    """The objective called `name`, from this package or another installed one. Raises ValueError if there is none."""
    if name not in _registry:
        for entry in entry_points(group=GROUP, name=name):
            try:
                entry.load()
            except Exception as error:  # whatever another package's code causes
                raise ValueError(
                    f"objective {name!r} cannot be loaded from {entry.value} ({type(error).__name__}: {error}); repair "
                    f"that package"
                ) from None
    if name not in _registry:
        known = sorted({*_registry, *(entry.name for entry in entry_points(group=GROUP))})
        raise ValueError(
            f"objective {name!r} is not known; the objectives are {', '.join(known)}. Install the package that "
            f"registers it, through the entry point group {GROUP}, or correct the name"
        )
    return _registry[name]
