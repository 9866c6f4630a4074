"""Shards: the part of each logical tensor that one process holds.

However an engine spreads its state, what a rank has of a tensor is one stretch of it laid out flat: all of it under
DDP, whole rows under FSDP2, any run of elements under ZeRO. So a name, a shape and where the stretch begins say all
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
class Stretch:
    """Elements `start` to `start + length` of a logical tensor of this shape, laid out flat."""

    shape: tuple[int, ...]
    start: int
    length: int

    def cut(self, whole: Tensor) -> Tensor:
        """The stretch of the whole tensor: flat, and a copy, so that the whole may go."""
        assert tuple(whole.shape) == self.shape
        return whole.reshape(-1)[self.start : self.start + self.length].clone()


Layout = Mapping[str, Stretch]
"""The stretch of each tensor that this rank holds, by the parameter's name: the same for its weight and moments."""


def shard_rows(shape: tuple[int, ...], rank: int, ranks: int) -> Stretch:
    """The rows that FSDP2 gives to one of `ranks` processes: equal numbers of them, and fewer on the last."""
    chunk = -(-shape[0] // ranks)
    first, end = min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])
    width = prod(shape[1:])
    return Stretch(shape, first * width, (end - first) * width)


def gathered(own: Tensor, stretch: Stretch, world: World) -> Tensor:
    """The whole tensor from the stretches of all ranks, on every rank; all call it together.

    The stretches of the ranks must be disjoint and cover the tensor. Exact to the bit: added up as integers.
    """
    whole = torch.zeros(prod(stretch.shape), dtype=own.dtype, device=own.device)
    whole[stretch.start : stretch.start + stretch.length] = own.detach().reshape(-1)
    bits = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    return world.sum(bits).view(whole.dtype).view(stretch.shape)
