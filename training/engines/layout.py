"""Layout: the part of each logical tensor that one process holds.

However an engine shards its state, a rank holds one contiguous range of the flattened tensor: all of it under DDP,
whole rows under FSDP2, any range of elements under ZeRO. So a shape and the start of the range describe it completely,
and commits, resumes and growth work the same for every engine and world size.
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
    """Elements `start` to `start + length` of a logical tensor of this shape, flattened."""

    shape: tuple[int, ...]
    start: int
    length: int

    def cut(self, whole: Tensor) -> Tensor:
        """This range of the whole tensor, as a 1-D copy, so that the whole can be freed."""
        assert tuple(whole.shape) == self.shape
        return whole.reshape(-1)[self.start : self.start + self.length].clone()


Layout = Mapping[str, FlatRange]
"""The range of each parameter that this rank holds, by name; the same for its weight and its moments."""


def shard_rows(shape: tuple[int, ...], rank: int, ranks: int) -> FlatRange:
    """The rows that FSDP2 assigns to one of `ranks` processes: equal numbers, and fewer on the last."""
    chunk = -(-shape[0] // ranks)
    first, end = min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])
    width = prod(shape[1:])
    return FlatRange(shape, first * width, (end - first) * width)


def gathered(own: Tensor, flat: FlatRange, world: World) -> Tensor:
    """The whole tensor from the ranges of all ranks; every rank calls this and gets it.

    The ranges of the ranks must be disjoint and cover the tensor. Exact to the bit: the ranges are summed as integers.
    """
    whole = torch.zeros(prod(flat.shape), dtype=own.dtype, device=own.device)
    whole[flat.start : flat.start + flat.length] = own.detach().reshape(-1)
    bits = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    return world.sum(bits).view(whole.dtype).view(flat.shape)
