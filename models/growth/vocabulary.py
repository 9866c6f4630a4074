"""What pictures and captions are cut into: the size of a patch, and the rows of the token table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .operator import Rule, TensorMap


@dataclass(frozen=True)
class Patch:
    """Change the side of a patch from `old` to `new` pixels by a pseudo-inverse resize (FlexiViT, arXiv 2212.08013).

    With B the map that resizes a patch, the new kernel is the w' for which <w', B x> is nearest to <w, x>. A larger
    patch keeps the function on pictures whose patches are enlarged likewise; on the pictures themselves it is lossy.
    """

    old: int
    new: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Only the patch kernel changes; a sum over more pixels takes shorter steps."""
        if name != "image.patches.weight":
            return Rule(name)
        smooth = self._each_channel(self._resize)
        maps = {"model": self._each_channel(self._inverse), "exp_avg": smooth, "exp_avg_sq": smooth}
        return Rule(name, maps, rate=(self.old / self.new) ** 2)

    def _matrix(self) -> Tensor:
        """B, float64 [new^2, old^2]."""
        pixels = torch.eye(self.old**2, dtype=torch.float64).view(-1, 1, self.old, self.old)
        resized = F.interpolate(
            pixels, size=(self.new, self.new), mode="bilinear", align_corners=False, antialias=self.new < self.old
        )
        return resized.flatten(1).T

    def _resize(self) -> Tensor:
        return self._matrix()

    def _inverse(self) -> Tensor:
        return torch.linalg.pinv(self._matrix().T)

    def _each_channel(self, matrix: Any) -> TensorMap:
        def mapped(tensor: Tensor) -> Tensor:
            planes = tensor.unflatten(1, (3, self.old**2)).double()
            return (planes @ matrix().T.to(planes.device)).flatten(1).to(tensor)

        return mapped

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "patch", "field": "image.patch", "from": self.old, "to": self.new}


@dataclass(frozen=True)
class Vocabulary:
    """Grow the token table from `old` to `new` rows. The scores of the old tokens do not change.

    A new row is the mean of the rows it is made of, or of all rows where nothing is said (Hewitt 2021: the mean keeps
    the distribution over the old tokens within a bound). Its moments: none, and the same mean.
    """

    old: int
    new: int
    tokens: tuple[tuple[int, ...], ...] = ()
    """of each new row the old ids that it is made of; left out, all"""
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Only the token table changes, and the captioner's output table if it has its own."""
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
