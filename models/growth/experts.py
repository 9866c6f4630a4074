"""A mixture of experts from a dense MLP (sparse upcycling, Komatsuzaki et al., arXiv 2212.05055), and a larger one.

From a dense MLP: every expert is the MLP, and the gates of the experts that a token goes through sum to one, so their
mixture is the MLP whatever the router says. The router is drawn afresh: it sends experts different tokens, which tells
them apart. Each of e experts sees about 1/e of the gradient, hence exp_avg / e and exp_avg_sq / e^2.

From a mixture: experts are repeated, and their routers' rows. Where a token goes through k times as many of k times as
many experts, it goes through all k copies of those it went through before, each with 1/k of its gate: the function
stays, and so do plain copies, each of which gets 1/k of the gradient. What tells them apart is noise in the maps that
write, which sums to zero over the copies of an expert, as their gates are alike. Any other number of experts is lossy:
copies compete, and noise in the router's rows decides between them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from ..spec import part_of
from .operator import Rule, TensorMap
from .plan import Copies
from .width import NOISE

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class MoreExperts:
    """Grow every mixture of `tower` from `old` to `new` experts, and the captioner's if that is `text`."""

    tower: str
    old: int
    new: int
    active: tuple[int, int]
    """experts that a token goes through, before and after"""
    copies: Copies
    seed: int

    @property
    def preserves(self) -> bool:
        """Where a token goes through all copies of what it went through."""
        return self.new % self.old == 0 and self.new * self.active[0] == self.old * self.active[1]

    def rule(self, name: str) -> Rule:
        """Experts and rows are copied, with their share of the moments; the rest is kept."""
        part = part_of(name)
        if ("text" if part == "captioner" else part) != self.tower:
            return Rule(name)
        if name.endswith(".mlp.router.weight"):
            return Rule(name, {"model": self._rows(0, name), "exp_avg": self._rows(1), "exp_avg_sq": self._rows(2)})
        found = _EXPERT.search(name)
        if not found:
            return Rule(name)
        number = int(found[1])
        source = name.replace(found[0], f".mlp.experts.{number % self.old}.")
        maps = {"exp_avg": self._divided(number, 1), "exp_avg_sq": self._divided(number, 2)}
        if self.preserves and self.copies != "duplicate" and name.endswith("down.weight"):
            maps["model"] = self._told_apart(source, number)
        return Rule(source, maps)

    def _copies(self, number: int) -> range:
        """All experts that are copies of the same one as expert `number`."""
        return range(number % self.old, self.new, self.old)

    def _divided(self, number: int, power: int) -> TensorMap:
        def divided(tensor: Tensor) -> Tensor:
            return tensor / len(self._copies(number)) ** power

        return divided

    def _told_apart(self, source: str, number: int) -> TensorMap:
        def told_apart(tensor: Tensor) -> Tensor:
            return tensor + self._noise(source, number, tensor)

        return told_apart

    def _noise(self, source: str, number: int, like: Tensor) -> Tensor:
        """What is added to a copy: it sums to zero over the copies, and is of the size of that in `width.py`."""
        every = self._copies(number)
        name = f"grow/{self.tower}.experts/{self.old}-{self.new}/{source}"
        generators = [named_generator(self.seed, f"{name}/{copy // self.old}") for copy in every]
        draws = [torch.randn(like.shape, generator=generator).to(like) for generator in generators]
        apart = draws[number // self.old] - sum(draws) / len(draws)
        size = like.square().mean().sqrt() * (1.0 if self.copies == "lemon" else NOISE)
        return apart * (len(draws) / max(1, len(draws) - 1)) ** 0.5 * size

    def _rows(self, power: int, noisy: str = "") -> TensorMap:
        """The router's rows, each divided by the number of its copies to the `power`."""

        def rows(tensor: Tensor) -> Tensor:
            made = [tensor[number % self.old] / len(self._copies(number)) ** power for number in range(self.new)]
            if noisy and self.copies != "duplicate" and not self.preserves:
                made = [
                    row + self._noise(f"{noisy}/{number % self.old}", number, row) for number, row in enumerate(made)
                ]
            return torch.stack(made)

        return rows

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        numbers = {"from": self.old, "to": self.new, "active": list(self.active), "seed": self.seed}
        return {"operator": "more_experts", "field": f"{self.tower}.experts", "copies": self.copies, **numbers}


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
        """MLPs are copied; a router's second moment is the mean of its MLP's biases, which no optimizer lacks."""
        part = part_of(name)
        if ("text" if part == "captioner" else part) != self.tower:
            return Rule(name)
        if name.endswith(".mlp.router.weight"):
            return Rule(name.replace("router.weight", "up.bias"), self._router(name))
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
