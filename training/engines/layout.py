"""Shards: the part of each logical tensor that one process holds.

However an engine spreads its state, what a rank has of a tensor is one flat of it laid out flat: all of it under
DDP, whole rows under FSDP2, any run of elements under ZeRO. So a name, a shape and where the flat begins say all
there is to say, and commits, resumes and growth work for every engine and every world alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..world import World


@dataclass(frozen=True)
class FlatRange:
    """Elements `start` to `start + length` of a logical tensor of this shape, laid out flat."""

    shape: tuple[int, ...]
    start: int
    length: int

    def cut(self, whole: Tensor) -> Tensor:
        """The flat of the whole tensor: flat, and a copy, so that the whole may go."""
        assert tuple(whole.shape) == self.shape
        return whole.reshape(-1)[self.start : self.start + self.length].clone()


Layout = Mapping[str, FlatRange]
"""The flat of each tensor that this rank holds, by the parameter's name: the same for its weight and moments."""


def shard_rows(shape: tuple[int, ...], rank: int, ranks: int) -> FlatRange:
    """The rows that FSDP2 gives to one of `ranks` processes: equal numbers of them, and fewer on the last."""
    chunk = -(-shape[0] // ranks)
    first, end = min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])
    width = prod(shape[1:])
    return FlatRange(shape, first * width, (end - first) * width)


def gathered(own: Tensor, flat: FlatRange, world: World) -> Tensor:
    """The whole tensor from the ranges of all ranks, on every rank; all call it together.

    The ranges of the ranks must be disjoint and cover the tensor. Exact to the bit: added up as integers.
    """
    whole = torch.zeros(prod(flat.shape), dtype=own.dtype, device=own.device)
    whole[flat.start : flat.start + flat.length] = own.detach().reshape(-1)
    bits = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    return world.sum(bits).view(whole.dtype).view(flat.shape)
