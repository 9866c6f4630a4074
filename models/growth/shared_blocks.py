"""Shared blocks for towers that had none: both gates start at zero, so nothing changes.

Everything but the gates is drawn afresh and moves once they have. A new tensor's second moment is the mean of that of
a tensor of its kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import Model, initialise
from ..spec import ModelSpec
from .operator import Rule


@dataclass(frozen=True)
class NewShared:
    """Add the shared blocks of `spec` to a model that is otherwise of `spec`."""

    spec: ModelSpec
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors outside the shared blocks are kept."""
        if not name.startswith("shared."):
            return Rule(name)
        with torch.device("meta"):
            shape = dict(Model(self.spec).named_parameters())[name].shape

        def fresh(tensor: Tensor) -> Tensor:
            made = torch.empty(shape)
            initialise(self.spec, [(name, made)], self.seed)
            return made.to(tensor)

        def no_momentum(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(shape)

        def mean(tensor: Tensor) -> Tensor:
            return tensor.mean().expand(shape).clone()

        if name.endswith("gate"):
            source = "logit_scale"
        else:
            source = "image.projection.weight" if name.endswith("weight") else "image.transformer.norm.bias"
        return Rule(source, {"model": fresh, "exp_avg": no_momentum, "exp_avg_sq": mean})

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        assert self.spec.shared
        numbers = {"from": 0, "to": self.spec.shared.depth, "seed": self.seed}
        return {"operator": "shared", "field": "shared.depth", **numbers, "reconstruction": True}
