"""A captioner for a dual encoder that had none: what the towers compute does not change.

Its blocks are copies of the text tower's last ones with all output projections at zero, as in `depth.py`, so its first
prediction is the text stream itself. Cross-attention has no original: its query is copied from self-attention, its key
and value maps are drawn afresh. Second moments are those of the originals, or their mean where the shape differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from ..spec import ModelSpec
from .operator import OUTPUT_PROJECTIONS, Rule, block_of, fresh, zero


@dataclass(frozen=True)
class NewCaptioner:
    """Add the captioner of `spec` to a model that is otherwise of `spec`."""

    spec: ModelSpec
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors of the towers are kept; for the captioner's see the module."""
        if not name.startswith("captioner."):
            return Rule(name)
        found = block_of("captioner.transformer.blocks", name)
        if found is None:
            return self._outside_of_blocks(name)
        assert self.spec.captioner
        number, rest = found
        source = max(0, self.spec.text.depth - self.spec.captioner.depth + number)
        original = f"text.transformer.blocks.{source}.{rest.replace('cross', 'attention')}"
        if rest in ("cross.key.weight", "cross.value.weight"):
            return Rule(original, fresh(self._cross_shape, lambda: self._draw(name)), fresh=True)
        maps = {"exp_avg": zero}
        if OUTPUT_PROJECTIONS.search(name):
            maps["model"] = zero
        return Rule(original, maps)

    def _outside_of_blocks(self, name: str) -> Rule:
        """The last norm, which starts as the identity."""
        start = torch.ones_like if name.endswith("weight") else torch.zeros_like
        # With CoCa's class token the text tower's last norm stands behind its pooling.
        norm = "text.norm" if self.spec.text.pool == "class" else "text.transformer.norm"
        return Rule(name.replace("captioner.transformer.norm", norm), {"model": start, "exp_avg": zero}, fresh=True)

    @property
    def _cross_shape(self) -> tuple[int, int]:
        return self.spec.text.attention_width, self.spec.memory_width

    def _draw(self, name: str) -> Tensor:
        """A map from image tokens to heads, as in a new model."""
        generator = named_generator(self.seed, f"grow/captioner/{name}")
        return torch.randn(self._cross_shape, generator=generator) * self.spec.memory_width**-0.5

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        assert self.spec.captioner
        numbers = {"from": 0, "to": self.spec.captioner.depth, "seed": self.seed}
        return {"operator": "captioner", "field": "captioner.depth", **numbers}
