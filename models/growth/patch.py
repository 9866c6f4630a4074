"""The size of the patches that pictures are cut into."""

from __future__ import annotations

from collections.abc import Callable
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
    patch keeps the function on pictures whose patches are enlarged by B; on the pictures themselves it is lossy.
    """

    old: int
    new: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Only the patch kernel changes; a sum over more pixels gets a smaller learning rate."""
        if name != "image.patches.weight":
            return Rule(name)
        smooth = self._each_channel(self._matrix)
        maps = {"model": self._each_channel(self._inverse), "exp_avg": smooth, "exp_avg_sq": smooth}
        return Rule(name, maps, rate=(self.old / self.new) ** 2)

    def _matrix(self) -> Tensor:
        """B, float64 [new^2, old^2]."""
        pixels = torch.eye(self.old**2, dtype=torch.float64).view(-1, 1, self.old, self.old)
        resized = F.interpolate(
            pixels, size=(self.new, self.new), mode="bilinear", align_corners=False, antialias=self.new < self.old
        )
        return resized.flatten(1).T

    def _inverse(self) -> Tensor:
        return torch.linalg.pinv(self._matrix().T)

    def _each_channel(self, matrix: Callable[[], Tensor]) -> TensorMap:
        """The map of all kernels, [d, 3 old^2] -> [d, 3 new^2], in float64; the matrix is computed when it is used."""

        def mapped(tensor: Tensor) -> Tensor:
            planes = tensor.unflatten(1, (3, self.old**2)).double()
            return (planes @ matrix().T.to(planes.device)).flatten(1).to(tensor)

        return mapped

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "patch", "field": "image.patch", "from": self.old, "to": self.new}
