"""More rows of the token table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .operator import Rule


@dataclass(frozen=True)
class Vocabulary:
    """Grow the token table from `old` to `new` rows. The scores of the old tokens do not change.

    A new row is the mean of some old rows, or of all of them (Hewitt 2021: the mean keeps the distribution over the old
    tokens within a bound). Its first moment is zero, its second the same mean.
    """

    old: int
    new: int
    tokens: tuple[tuple[int, ...], ...] = ()
    """for each new row the old ids that it is the mean of; left out: all"""
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Only the token table changes, and the captioner's output table if it has one of its own."""
        if name not in ("text.token_embedding.weight", "captioner.output.weight"):
            return Rule(name)
        return Rule(name, {"model": self._append_means, "exp_avg": self._zeros, "exp_avg_sq": self._append_means})

    def _append_means(self, tensor: Tensor) -> Tensor:
        if not self.tokens:
            return torch.cat([tensor, tensor.mean(0, keepdim=True).expand(self.new - self.old, -1)])
        return torch.cat([tensor, torch.stack([tensor[list(ids)].mean(0) for ids in self.tokens])])

    def _zeros(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(self.new - self.old, tensor.shape[1])])

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        rows = "constituents" if self.tokens else "mean"
        return {"operator": "vocabulary", "field": "text.vocabulary", "from": self.old, "to": self.new, "rows": rows}
