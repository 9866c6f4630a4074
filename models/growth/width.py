"""Longer axes: more channels in the stream, more heads, more hidden units. One operator, one axis at a time.

New units are copies of old ones. Tensors that write the axis are repeated, tensors that read it are divided by the
number of copies, so the sums do not change (Net2Net, Chen et al., arXiv 1511.05641). For gradients it is the other way
round: each of c copies receives 1/c of its original's, while a divided reader receives all of it. Hence, with c copies:

              weight   exp_avg   exp_avg_sq   learning rate
    writers   w        m/c       v/c^2        1
    readers   w/c      m         v            old/new, and weight decay x new/old

so that plain copies follow the small model exactly, step by step (up to Adam's eps and the clipping of the whole
gradient). They would stay copies for ever; the noise of `width_init: noise` makes them diverge. It sums to zero over
the copies of a unit, so the function does not change (HyperCloning, Samragh et al., arXiv 2409.12903). With
`width_init: lemon` the copies of a reader are fresh draws, shifted alike so that their sum is right (LEMON, Wang et
al., arXiv 2310.07999).

Heads and hidden units grow to any number: some get one copy more than others. A norm averages over the stream, so there
only whole copies are made, and the remaining new channels are padded with the stream's mean (LEMON): the mean stays and
the variance shrinks by s = `padding_variance`, which the norms' weights (x sqrt s) and their eps (x s, in the spec)
undo. Behind a norm the padding is exactly zero, so the weights that read it are free and start at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from ..spec import ModelSpec, padding_variance
from .axes import Use, uses
from .operator import NOISE, Rule, TensorMap, along
from .options import WidthInit

_WRITER = {"model": 0, "exp_avg": 1, "exp_avg_sq": 2}
"""the power of the number of copies by which each kind of state of a writer is divided"""


@dataclass(frozen=True)
class Widen:
    """Grow one axis from `old` to `new` units of `unit` channels each."""

    axis: str
    """as `axes.py` names it"""
    old: int
    new: int
    unit: int
    width_init: WidthInit
    seed: int
    spec: ModelSpec | None = None
    """of the grown model; None: one with all defaults"""
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors without the axis are kept; for the others see the module."""
        use = next((use for use in uses(name, self.spec) if use.axis == self.axis), None)
        if use is None:
            return Rule(name)
        if use.reads:
            assert not (use.norm and self.padding), "a spec with such a norm takes whole factors only"
            maps = {"model": self._split(use.dim, name), "exp_avg": self._repeat(use.dim, 0, 0.0)}
            return Rule(name, {**maps, "exp_avg_sq": self._repeat(use.dim, 0)}, rate=self.old / self.new)
        if use.norm and self.padding:
            return self._norm(name)
        fill = None if use.padded else 0.0
        return Rule(name, {kind: self._repeat(use.dim, power, fill) for kind, power in _WRITER.items()})

    def _norm(self, name: str) -> Rule:
        """A norm over a padded stream: weight x sqrt s, gradient / sqrt s, and a bias of zero on the padding."""
        s = padding_variance(self.old, self.new)
        if name.endswith(".bias"):
            return Rule(name, {k: self._repeat(0, n, None if k == "exp_avg_sq" else 0.0) for k, n in _WRITER.items()})
        powers = {"model": 0.5, "exp_avg": -0.5, "exp_avg_sq": -1.0}
        fills = {"model": None, "exp_avg": 0.0, "exp_avg_sq": None}
        maps = {k: _times(s**p, self._repeat(0, _WRITER[k], fills[k])) for k, p in powers.items()}
        return Rule(name, maps, rate=s**0.5)

    @property
    def padding(self) -> int:
        """New channels that are not copies but the stream's mean."""
        return self.new % self.old if self.axis.endswith(".width") else 0

    def channels(self) -> tuple[Tensor, Tensor]:
        """For every copied channel the old one that it copies, and how many copies of that there are; int64."""
        units = torch.arange(self.new - self.padding) % self.old
        sources = (units[:, None] * self.unit + torch.arange(self.unit)).flatten()
        return sources, sources.bincount()[sources]

    def _repeat(self, dim: int, power: int, fill: float | None = None) -> TensorMap:
        """Copies along `dim`, each divided by their number to the `power`; the padding is their mean, or `fill`."""

        def repeat(tensor: Tensor) -> Tensor:
            sources, counts = self.channels()
            copied = tensor.index_select(dim, sources.to(tensor.device))
            copied = copied / along(counts, dim, copied) ** power if power else copied
            if not self.padding:
                return copied
            mean = copied.mean(dim, keepdim=True)
            padding = mean if fill is None else torch.full_like(mean, fill)
            return torch.cat([copied, padding.repeat_interleave(self.padding, dim)], dim)

        return repeat

    def _split(self, dim: int, name: str) -> TensorMap:
        """Copies along `dim` that sum to their original."""
        divide = self._repeat(dim, 1, 0.0)

        def split(tensor: Tensor) -> Tensor:
            parts = divide(tensor)
            if self.width_init == "duplicate":
                return parts
            copied = parts.shape[dim] - self.padding
            draws = torch.randn(parts.shape, generator=self._generator(name)).to(parts)
            size = parts.narrow(dim, 0, copied).square().mean().sqrt()
            made = self._with_noise(parts.narrow(dim, 0, copied), draws.narrow(dim, 0, copied), dim, size)
            return torch.cat([made, draws.narrow(dim, copied, self.padding) * size], dim)

        return split

    def _with_noise(self, parts: Tensor, draws: Tensor, dim: int, size: Tensor) -> Tensor:
        """Divided copies plus draws that sum to zero over the copies of a unit; a single copy stays as it is."""
        sources, counts = self.channels()
        sources, c = sources.to(parts.device), along(counts, dim, parts)
        shape = list(parts.shape)
        shape[dim] = self.old * self.unit
        # The mean of the draws over the copies of each unit, at each copy.
        means = draws.new_zeros(shape).index_add(dim, sources, draws).index_select(dim, sources) / c
        centred = draws - means
        if self.width_init == "lemon":
            return parts + centred * c.sqrt() * size  # as large as a fresh initialisation
        # Taking away the mean of c draws leaves (c - 1) / c of their power.
        return parts + centred * (c / (c - 1).clamp(min=1)).sqrt() * size * NOISE

    def _generator(self, name: str) -> torch.Generator:
        return named_generator(self.seed, f"grow/{self.axis}/{self.old}-{self.new}/{name}")

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        numbers = {"from": self.old, "to": self.new, "width_init": self.width_init, "seed": self.seed}
        return {"operator": "widen", "field": self.axis, **numbers} | ({"padded": self.padding} if self.padding else {})


