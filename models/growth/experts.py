"""A mixture of experts from a dense MLP (sparse upcycling, Komatsuzaki et al., arXiv 2212.05055).

Every expert is the MLP, and the gates of the experts that a token goes through sum to one, so their mixture is the MLP
whatever the router says. The router is drawn afresh: it sends experts different tokens, which is what tells them apart.
Each of e experts sees about 1/e of the gradient, hence exp_avg / e and exp_avg_sq / e^2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from ..spec import part_of
from .rules import Rule, TensorMap

_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")


@dataclass(frozen=True)
class Upcycle:
    """Make `experts` of every MLP of `tower`, and of the captioner's if that is `text`."""

    tower: str
    experts: int
    width: int
    """channels of the stream that the router reads"""
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """MLPs are copied; a router's second moment is the mean of its MLP's."""
        part = part_of(name)
        if ("text" if part == "captioner" else part) != self.tower:
            return Rule(name)
        if name.endswith(".mlp.router.weight"):
            return Rule(name.replace("router", "up"), self._router(name))
        if _EXPERT.search(name):
            return Rule(_EXPERT.sub(".mlp.", name), {"exp_avg": self._share(1), "exp_avg_sq": self._share(2)})
        return Rule(name)

    def _share(self, power: int) -> TensorMap:
        def share(tensor: Tensor) -> Tensor:
            return tensor / self.experts**power

        return share

    def _router(self, name: str) -> dict[str, TensorMap]:
        shape = (self.experts, self.width)

        def draw(tensor: Tensor) -> Tensor:
            generator = named_generator(self.seed, f"grow/experts/{name}")
            return (torch.randn(shape, generator=generator) * self.width**-0.5).to(tensor)

        def no_momentum(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(shape)

        def mean(tensor: Tensor) -> Tensor:
            return tensor.mean().expand(shape).clone()

        return {"model": draw, "exp_avg": no_momentum, "exp_avg_sq": mean}

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "experts", "field": f"{self.tower}.experts", "to": self.experts, "seed": self.seed}
