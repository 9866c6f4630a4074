"""More blocks, or fewer.

With `depth_init: zero` each new block is a copy of its neighbour below whose output projections start at zero. A pre-LN
block adds its output to the stream, so a block that adds zero changes nothing: the grown model computes the same
function, bit for bit. The copied inner weights make the new block useful as soon as its output projections move, which
they do from the first step on (their gradient is not zero; that of the inner weights is, for one step).

Moments (mapped moments had the smallest loss spike when measured): a copy starts with zero momentum and its source's
second moment, so that its first steps are as long as its neighbour's.

`stack` (the whole stack once more on top: StackBERT, Gong et al., 2019) and `interleave` (each block doubled) copy
blocks and moments as they are. They are lossy: the loss jumps, and the run must recover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .operator import OUTPUT_PROJECTIONS, Read, Rule, block_of, zero
from .options import DepthInit, DropBlocks


@dataclass(frozen=True)
class Depth:
    """Grow the blocks at `stack` from `old` to `new`; new ones are spread evenly, unless `depth_init` is `stack`."""

    field: str
    """the spec's field, as in `image.depth`"""
    stack: str
    """name of the block list, as in `image.transformer.blocks`"""
    old: int
    new: int
    depth_init: DepthInit = "zero"

    @property
    def preserves(self) -> bool:
        """Only blocks that add nothing do."""
        return self.depth_init == "zero"

    def source(self, index: int) -> tuple[int, bool]:
        """The old block that block `index` comes from, and whether it is a new copy of it."""
        if self.depth_init == "stack":
            return index % self.old, index >= self.old
        source = index * self.old // self.new
        return source, index > 0 and (index - 1) * self.old // self.new == source

    def rule(self, name: str) -> Rule:
        """Tensors outside the stack are kept; inside it, see the module."""
        found = block_of(self.stack, name)
        if found is None:
            return Rule(name)
        source, is_copy = self.source(found[0])
        zeroed = is_copy and self.depth_init == "zero"
        maps = {"exp_avg": zero} if zeroed else {}
        if zeroed and OUTPUT_PROJECTIONS.search(name):
            maps["model"] = zero
        return Rule(f"{self.stack}.{source}.{found[1]}", maps)

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        copies = [i for i in range(self.new) if self.source(i)[1]]
        made = (
            {"zeroed_copies": copies}
            if self.depth_init == "zero"
            else {"depth_init": self.depth_init, "copies": copies}
        )
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
        found = block_of(self.stack, name)
        return Rule(name if found is None else f"{self.stack}.{self.kept[found[0]]}.{found[1]}")

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        dropped = [i for i in range(self.old) if i not in self.kept]
        return {"operator": "drop", "field": self.field, "from": self.old, "to": len(self.kept), "dropped": dropped}


def kept_blocks(stack: str, old: int, new: int, drop_blocks: DropBlocks, experts: int, read: Read | None) -> list[int]:
    """Indices of the `new` blocks that stay: the first ones, or those with the largest score.

    The score of a block is the squared norm of its output projections: 0 for an identity block.
    """
    if drop_blocks == "last":
        return list(range(new))
    assert read, "scores need the weights"
    mlps = [f"mlp.experts.{number}.down" for number in range(experts)] if experts > 1 else ["mlp.down"]
    scores = [
        sum(read("model", f"{stack}.{i}.{part}.weight").square().sum().item() for part in ("attention.out", *mlps))
        for i in range(old)
    ]
    return sorted(sorted(range(old), key=lambda i: (-scores[i], i))[:new])
