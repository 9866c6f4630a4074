"""A further tower for a model that had none of its name: what the others compute does not change by a bit.

It is a fresh model's, drawn from the streams of its tensors' names, and the optimizer has seen nothing of it: both
moments start at zero. A first step of Adam's that is late in the run's count is shorter than the learning rate with
betas[1] = 0.98, and three times as long with 0.999; `rewarm` shortens the first steps where that matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import initialise
from ..spec import ModelSpec
from ..towers import SequenceTower
from .operator import Rule


@dataclass(frozen=True)
class NewTower:
    """Add the further tower `name` to a model that is otherwise of `spec`."""

    spec: ModelSpec
    name: str
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors outside the tower are kept."""
        if name not in self._shapes:
            return Rule(name)
        shape = self._shapes[name]

        def fresh(tensor: Tensor) -> Tensor:
            made = torch.empty(shape)
            initialise(self.spec, [(name, made)], self.seed)
            return made.to(tensor)

        def nothing(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(shape)

        return Rule("logit_scale", {"model": fresh, "exp_avg": nothing, "exp_avg_sq": nothing})

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            tower = SequenceTower(self.spec.further[self.name], self.spec.embed_dim)
        return {f"further.{self.name}.{name}": p.shape for name, p in tower.named_parameters()}

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        numbers = {"from": 0, "to": self.spec.further[self.name].depth, "seed": self.seed}
        return {"operator": "tower", "field": f"further.{self.name}.depth", **numbers}
