"""How much is inherited, of weights and of the optimizer's state.

Parameter inheriting with momentum is after GrowCLIP (ICCV 2023). A RECONSTRUCTION: its formula is not public. There are
two readings of it here.

`InheritAverage`: what was there keeps its weights, and what is new takes those of a running average of them: new
blocks, and the copies that a longer axis is made of. So does AutoProg (Li et al., CVPR 2022), by one of GrowCLIP's
authors; it keeps four averages, and here it is that of `optimizer.ema`.

`Inherit`: the grown model starts from m * inherited + (1 - m) * fresh, with a momentum m < 1, which leaves the small
model's local minimum and is shrink-and-perturb (Ash and Adams, arXiv 1910.08475). m = 1 inherits everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import initialise
from ..spec import ModelSpec, TowerSpec
from .axes import uses
from .depth import Depth
from .operator import Rule, zero
from .width import along


@dataclass(frozen=True)
class Inherit:
    """Blend the matrices of a model of `spec` with freshly initialised ones; vectors and scalars stay."""

    spec: ModelSpec
    momentum: float
    seed: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Moments stay: they are of the weights' size, which the blend does not change."""

        def blend(tensor: Tensor) -> Tensor:
            if tensor.ndim < 2:
                return tensor
            fresh = torch.empty(tensor.shape)
            initialise(self.spec, [(name, fresh)], self.seed)
            return self.momentum * tensor + (1 - self.momentum) * fresh.to(tensor)

        return Rule(name, {"model": blend})

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "inherit", "momentum": self.momentum, "seed": self.seed, "reconstruction": True}


@dataclass(frozen=True)
class InheritAverage:
    """Take what is new of a model of `new`, grown from one of `old`, from the running average, grown likewise."""

    old: ModelSpec
    new: ModelSpec
    depths: tuple[Depth, ...]
    """the operators that inserted blocks"""

    @property
    def preserves(self) -> bool:
        """New blocks write as little as ever. New channels write into the same sums as old ones: there it tells."""
        after = self.new.transformers()
        return all(_sizes(spec) == _sizes(after[tower]) for tower, spec in self.old.transformers().items())

    def rule(self, name: str) -> Rule:
        """Whole tensors of new blocks; of others the entries that belong to new units."""
        if self._in_new_block(name):
            return Rule(name, mix=lambda weights, average: average)

        def mix(weights: Tensor, average: Tensor) -> Tensor:
            new = torch.zeros(weights.shape, dtype=torch.bool)
            for use in uses(name):
                new |= along(self._new_units(use.axis), use.dim, new)
            return torch.where(new.to(weights.device), average, weights)

        return Rule(name, mix=mix if any(self._new_units(use.axis).any() for use in uses(name)) else None)

    def _in_new_block(self, name: str) -> bool:
        if name.startswith("captioner.") and not self.old.caption:
            return True
        return any(name.startswith(f"{d.stack}.") and d.source(_number(d.stack, name))[1] for d in self.depths)

    def _new_units(self, axis: str) -> Tensor:
        """Of every channel of an axis, whether it was not there: bool."""
        tower, size = axis.split(".")
        new = self.new.transformers()[tower]
        old = self.old.transformers().get(tower, new)
        if size != "heads":
            return torch.arange(getattr(new, size)) >= getattr(old, size)
        heads, channels = torch.arange(new.heads) >= old.heads, torch.arange(new.head_width) >= old.head_width
        return (heads[:, None] | channels).flatten()

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "inherit", "new_from": "ema", "reconstruction": True}


def _sizes(spec: TowerSpec) -> tuple[int, ...]:
    return spec.width, spec.heads, spec.head_width, spec.mlp_width


def _number(stack: str, name: str) -> int:
    return int(name.removeprefix(f"{stack}.").split(".", 1)[0])


@dataclass(frozen=True)
class Forget:
    """Start moments anew: the weights stay."""

    kinds: tuple[str, ...]
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Zeros for the kinds that are forgotten."""
        return Rule(name, dict.fromkeys(self.kinds, zero))

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "forget", "moments": list(self.kinds)}
