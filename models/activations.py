"""The memory that blocks keep for their backward pass, from the spec and the shape of a batch alone, nothing built.

Counted tensor by tensor as autograd keeps them, so that it can be bounded exactly: a block whose insides are made again
in the backward pass (gradient checkpointing: Chen et al., arXiv 1604.06174) keeps its input alone, and as many blocks
as have to do so, from the first of a transformer on. What lies outside of blocks is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .flops import block_flops
from .spec import ModelSpec, TowerSpec

_NUMBER = 4
"""bytes of a number of the stream, and of what norms and attention keep to know their divisors"""
_INDEX = 8
_HIDDEN = {"gelu": 2, "gelu_tanh": 2, "quick_gelu": 3, "swiglu": 4}
"""tensors of the hidden width that an MLP keeps"""


class Shape(NamedTuple):
    """What of a batch decides over the memory."""

    pairs: float
    tokens: float
    """of all captions together"""
    places: float
    """of the grid in which captions attend, pairs x longest; as many as tokens where they attend without padding"""
    patches: int | None = None
    """of each picture that are looked at; None: all"""
    half: bool = False
    """whether matrix work is done in two bytes a number"""
    read: bool = False
    """whether an objective reads the tokens of captions"""


class Stack(NamedTuple):
    """The blocks of one transformer; all in bytes but for the first and the last."""

    depth: int
    block: float
    """kept by a block"""
    last: float
    """kept by the last block"""
    stream: float
    """its input: what is kept of a block that is made again"""
    flops: float
    """of making a block again"""

    def kept(self, again: int) -> float:
        """What all blocks keep if the first `again` are made again."""
        whole = self.block * max(0, self.depth - 1 - again) + self.last * (again < self.depth)
        return again * self.stream + whole

    def returning(self, again: int) -> float:
        """What comes back beside it for the backward pass of one: nothing while a later one has made room for it."""
        return max(0.0, self.last - self.stream) if again == self.depth else 0.0


@dataclass(frozen=True)
class _Stream:
    """Tokens on their way through blocks: `tokens` of them, which attend in a grid of `places`."""

    tokens: float
    places: float

    def attention(self, spec: TowerSpec, size: int) -> float:
        """Queries, keys and values, what was mixed, and each query's divisor."""
        laid = 4 * self.places * spec.attention_width * size + self.places * spec.heads * _NUMBER
        # Out of a padded grid the tokens are copied.
        return laid + (self.tokens * spec.attention_width * size if self.places > self.tokens else 0)


def stacks(spec: ModelSpec, shape: Shape) -> dict[str, Stack]:
    """The transformers that run, by the part of the model that each is of."""
    pairs, size, text = shape.pairs, 2 if shape.half else 4, spec.text
    patches = shape.patches or spec.image.grid**2
    pictures = pairs * (patches + spec.image.class_token)
    captions = _Stream(shape.tokens, shape.places)
    if text.filled:
        captions = _Stream(pairs * text.context, pairs * text.context)
    elif text.pool == "class":  # and the filling that it sees
        captions = _Stream(shape.tokens + 2 * pairs, shape.places + 2 * pairs)
    alone = not (spec.caption or spec.shared or shape.read)
    first, last = alone and spec.image.pool == "class", alone and not text.filled
    found = {
        "image": _stack(
            spec.image, spec.image.depth, _Stream(pictures, pictures), size, pictures / pairs, pairs * first
        ),
        "text": _stack(text, text.depth, captions, size, captions.tokens / pairs, pairs * last),
    }
    if spec.shared:
        seen = _Stream(pairs * patches, pairs * patches)
        runs = [
            _stack(spec.shared, spec.shared.depth, stream, size, stream.tokens / pairs)
            for stream in (seen, _Stream(shape.tokens, shape.places))
        ]
        found["shared"] = Stack(spec.shared.depth, *(a + b for a, b in zip(runs[0][1:], runs[1][1:], strict=True)))
    if spec.caption:
        memory = pairs * (spec.image.queries - 1 if spec.image.pool == "attention" else patches)
        found["captioner"] = _captioner(spec, _Stream(shape.tokens, shape.places), memory, size, pairs)
    for name, tower in spec.further.items():
        frames = pairs * tower.frames
        found[f"further.{name}"] = _stack(tower, tower.depth, _Stream(frames, frames), size, tower.frames)
    return found


