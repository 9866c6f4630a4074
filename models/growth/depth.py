"""More blocks, or fewer.

With `layers: zero` each new block is a copy of its neighbour below whose every write into the stream starts at zero. A
pre-LN block adds its output to the stream, so a block that adds zero changes nothing: the grown model computes the same
function, bit for bit. The copied inner weights make the new block useful as soon as its output weights move, which they
do from the first step on (their gradient is not zero; that of the inner weights is, for one step).

Moments (measured: mapped moments spike least): a copy starts with zero momentum, and with its source's second moment,
so that its first steps are as long as its neighbour's.

`stack` (the whole stack once more on top: StackBERT, Gong et al., 2019) and `interleave` (each block doubled) copy
blocks and moments as they are. They are lossy: the loss jumps, and the run must recover.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .operator import Read, Rule, zero
from .plan import Drops, Layers

# The maps that write into the residual stream; with their biases they are all that has to be zero.
WRITES = re.compile(r"\.(attention\.out|cross\.out|(?:cross_)?mlp\.(?:experts\.\d+\.)?down)\.(weight|bias)$")


@dataclass(frozen=True)
class Depth:
    """Grow the blocks at `stack` from `old` to `new`; but for `layers: stack`, new ones are spread evenly."""

    field: str
    """the spec's field, as in `image.depth`"""
    stack: str
    """name of the block list, as in `image.transformer.blocks`"""
    old: int
    new: int
    layers: Layers = "zero"

    @property
    def preserves(self) -> bool:
        """Only blocks that add nothing do."""
        return self.layers == "zero"

    def source(self, index: int) -> tuple[int, bool]:
        """The old block that block `index` comes from, and whether it is a new copy of it."""
        if self.layers == "stack":
            return index % self.old, index >= self.old
        source = index * self.old // self.new
        return source, index > 0 and (index - 1) * self.old // self.new == source

    def rule(self, name: str) -> Rule:
        """Tensors outside the stack are kept; inside it, see the module."""
        prefix = self.stack + "."
        if not name.startswith(prefix):
            return Rule(name)
        index, rest = name.removeprefix(prefix).split(".", 1)
        source, is_copy = self.source(int(index))
        zeroed = is_copy and self.layers == "zero"
        maps = {"exp_avg": zero} if zeroed else {}
        if zeroed and WRITES.search(name):
            maps["model"] = zero
        return Rule(f"{prefix}{source}.{rest}", maps)

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        copies = [i for i in range(self.new) if self.source(i)[1]]
        made = {"zeroed_copies": copies} if self.layers == "zero" else {"layers": self.layers, "copies": copies}
        return {"operator": "depth", "field": self.field, "from": self.old, "to": self.new, **made}


@dataclass(frozen=True)
class Drop:
    """Shrink the blocks at `stack` to those with the indices `kept`."""

    field: str
    stack: str
    old: int
    kept: Sequence[int]
    preserves: ClassVar[bool] = False

    def rule(self, name: str) -> Rule:
        """Tensors outside the stack are kept."""
        prefix = self.stack + "."
        if not name.startswith(prefix):
            return Rule(name)
        index, rest = name.removeprefix(prefix).split(".", 1)
        return Rule(f"{prefix}{self.kept[int(index)]}.{rest}")

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        dropped = [i for i in range(self.old) if i not in self.kept]
        return {"operator": "drop", "field": self.field, "from": self.old, "to": len(self.kept), "dropped": dropped}


def kept_blocks(stack: str, old: int, new: int, drop: Drops, experts: int, read: Read | None) -> list[int]:
    """Indices of the `new` blocks that stay: the first ones, or those with the largest writes into the stream.

    A block is worth what it writes: the sum of squares of its output maps, which a block that changes nothing has not.
    """
    if drop == "last":
        return list(range(new))
    assert read, "scores need the weights"
    mlps = [f"mlp.experts.{number}.down" for number in range(experts)] if experts > 1 else ["mlp.down"]
    writes = [
        sum(read("model", f"{stack}.{i}.{part}.weight").square().sum().item() for part in ("attention.out", *mlps))
        for i in range(old)
    ]
    return sorted(sorted(range(old), key=lambda i: (-writes[i], i))[:new])
