"""How much of the old weights and of the optimizer's state the grown model inherits.

Parameter inheriting with momentum is after GrowCLIP (ICCV 2023). A RECONSTRUCTION: its formula is not public. Two
readings of it are here.

`InheritAverage`: old entries keep their weights, and new ones (new blocks, and the copies that a longer axis is made
of) take those of a running average of the weights. So does AutoProg (Li et al., CVPR 2022), by one of GrowCLIP's
authors; it keeps four averages, and here it is that of `optimizer.ema`.

`Inherit`: the grown model starts from m * inherited + (1 - m) * fresh, with a momentum m < 1, which leaves the small
model's local minimum and is shrink-and-perturb (Ash and Adams, arXiv 1910.08475). m = 1 inherits everything. Fresh
values are drawn for this growth alone: those that the run itself began with would only shrink what it learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import empty, initialise, named_generator
from ..parts import part_of, parts
from ..spec import ModelSpec, TowerSpec
from .axes import uses
from .depth import Depth
from .operator import Rule, along, block_of, zero


@dataclass(frozen=True)
class Inherit:
    """Blend the matrices of a model of `spec`, grown from `old`, with freshly initialised ones; vectors and scalars
    stay."""

    old: ModelSpec
    spec: ModelSpec
    momentum: float
    seed: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Moments stay: they are of the weights' size, which the blend does not change."""
        if name not in self._matrices:
            return Rule(name)

        def blend(tensor: Tensor) -> Tensor:
            drawn = torch.empty(tensor.shape)
            initialise(self.spec, [(name, drawn)], self._own_seed)
            return self.momentum * tensor + (1 - self.momentum) * drawn.to(tensor)

        return Rule(name, {"model": blend}, fresh=self.momentum == 0)

    @cached_property
    def _matrices(self) -> frozenset[str]:
        return frozenset(name for name, p in empty(self.spec).named_parameters() if p.ndim >= 2)

    @cached_property
    def _own_seed(self) -> int:
        """That of this growth's draws: the run's first weights have the run's seed and the same names."""
        growth = f"grow/inherit/{self.old.model_dump_json()}/{self.spec.model_dump_json()}"
        return named_generator(self.seed, growth).initial_seed()

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "inherit", "momentum": self.momentum, "seed": self.seed, "reconstruction": True}


@dataclass(frozen=True)
class InheritAverage:
    """Take what is new in a model of `new`, grown from one of `old`, from the running average, grown likewise."""

    old: ModelSpec
    new: ModelSpec
    depths: tuple[Depth, ...]
    """the operators that inserted blocks"""

    @property
    def preserves(self) -> bool:
        """New blocks still output zero, so depth alone is exact; new channels feed existing sums, so width is lossy."""
        after = self.new.towers()
        return all(_sizes(spec) == _sizes(after[tower]) for tower, spec in self.old.towers().items())

    def rule(self, name: str) -> Rule:
        """Whole tensors of new parts and blocks; of other tensors the entries that belong to new units."""
        if self._is_new(name):
            return Rule(name, mix=lambda weights, average: average)
        found = [(self._new_units(use.axis), use.dim) for use in uses(name, self.new)]

        def mix(weights: Tensor, average: Tensor) -> Tensor:
            new = torch.zeros(weights.shape, dtype=torch.bool)
            for units, dim in found:
                new |= along(units, dim, new)
            return torch.where(new.to(weights.device), average, weights)

        return Rule(name, mix=mix if any(units.any() for units, _ in found) else None)

    def _is_new(self, name: str) -> bool:
        part, had = part_of(name), {part.name for part in parts(self.old)}
        if part not in had and any(part == each.name for each in parts(self.new)):
            return True
        found = [(depth, block_of(depth.stack, name)) for depth in self.depths]
        return any(depth.source(block[0])[1] for depth, block in found if block)

    def _new_units(self, axis: str) -> Tensor:
        """For every channel of an axis, whether it is new: bool."""
        tower, _, size = axis.rpartition(".")
        new = self.new.towers()[tower]
        old = self.old.towers().get(tower, new)
        if size != "heads":
            return torch.arange(getattr(new, size)) >= getattr(old, size)
        heads, channels = torch.arange(new.heads) >= old.heads, torch.arange(new.head_width) >= old.head_width
        return (heads[:, None] | channels).flatten()

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "inherit", "new_from": "ema", "reconstruction": True}


def _sizes(spec: TowerSpec) -> tuple[int, ...]:
    return spec.width, spec.heads, spec.head_width, spec.mlp_width


@dataclass(frozen=True)
class ResetMoments:
    """Set optimizer moments to zero; the weights stay."""

    kinds: tuple[str, ...]
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Zeros for these kinds of state."""
        return Rule(name, dict.fromkeys(self.kinds, zero))

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "reset_moments", "moments": list(self.kinds)}
