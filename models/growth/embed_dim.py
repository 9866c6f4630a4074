"""More or fewer channels of the joint embedding space.

All projections get new rows that start at zero, so no cosine similarity changes. But a zero row on all sides has no
gradient on any (each is multiplied by the other), and copied rows would stay copies, as the loss sees cosines alone. So
the new rows start with a random momentum of the old rows' size: the function is exactly the old one, and the first
optimizer step leaves the dead point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from .operator import Rule, TensorMap, alike

_PROJECTIONS = (".projection.weight", ".projection.bias")


@dataclass(frozen=True)
class GrowEmbedDim:
    """Grow the joint embedding space from `old` to `new` channels."""

    old: int
    new: int
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors other than the projections are kept; a new row's second moment is the mean of the old rows'."""
        if not name.endswith(_PROJECTIONS):
            return Rule(name)
        return Rule(name, {"model": self._zeros, "exp_avg": self._momentum(name), "exp_avg_sq": self._mean})

    def _zeros(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(self.new - self.old, *tensor.shape[1:])])

    def _mean(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.mean(0, keepdim=True).expand(self.new - self.old, *tensor.shape[1:])])

    def _momentum(self, name: str) -> TensorMap:
        def momentum(tensor: Tensor) -> Tensor:
            generator = named_generator(self.seed, f"grow/embed_dim/{self.old}-{self.new}/{name}")
            draws = torch.randn(self.new - self.old, *tensor.shape[1:], generator=generator).to(tensor)
            return torch.cat([tensor, draws * tensor.square().mean().sqrt()])

        return momentum

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        numbers = {"from": self.old, "to": self.new, "seed": self.seed}
        return {"operator": "embed_dim", "field": "embed_dim", **numbers}


@dataclass(frozen=True)
class TruncateEmbedDim:
    """Shrink the joint embedding space from `old` to its first `new` channels."""

    old: int
    new: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Tensors other than the projections are kept."""
        return Rule(name, alike(self._cut) if name.endswith(_PROJECTIONS) else {})

    def _cut(self, tensor: Tensor) -> Tensor:
        return tensor[: self.new].contiguous()

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "truncate", "field": "embed_dim", "from": self.old, "to": self.new, "kept": "first"}
