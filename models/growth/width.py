"""Longer axes: more channels in the stream, more heads, more hidden units. One operator, one axis at a time.

New units are copies of old ones. What writes the axis is repeated, what reads it is divided by the number of copies:
the sums stay what they were (Net2Net, Chen et al., arXiv 1511.05641). In gradients it is the other way round: each of c
copies receives 1/c of its original's, while a divided reader receives all of it. Hence, with c copies:

              weight   exp_avg   exp_avg_sq   learning rate
    writers   w        m/c       v/c^2        1
    readers   w/c      m         v            old/new, and weight decay x new/old

so that plain copies follow the small model exactly, step by step (up to Adam's eps and the clipping of the whole
gradient). They would do so for ever; the noise of `copies: noise` ends that. It sums to zero over the copies of a unit,
so the function does not see it (HyperCloning, Samragh et al., arXiv 2409.12903).

A norm averages over the stream, so a stream grows by whole factors only; heads and hidden units grow to any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from .axes import uses
from .plan import Copies
from .rules import Rule, TensorMap

_NOISE = 10 ** (-10 / 20)
"""size of the noise relative to the divided weights: a signal-to-noise ratio of 10 dB, as in HyperCloning"""


@dataclass(frozen=True)
class Widen:
    """Grow one axis from `old` to `new` units of `unit` channels each."""

    axis: str
    """as in `axes.py`"""
    old: int
    new: int
    unit: int
    copies: Copies
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors that do not touch the axis are kept; for the others see the module."""
        use = next((use for use in uses(name) if use.axis == self.axis), None)
        if use is None:
            return Rule(name)
        if use.reads:
            maps = {"model": self._split(use.dim, name), "exp_avg": self._repeat(use.dim, 0)}
            return Rule(name, {**maps, "exp_avg_sq": self._repeat(use.dim, 0)}, rate=self.old / self.new)
        return Rule(name, {kind: self._repeat(use.dim, power) for kind, power in _WRITER.items()})

    def channels(self) -> tuple[Tensor, Tensor]:
        """Of every new channel: the old one that it copies, and how many copies of that there are; int64 [channels]."""
        units = torch.arange(self.new) % self.old
        sources = (units[:, None] * self.unit + torch.arange(self.unit)).flatten()
        return sources, sources.bincount()[sources]

    def _repeat(self, dim: int, power: int) -> TensorMap:
        """Copies along `dim`, each divided by their number to the `power`."""

        def repeat(tensor: Tensor) -> Tensor:
            sources, counts = self.channels()
            copied = tensor.index_select(dim, sources.to(tensor.device))
            return copied / _along(counts, dim, copied) ** power if power else copied

        return repeat

    def _split(self, dim: int, name: str) -> TensorMap:
        """Copies along `dim` that sum to their original."""
        divide = self._repeat(dim, 1)

        def split(tensor: Tensor) -> Tensor:
            parts = divide(tensor)
            return parts if self.copies == "duplicate" else parts + self._noise(parts, dim, name)

        return split

    def _noise(self, parts: Tensor, dim: int, name: str) -> Tensor:
        """Normal noise that sums to zero over the copies of every channel; zero where there is only one."""
        generator = named_generator(self.seed, f"grow/{self.axis}/{self.old}-{self.new}/{name}")
        noise = torch.randn(parts.shape, generator=generator).to(parts)
        sources, counts = self.channels()
        sources, c = sources.to(parts.device), _along(counts, dim, parts)
        shape = list(parts.shape)
        shape[dim] = self.old * self.unit
        means = noise.new_zeros(shape).index_add(dim, sources, noise).index_select(dim, sources) / c
        # Taking the mean of c draws away leaves (c - 1) / c of their power.
        return (noise - means) * (c / (c - 1).clamp(min=1)).sqrt() * parts.square().mean().sqrt() * _NOISE

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        numbers = {"from": self.old, "to": self.new, "copies": self.copies, "seed": self.seed}
        return {"operator": "widen", "field": self.axis, **numbers}


_WRITER = {"model": 0, "exp_avg": 1, "exp_avg_sq": 2}
"""the power of the number of copies that each kind of a writer is divided by"""


def _along(values: Tensor, dim: int, like: Tensor) -> Tensor:
    """A vector laid along dimension `dim` of `like`, in its type."""
    return values.view([-1 if d == dim else 1 for d in range(like.ndim)]).to(like)