@dataclass(frozen=True)
class Truncate:
    """Shrink one axis from `old` to `new` units: the first ones are kept. The inverse of growing by plain copies.

    Tensors that read the axis are multiplied by old/new for the units that no longer add to their sums, and what growth
    did to moments and learning rates is undone in the same way. Only for plain copies is nothing lost.
    """

    axis: str
    old: int
    new: int
    unit: int
    spec: ModelSpec | None = None
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Tensors without the axis are kept."""
        use = next((use for use in uses(name, self.spec) if use.axis == self.axis), None)
        if use is None:
            return Rule(name)
        factor = self.old / self.new
        if use.reads:
            cut = self._cut(use)
            return Rule(name, {"model": _times(factor, cut), "exp_avg": cut, "exp_avg_sq": cut}, rate=factor)
        return Rule(name, {kind: _times(factor**power, self._cut(use)) for kind, power in _WRITER.items()})

    def _cut(self, use: Use) -> TensorMap:
        def cut(tensor: Tensor) -> Tensor:
            return tensor.narrow(use.dim, 0, self.new * self.unit).contiguous()

        return cut

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "truncate", "field": self.axis, "from": self.old, "to": self.new, "kept": "first"}


def _times(factor: float, tensor_map: TensorMap) -> TensorMap:
    """A map whose result is multiplied by `factor`."""

    def scaled(tensor: Tensor) -> Tensor:
        return tensor_map(tensor) * factor

    return scaled
