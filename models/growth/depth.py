"""More blocks: each new block is a copy of its neighbour below whose every write into the stream starts at zero.

A pre-LN block adds its output to the stream, so a block that adds zero changes nothing: the grown model computes the
same function, bit for bit. The copied inner weights make the new block useful as soon as its output weights move, which
they do from the first step on (their gradient is not zero; that of the inner weights is, for one step).

Moments (measured: mapped moments spike least): a copy starts with zero momentum, and with its source's second moment,
so that its first steps are as long as its neighbour's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .rules import Rule, zero

# The maps that write into the residual stream; with their biases they are all that has to be zero.
_WRITES = re.compile(r"\.(attention\.out|cross\.out|mlp\.down)\.(weight|bias)$")


@dataclass(frozen=True)
class Depth:
    """Grow the blocks at `stack` from `old` to `new`, spreading the new ones evenly."""

    field: str
    """the spec's field, as in `image.depth`"""
    stack: str
    """name of the block list, as in `image.transformer.blocks`"""
    old: int
    new: int
    preserves: ClassVar[bool] = True

    def source(self, index: int) -> tuple[int, bool]:
        """The old block that block `index` comes from, and whether it is a zeroed copy of it."""
        source = index * self.old // self.new
        return source, index > 0 and (index - 1) * self.old // self.new == source

    def rule(self, name: str) -> Rule:
        """Tensors outside the stack are kept; inside it, see the module."""
        prefix = self.stack + "."
        if not name.startswith(prefix):
            return Rule(name)
        index, rest = name.removeprefix(prefix).split(".", 1)
        source, is_copy = self.source(int(index))
        maps = {"exp_avg": zero} if is_copy else {}
        if is_copy and _WRITES.search(name):
            maps["model"] = zero
        return Rule(f"{prefix}{source}.{rest}", maps)

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        copies = [i for i in range(self.new) if self.source(i)[1]]
        return {"operator": "depth", "field": self.field, "from": self.old, "to": self.new, "zeroed_copies": copies}
