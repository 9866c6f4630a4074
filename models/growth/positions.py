"""More positions: longer captions and larger pictures. New positions are interpolated between old ones.

Neither can keep the function, because the inputs change too: a longer context cuts captions later, a larger picture has
more patches. Each operator says what stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .operator import Rule, alike

KEPT = 20
"""caption positions that stay as they are: few captions are longer, so only these are well trained (Long-CLIP)"""


@dataclass(frozen=True)
class Context:
    """Grow the longest caption from `old` to `new` tokens: the first 20 positions stay, the rest are interpolated.

    Zhang et al. (Long-CLIP, arXiv 2403.15378). Captions of at most 20 tokens, start and end included, are embedded and
    captioned exactly as before; longer ones are not. A shorter context keeps the first positions.
    """

    old: int
    new: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Only the text tower's positions change."""
        return Rule(name, alike(self._interpolate) if name == "text.position_embedding" else {})

    def _interpolate(self, tensor: Tensor) -> Tensor:
        if self.new < self.old:
            return tensor[: self.new].contiguous()
        kept = min(KEPT, self.old - 1)
        last_old, last_new = self.old - 1, self.new - 1
        # Old positions, with fractions, that the new ones behind the kept ones take their values from.
        places = kept + (torch.arange(kept, self.new) - kept) * (last_old - kept) / (last_new - kept)
        below = places.long().clamp(max=last_old)
        fraction = (places - below).to(tensor)[:, None]
        below = below.to(tensor.device)
        between = tensor[below].lerp(tensor[(below + 1).clamp(max=last_old)], fraction)
        return torch.cat([tensor[:kept], between])

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "context", "field": "text.context", "from": self.old, "to": self.new, "kept": KEPT}


@dataclass(frozen=True)
class Resolution:
    """Change the grid of patches from `old` to `new` a side: positions are interpolated linearly in both directions."""

    old: int
    new: int
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Only the image tower's positions change."""
        return Rule(name, alike(self._resize) if name == "image.position_embedding" else {})

    def _resize(self, tensor: Tensor) -> Tensor:
        planes = tensor.T.unflatten(1, (self.old, self.old))[None]
        larger = F.interpolate(planes, size=(self.new, self.new), mode="bilinear", align_corners=False)
        return larger[0].flatten(1).T.contiguous()

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return {"operator": "resolution", "field": "image.resolution", "grid_from": self.old, "grid_to": self.new}
