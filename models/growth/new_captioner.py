"""A captioner on a dual encoder that had none: what the towers compute does not change.

Its blocks are copies of the text tower's last ones with every write at zero, as in `depth.py`, so its first prediction
is the text stream itself. What attends to the picture has no original: the query is the self-attention's, key and
value are drawn afresh. Second moments are those of the originals, or their mean where the shape is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import named_generator
from ..spec import ModelSpec
from .depth import WRITES
from .operator import Rule, TensorMap, zero

_BLOCKS = "transformer.blocks."


@dataclass(frozen=True)
class NewCaptioner:
    """Add the captioner of `spec` to a model that is otherwise of `spec`."""

    spec: ModelSpec
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors of the towers are kept; for the captioner's see the module."""
        own = name.removeprefix("captioner.")
        if own == name:
            return Rule(name)
        if not own.startswith(_BLOCKS):
            fresh = torch.ones_like if name.endswith("weight") else torch.zeros_like
            late = "text.norm" if self.spec.text.pool == "class" else "text.transformer.norm"
            return Rule(own.replace("transformer.norm", late), {"model": fresh, "exp_avg": zero})
        assert self.spec.caption
        index, rest = own.removeprefix(_BLOCKS).split(".", 1)
        source = max(0, self.spec.text.depth - self.spec.caption.depth + int(index))
        original = f"text.{_BLOCKS}{source}.{rest.replace('cross', 'attention')}"
        if rest in ("cross.key.weight", "cross.value.weight"):
            return Rule(original, self._fresh(name))
        maps = {"exp_avg": zero}
        if WRITES.search(name):
            maps["model"] = zero
        return Rule(original, maps)

    def _fresh(self, name: str) -> dict[str, TensorMap]:
        """A map from image tokens to heads, as in a new model."""
        shape = (self.spec.text.attention_width, self.spec.memory_width)

        def draw(tensor: Tensor) -> Tensor:
            generator = named_generator(self.seed, f"grow/captioner/{name}")
            return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(tensor)

        def no_momentum(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(shape)

        def mean(tensor: Tensor) -> Tensor:
            return tensor.mean().expand(shape).clone()

        return {"model": draw, "exp_avg": no_momentum, "exp_avg_sq": mean}

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        assert self.spec.caption
        numbers = {"from": 0, "to": self.spec.caption.depth, "seed": self.seed}
        return {"operator": "captioner", "field": "caption.depth", **numbers}
