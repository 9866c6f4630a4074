"""A mixture of experts from a dense MLP (sparse upcycling, Komatsuzaki et al., arXiv 2212.05055), and a larger mixture.

From a dense MLP: every expert is a copy of it, and the gates of the experts that a token goes through sum to one, so
their mixture is the MLP whatever the router says. The router is drawn afresh: it sends experts different tokens, which
makes them diverge. Each of e experts sees about 1/e of the gradient, hence exp_avg / e and exp_avg_sq / e^2.

From a mixture: experts and their router rows are repeated. If a token goes through k times as many of k times as many
experts, it goes through all k copies of those it went through before, each with 1/k of its gate. The function is kept,
but plain copies would stay copies, each with 1/k of the gradient. Noise in their output projections makes them diverge;
it sums to zero over the copies of an expert, as their gates are equal. Any other number of experts is lossy: copies
compete, and noise in the router's rows decides between them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from ..parts import stream_of
from .operator import NOISE, Rule, TensorMap, fresh
from .options import WidthInit

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_ROUTER = ".mlp.router.weight"


@dataclass(frozen=True)
class MoreExperts:
    """Grow every mixture of `tower` from `old` to `new` experts, and the captioner's if that is `text`."""

    tower: str
    old: int
    new: int
    active: tuple[int, int]
    """experts that a token goes through, before and after"""
    width_init: WidthInit
    seed: int

    @property
    def preserves(self) -> bool:
        """True if a token goes through all copies of the experts it went through before."""
        return self.new % self.old == 0 and self.new * self.active[0] == self.old * self.active[1]

    def rule(self, name: str) -> Rule:
        """Experts and router rows are copied, with moments divided by the number of copies; the rest is kept."""
        if stream_of(name) != self.tower:
            return Rule(name)
        if name.endswith(_ROUTER):
            return Rule(name, {"model": self._rows(0, name), "exp_avg": self._rows(1), "exp_avg_sq": self._rows(2)})
        found = _EXPERT.search(name)
        if not found:
            return Rule(name)
        number = int(found[1])
        source = name.replace(found[0], f".mlp.experts.{number % self.old}.")
        maps = {"exp_avg": self._divided(number, 1), "exp_avg_sq": self._divided(number, 2)}
        if self.preserves and self.width_init != "duplicate" and name.endswith("down.weight"):
            maps["model"] = self._with_noise(source, number)
        return Rule(source, maps)

    def _copies(self, number: int) -> range:
        """All experts that are copies of the same one as expert `number`."""
        return range(number % self.old, self.new, self.old)

    def _divided(self, number: int, power: int) -> TensorMap:
        return lambda tensor: tensor / len(self._copies(number)) ** power

    def _with_noise(self, source: str, number: int) -> TensorMap:
        return lambda tensor: tensor + self._noise(source, number, tensor)

    def _noise(self, source: str, number: int, like: Tensor) -> Tensor:
        """Noise on one copy; it sums to zero over the copies, and is as large as that in `width.py`."""
        every = self._copies(number)
        name = f"grow/{self.tower}.experts/{self.old}-{self.new}/{source}"
        generators = [named_generator(self.seed, f"{name}/{copy // self.old}") for copy in every]
        draws = [torch.randn(like.shape, generator=generator).to(like) for generator in generators]
        centred = draws[number // self.old] - sum(draws) / len(draws)
        size = like.square().mean().sqrt() * (1.0 if self.width_init == "lemon" else NOISE)
        # Taking away the mean of c draws leaves (c - 1) / c of their power.
        return centred * (len(draws) / max(1, len(draws) - 1)) ** 0.5 * size

    def _rows(self, power: int, noise_name: str = "") -> TensorMap:
        """The router's rows, each divided by the number of its copies to the `power`."""

        def rows(tensor: Tensor) -> Tensor:
            made = [tensor[number % self.old] / len(self._copies(number)) ** power for number in range(self.new)]
            if noise_name and self.width_init != "duplicate" and not self.preserves:
                made = [
                    row + self._noise(f"{noise_name}/{number % self.old}", number, row)
                    for number, row in enumerate(made)
                ]
            return torch.stack(made)

        return rows

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        numbers = {"from": self.old, "to": self.new, "active": list(self.active), "seed": self.seed}
        return {"operator": "more_experts", "field": f"{self.tower}.experts", "width_init": self.width_init, **numbers}


@dataclass(frozen=True)
class Upcycle:
    """Turn every MLP of `tower` into `experts` experts, and the captioner's if that is `text`."""

    tower: str
    experts: int
    width: int
    """channels of the stream that the router reads"""
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """MLPs are copied; a router takes the mean second moment of its MLP's biases, which every optimizer has."""
        if stream_of(name) != self.tower:
            return Rule(name)
        if name.endswith(_ROUTER):
            maps = fresh((self.experts, self.width), lambda: self._draw(name))
            return Rule(name.replace("router.weight", "up.bias"), maps, fresh=True)
        if _EXPERT.search(name):
            return Rule(_EXPERT.sub(".mlp.", name), {"exp_avg": self._divided(1), "exp_avg_sq": self._divided(2)})
        return Rule(name)

    def _divided(self, power: int) -> TensorMap:
        return lambda tensor: tensor / self.experts**power

    def _draw(self, name: str) -> Tensor:
        generator = named_generator(self.seed, f"grow/experts/{name}")
        return torch.randn((self.experts, self.width), generator=generator) * self.width**-0.5

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "experts", "field": f"{self.tower}.experts", "to": self.experts, "seed": self.seed}
