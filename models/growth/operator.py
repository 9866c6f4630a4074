"""What a growth operator is: for every tensor of the grown model, one old tensor and one map per kind of state.

The same rule makes a weight and its two Adam moments, and carries its learning rate, so optimizer state is never thrown
away, and a plan is applied one tensor at a time: memory is bounded by the largest tensor, not by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

TensorMap = Callable[[Tensor], Tensor]
Read = Callable[[str, str], Tensor]
"""(kind of state, tensor name) -> tensor"""


def keep(tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def zero(tensor: Tensor) -> Tensor:
    """Zeros in the tensor's place."""
    return torch.zeros_like(tensor)


@dataclass(frozen=True)
class Rule:
    """How one tensor of the grown model is made. Kinds without a map of their own are kept."""

    source: str
    """name of the tensor it is made from, in the model before the operator"""
    maps: Mapping[str, TensorMap] = field(default_factory=dict)
    """by kind of state: `model`, `exp_avg`, `exp_avg_sq`"""
    rate: float = 1.0
    """factor on the source's learning rate; its weight decay is divided by it"""
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    """makes the weights of what `maps` make of the source and of the source's running average, where both are needed"""

    def apply(self, kind: str, tensor: Tensor) -> Tensor:
        """The new tensor of this kind; `ema`, a running average of the weights, is made as the weights are."""
        return self.maps.get("model" if kind == "ema" else kind, keep)(tensor)


class Operator(Protocol):
    """One step of a growth plan."""

    @property
    def preserves(self) -> bool:
        """Whether the new model computes the same function; where it does not, the operator is lossy."""
        ...

    def rule(self, name: str) -> Rule:
        """How the tensor `name` of the grown model is made."""
        ...

    def describe(self) -> dict[str, Any]:
        """The operator and its numbers, for the lineage."""
        ...


def grown(operators: Sequence[Operator], read: Read) -> Read:
    """Read from the grown model: `read` reads from the old one, and tensors are made when they are asked for."""
    for operator in operators:
        read = _through(operator, read)
    return read


def _through(operator: Operator, read: Read) -> Read:
    def read_grown(kind: str, name: str) -> Tensor:
        rule = operator.rule(name)
        made = rule.apply(kind, read(kind, rule.source))
        if rule.mix is None or kind != "model":
            return made
        return rule.mix(made, rule.apply("ema", read("ema", rule.source)))

    return read_grown


def origin(operators: Sequence[Operator], name: str) -> str:
    """The tensor of the old model that tensor `name` of the grown one is made from."""
    for operator in reversed(operators):
        name = operator.rule(name).source
    return name


def grown_rate(operators: Sequence[Operator], rates: Mapping[str, float], name: str) -> float:
    """The learning-rate multiplier of tensor `name` of the grown model; `rates` are the old ones that are not 1."""
    factor = 1.0
    for operator in reversed(operators):
        rule = operator.rule(name)
        factor, name = factor * rule.rate, rule.source
    return factor * rates.get(name, 1.0)


class GrownState(Mapping[str, Tensor]):
    """The state of a grown model by `kind/name`: each tensor is made when it is asked for, and not kept."""

    def __init__(self, operators: Sequence[Operator], old: Mapping[str, Tensor], paths: Iterable[str]) -> None:
        """`old` is the state before, by `kind/name`; `paths` are those of the grown model."""
        self._read = grown(operators, lambda kind, name: old[f"{kind}/{name}"])
        self._paths = list(paths)

    def __getitem__(self, path: str) -> Tensor:
        kind, _, name = path.partition("/")
        return self._read(kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
