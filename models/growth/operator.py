"""A growth operator: for every tensor of the grown model, one old tensor and one map per kind of state.

The same rule makes a weight and its two Adam moments and carries its learning rate, so optimizer state is never thrown
away. A plan is applied one tensor at a time: memory is bounded by the largest tensor, not by the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

TensorMap = Callable[[Tensor], Tensor]
Read = Callable[[str, str], Tensor]
"""(kind of state, tensor name) -> tensor"""

NOISE = 10 ** (-10 / 20)
"""size of the noise on copies relative to the weights: a signal-to-noise ratio of 10 dB, as in HyperCloning"""
OUTPUT_PROJECTIONS = re.compile(
    r"\.(attention\.out|cross\.out|(?:cross_)?mlp\.(?:experts\.\d+\.)?down)\.(weight|bias)$"
)
"""the tensors of a block that write into the residual stream: a block adds nothing if all of them are zero"""


def keep(tensor: Tensor) -> Tensor:
    """The tensor unchanged."""
    return tensor


def zero(tensor: Tensor) -> Tensor:
    """Zeros of the tensor's shape."""
    return torch.zeros_like(tensor)


def alike(tensor_map: TensorMap) -> dict[str, TensorMap]:
    """The same map for weights and both moments."""
    return dict.fromkeys(("model", "exp_avg", "exp_avg_sq"), tensor_map)


def fresh(
    shape: Sequence[int], draw: Callable[[], Tensor], second_moment: Literal["mean", "zero"] = "mean"
) -> dict[str, TensorMap]:
    """Maps for a tensor of `shape` that has no original: weights from `draw`, no momentum.

    The source of the rule only lends its dtype and device, and the mean of its second moment, so that the first steps
    are about as long as the source's; with `zero` the optimizer has seen nothing of it.
    """

    def weights(source: Tensor) -> Tensor:
        return draw().to(source)

    def none(source: Tensor) -> Tensor:
        return source.new_zeros(shape)

    def mean(source: Tensor) -> Tensor:
        return source.mean().expand(shape).clone()

    return {"model": weights, "exp_avg": none, "exp_avg_sq": mean if second_moment == "mean" else none}


def along(values: Tensor, dim: int, like: Tensor) -> Tensor:
    """A vector reshaped to broadcast along dimension `dim` of `like`, in its dtype and on its device."""
    return values.view([-1 if d == dim else 1 for d in range(like.ndim)]).to(like)


def block_of(stack: str, name: str) -> tuple[int, str] | None:
    """The block number and the rest of the name of a tensor in the block list `stack`; None if it is not in there."""
    prefix = f"{stack}."
    if not name.startswith(prefix):
        return None
    number, _, rest = name.removeprefix(prefix).partition(".")
    return int(number), rest


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
    """(mapped weights, mapped running average of the weights) -> weights, where both are needed"""
    fresh: bool = False
    """whether the weights are drawn anew: they have a learning rate of their own, and not the source's"""

    def apply(self, kind: str, tensor: Tensor) -> Tensor:
        """The new tensor of this kind; `ema`, a running average of the weights, is mapped as the weights are."""
        return self.maps.get("model" if kind == "ema" else kind, keep)(tensor)


class Operator(Protocol):
    """One step of a growth plan."""

    @property
    def preserves(self) -> bool:
        """Whether the new model computes the same function; otherwise the operator is lossy."""
        ...

    def rule(self, name: str) -> Rule:
        """How the tensor `name` of the grown model is made."""
        ...

    def describe(self) -> dict[str, Any]:
        """The operator and its numbers, for the lineage."""
        ...


def grown(operators: Sequence[Operator], read: Read) -> Read:
    """A reader of the grown model on top of `read`, which reads the old one; tensors are made when they are read."""
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


def source_of(operators: Sequence[Operator], name: str) -> str:
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
        if rule.fresh:
            return factor
    return factor * rates.get(name, 1.0)


def is_fresh(operators: Sequence[Operator], name: str) -> bool:
    """Whether tensor `name` of the grown model was drawn anew, at the last or at an earlier operator."""
    for operator in reversed(operators):
        rule = operator.rule(name)
        if rule.fresh:
            return True
        name = rule.source
    return False


class GrownState(Mapping[str, Tensor]):
    """The state of a grown model by `kind/name`: each tensor is made when it is read, and not kept."""

    def __init__(self, operators: Sequence[Operator], old: Mapping[str, Tensor], paths: Iterable[str]) -> None:
        """`old` is the state before by `kind/name`; `paths` are those of the grown model."""
        self._read = grown(operators, lambda kind, name: old[f"{kind}/{name}"])
        self._paths = list(paths)

    def __getitem__(self, path: str) -> Tensor:
        kind, _, name = path.partition("/")
        return self._read(kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
