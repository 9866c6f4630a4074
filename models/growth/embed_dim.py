"""More or fewer channels of the joint embedding space.

A row of zeros on all sides has no gradient on any (each is multiplied by the other), and copied rows would stay copies,
as the loss sees cosines alone. So all projections get new rows that are random and 1e-14 of the old rows' size: less
than a rounding of any output, and yet a gradient, which grows with every step of an optimizer whose steps do not depend
on its size. Where moments are mapped, a random momentum of the old rows' size leaves that point with the first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from .operator import Rule, TensorMap, alike

_PROJECTIONS = (".projection.weight", ".projection.bias")
_SMALL = 1e-14
"""size of new rows relative to the old ones"""


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
        maps = {"model": self._random(f"{name}/weights", _SMALL), "exp_avg": self._random(name)}
        return Rule(name, {**maps, "exp_avg_sq": self._mean})

    def _mean(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.mean(0, keepdim=True).expand(self.new - self.old, *tensor.shape[1:])])

    def _random(self, name: str, size: float = 1.0) -> TensorMap:
        """New rows that are drawn, `size` times as large as the old ones."""

        def drawn(tensor: Tensor) -> Tensor:
            generator = named_generator(self.seed, f"grow/embed_dim/{self.old}-{self.new}/{name}")
            draws = torch.randn(self.new - self.old, *tensor.shape[1:], generator=generator).to(tensor)
            return torch.cat([tensor, draws * tensor.square().mean().sqrt() * size])

        return drawn

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
