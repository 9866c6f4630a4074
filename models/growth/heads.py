"""Wider heads: each head gets more channels, copies of its own.

For values and the output map a head's channels are an axis like any other. Queries and keys are multiplied with each
other: c copies count c times in that product, and a wider head divides it by a larger square root. So from h to h'
channels both are multiplied by (h'/h)^1/4 / sqrt(c), and the scores do not change (HyperCloning, arXiv 2409.12903, for
whole factors). The gradients are then multiplied by (h/h')^1/4 / sqrt(c), and so are the first moments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axes import uses
from .operator import Rule, TensorMap, along
from .width import Widen

_SCORED = re.compile(r"\.(query|key)\.(weight|bias)$")


@dataclass(frozen=True)
class HeadDim(Widen):
    """Grow every head of axis `axis` from `old` to `new` channels; `unit` is the number of heads."""

    def rule(self, name: str) -> Rule:
        """Queries and keys: see the module; values and output maps as on any axis."""
        if not _SCORED.search(name) or all(use.axis != self.axis for use in uses(name, self.spec)):
            return super().rule(name)
        growth = (self.new / self.old) ** 0.25
        maps = {
            "model": self._scaled(growth, 1, name),
            "exp_avg": self._scaled(1 / growth, 1),
            "exp_avg_sq": self._scaled(1 / growth**2, 2),
        }
        return Rule(name, maps, rate=1 / growth)

    def channels(self) -> tuple[Tensor, Tensor]:
        """As in `Widen`, head by head."""
        within = torch.arange(self.new) % self.old
        sources = (torch.arange(self.unit)[:, None] * self.old + within).flatten()
        return sources, sources.bincount()[sources]

    def _scaled(self, factor: float, roots: int, name: str = "") -> TensorMap:
        """Copies times `factor`, each divided by the square root of their number to the power `roots`.

        Queries get noise that sums to zero over a channel's copies: the keys they are multiplied with are all equal.
        """

        def scaled(tensor: Tensor) -> Tensor:
            sources, counts = self.channels()
            copied = tensor.index_select(0, sources.to(tensor.device))
            copied = copied * factor / along(counts, 0, copied).sqrt() ** roots
            if self.width_init == "duplicate" or not name.endswith("query.weight"):
                return copied
            draws = torch.randn(copied.shape, generator=self._generator(name)).to(copied)
            return self._with_noise(copied, draws, 0, copied.square().mean().sqrt())

        return scaled

    def _generator(self, name: str) -> torch.Generator:
        return super()._generator(f"channels/{name}")

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        return super().describe() | {"operator": "head_dim", "field": self.axis.removesuffix("heads") + "head_dim"}
