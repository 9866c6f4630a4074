"""The bytes that blocks keep for their backward pass, from the spec and the shape of a batch alone: nothing is built.

They are counted tensor by tensor as autograd keeps them, so that activation checkpointing (Chen et al., arXiv
1604.06174) can hold them within an exact budget: a checkpointed block keeps its input alone and is recomputed in the
backward pass. The first blocks of a transformer are checkpointed, as few as the budget needs. What lies outside of
blocks is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .flops import block_flops
from .parts import BatchShape, Part, Pass, parts
from .spec import ModelSpec, TowerSpec

_FLOAT = 4
"""bytes of a number of the stream, and of what norms and attention keep of their divisors"""
_INDEX = 8
_HIDDEN = {"gelu": 2, "gelu_tanh": 2, "quick_gelu": 3, "swiglu": 4}
"""tensors of the hidden width that an MLP keeps"""


class BlockMemory(NamedTuple):
    """What the blocks of one transformer keep, in bytes, and what it costs to recompute one."""

    depth: int
    block: float
    """kept by a block"""
    last: float
    """kept by the last block"""
    stream: float
    """kept by a checkpointed block: its input"""
    flops: float
    """of recomputing a block"""

    def kept(self, checkpointed: int) -> float:
        """What all blocks keep if the first `checkpointed` are recomputed."""
        whole = self.block * max(0, self.depth - 1 - checkpointed) + self.last * (checkpointed < self.depth)
        return checkpointed * self.stream + whole

    def returning(self, checkpointed: int) -> float:
        """What recomputing adds at its peak: nothing while a later block, already done, has freed its own memory."""
        return max(0.0, self.last - self.stream) if checkpointed == self.depth else 0.0


def block_memory(spec: ModelSpec, batch: BatchShape) -> dict[str, BlockMemory]:
    """By part, what its blocks keep for a batch; all parts run."""
    return {part.name: _part(part, batch) for part in parts(spec)}


def blocks_to_recompute(found: Mapping[str, BlockMemory], budget: float) -> dict[str, int]:
    """How many of the first blocks of each part to recompute, so that `peak` is within `budget` bytes.

    As few as possible, those that free most for their FLOPs first; all of them if that is still too little.
    """
    chosen = dict.fromkeys(found, 0)
    gains = {name: (one.block - one.stream) / one.flops for name, one in found.items()}
    for name in sorted(found, key=lambda name: -gains[name]):
        while chosen[name] < found[name].depth and peak(found, chosen) > budget:
            chosen[name] += 1
    for name in sorted(found, key=lambda name: gains[name]):  # the last step of one part may have spared another's
        while chosen[name] and peak(found, chosen | {name: chosen[name] - 1}) <= budget:
            chosen[name] -= 1
    return chosen


def peak(found: Mapping[str, BlockMemory], checkpointed: Mapping[str, int]) -> float:
    """The most bytes that blocks hold at once if so many of the first blocks of each part are recomputed."""
    returning = max(one.returning(checkpointed[name]) for name, one in found.items())
    return sum(one.kept(checkpointed[name]) for name, one in found.items()) + returning


def _part(part: Part, batch: BatchShape) -> BlockMemory:
    """All passes through a part's blocks together."""
    size = 2 if batch.half else 4
    passes = [_pass(part, stream, batch.pairs, size) for stream in part.passes(batch)]
    return BlockMemory(part.depth, *(sum(numbers) for numbers in zip(*passes, strict=True)))


def _pass(part: Part, stream: Pass, pairs: float, size: int) -> tuple[float, float, float, float]:
    """What one pass keeps per block, in the last block, of the stream, and its FLOPs per block."""
    tower, tokens = part.tower, pairs * stream.tokens
    cells = pairs * (stream.cells or stream.tokens)
    block = _block(tower, tokens, cells, size)
    if part.memory_width is not None:
        memory = pairs * stream.memory
        block += _norm(tower, tokens, size) + _gain(tower, tokens, size)
        # Queries and what is mixed for them are on the captions' side, keys and values on the pictures'.
        block += _attention(tower, tokens, cells, size) + 2 * (memory - cells) * tower.attention_width * size
        if part.crosses_after:
            block += _mlp(tower, tokens, size) + _norm(tower, tokens, size) + _gain(tower, tokens, size)
            block += memory * (part.memory_width * size + 2 * _FLOAT)  # the norm of the image tokens
    last = block
    if stream.one_row:  # the other tokens are only keys and values
        last = _norm(tower, tokens, size) + 2 * cells * tower.attention_width * size + _block(tower, pairs, pairs, size)
    return block, last, tokens * tower.width * _FLOAT, pairs * block_flops(part, stream)


def _block(tower: TowerSpec, tokens: float, cells: float, size: int) -> float:
    """Two norms, attention and the MLP."""
    norms = 2 * (_norm(tower, tokens, size) + _gain(tower, tokens, size))
    return norms + _attention(tower, tokens, cells, size) + _mlp(tower, tokens, size)


def _attention(tower: TowerSpec, tokens: float, cells: float, size: int) -> float:
    """Queries, keys, values and what was mixed in the grid, with each query's divisor."""
    grid = 4 * cells * tower.attention_width * size + cells * tower.heads * _FLOAT
    # Tokens are copied out of a grid that has padding.
    return grid + (tokens * tower.attention_width * size if cells > tokens else 0)


def _norm(tower: TowerSpec, tokens: float, size: int) -> float:
    """A norm's input with its mean and spread, and its output for the maps that read it."""
    return tokens * (tower.width * (_FLOAT + size) + 2 * _FLOAT)


def _gain(tower: TowerSpec, tokens: float, size: int) -> float:
    """What a learned gain is multiplied with."""
    return tokens * tower.width * size if tower.layer_scale is not None else 0


def _mlp(tower: TowerSpec, tokens: float, size: int) -> float:
    """The hidden units; of a mixture those of each expert that a token goes through, its copies, and the routing."""
    hidden = _HIDDEN[tower.mlp] * tower.mlp_width * size
    if tower.experts == 1:
        return tokens * hidden
    each = hidden + tower.width * 2 * size + 3 * _INDEX + 2 * size
    return tokens * (tower.experts_per_token * each + tower.experts * size)