def choose(found: Mapping[str, Stack], budget: float) -> dict[str, int]:
    """How many of the first blocks of each transformer to make again, so that `peak` is within `budget` bytes.

    As few as do, those that free most for their FLOPs before the others; all of them if that is still too little.
    """
    again = dict.fromkeys(found, 0)
    gains = {name: (stack.block - stack.stream) / stack.flops for name, stack in found.items()}
    for name in sorted(found, key=lambda name: -gains[name]):
        while again[name] < found[name].depth and peak(found, again) > budget:
            again[name] += 1
    for name in sorted(found, key=lambda name: gains[name]):  # the last step of one may have spared another's
        while again[name] and peak(found, again | {name: again[name] - 1}) <= budget:
            again[name] -= 1
    return again


def peak(found: Mapping[str, Stack], again: Mapping[str, int]) -> float:
    """The most bytes that blocks hold at once if so many of the first ones of each transformer are made again."""
    returning = max(stack.returning(again[name]) for name, stack in found.items())
    return sum(stack.kept(again[name]) for name, stack in found.items()) + returning


def _stack(spec: TowerSpec, depth: int, stream: _Stream, size: int, length: float, rows: float = 0) -> Stack:
    """Blocks on `stream` with samples of `length` tokens; with `rows` the last works for so many tokens alone."""
    block = _block(spec, stream, size)
    flops = stream.tokens / length * block_flops(spec, length, length)
    last = _last_rows(spec, stream, size, rows) if rows else block
    return Stack(depth, block, last, stream.tokens * spec.width * _NUMBER, flops)


def _captioner(spec: ModelSpec, stream: _Stream, memory: float, size: int, pairs: float) -> Stack:
    """The captioner's blocks, which look at `memory` tokens of pictures."""
    assert spec.caption
    text, inner = spec.text, spec.text.attention_width
    block = _block(text, stream, size) + _norm(text, stream.tokens, size) + _gain(text, stream.tokens, size)
    # Queries and what is mixed for them are on the captions' side, keys and values on the pictures'.
    block += stream.attention(text, size) + 2 * (memory - stream.places) * inner * size
    if spec.caption.cross == "after":
        block += _mlp(text, stream.tokens, size) + _norm(text, stream.tokens, size) + _gain(text, stream.tokens, size)
        block += memory * (spec.memory_width * size + 2 * _NUMBER)  # the norm of the other stream
    length = stream.tokens / pairs
    flops = pairs * block_flops(text, length, length, memory / pairs, spec.memory_width)
    return Stack(spec.caption.depth, block, block, stream.tokens * text.width * _NUMBER, flops)


def _block(spec: TowerSpec, stream: _Stream, size: int) -> float:
    """Two norms, attention and the MLP."""
    tokens = stream.tokens
    norms = 2 * (_norm(spec, tokens, size) + _gain(spec, tokens, size))
    return norms + stream.attention(spec, size) + _mlp(spec, tokens, size)


def _last_rows(spec: TowerSpec, stream: _Stream, size: int, rows: float) -> float:
    """A block of which `rows` tokens are wanted: the others are only looked at."""
    keys = 2 * stream.places * spec.attention_width * size
    return _norm(spec, stream.tokens, size) + keys + _block(spec, _Stream(rows, rows), size)


def _norm(spec: TowerSpec, tokens: float, size: int) -> float:
    """A norm's input with its mean and spread, and what reads its output."""
    return tokens * (spec.width * (_NUMBER + size) + 2 * _NUMBER)


def _gain(spec: TowerSpec, tokens: float, size: int) -> float:
    """What a learned gain is multiplied with."""
    return tokens * spec.width * size if spec.layer_scale is not None else 0


def _mlp(spec: TowerSpec, tokens: float, size: int) -> float:
    """The hidden units; of a mixture those of each expert a token goes through, its copies, and the routing."""
    hidden = _HIDDEN[spec.mlp] * spec.mlp_width * size
    if spec.experts == 1:
        return tokens * hidden
    each = hidden + spec.width * 2 * size + 3 * _INDEX + 2 * size
    return tokens * (spec.active * each + spec.experts * size)
