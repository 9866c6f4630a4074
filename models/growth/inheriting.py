"""How much is inherited, of weights and of the optimizer's state.

Parameter inheriting with momentum is after GrowCLIP (ICCV 2023). A RECONSTRUCTION: its formula is not public.

The reading here: the grown model starts from m * inherited + (1 - m) * fresh, with a momentum m < 1, which leaves the
small model's local minimum and is shrink-and-perturb (Ash and Adams, arXiv 1910.08475). m = 1 inherits everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import initialise
from ..spec import ModelSpec
from .rules import Rule, zero


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
