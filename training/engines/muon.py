"""Muon: the matrices inside of blocks step along their momentum made orthogonal (Jordan et al., 2024).

The momentum is taken number by number and kept as AdamW keeps its first moment, so commits and growth see one more
`exp_avg`. Only what makes it orthogonal needs a whole matrix, and that is torch.optim.Muon: it is given zeros to step
from, and where it steps to is added to the weights here. So a step is left out by a factor of zero that stays on the
device, and where a process holds some rows of every matrix, each makes every n-th of them orthogonal.

Which matrices: those between two streams of hidden channels. Tables, patches, projections into the joint space, what
leads to shared blocks and routers are inputs and outputs, whose rows are words, pixels or experts; they, biases and
norms stay with AdamW, as its authors and those of Moonlight (arXiv 2502.16982) do. A step is 0.2 times the root of the
longer side as large (Moonlight): its entries are then of the size of AdamW's, and both share a learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from ..world import World
from .layout import Layout, shard_rows

_MATRIX = re.compile(r"\.blocks\.\d+\..*\.(query|key|value|out|gate|up|down)\.weight$")
_MOMENTUM = 0.95
"""share of the momentum that a step keeps, as its authors have it"""


def hidden(name: str) -> bool:
    """Whether Muon is for the parameter of this name."""
    return _MATRIX.search(name) is not None


def orthogonal(matrix: Tensor) -> Tensor:
    """How far a matrix [a, b] moves along `matrix` at a learning rate of 1: all singular values about 0.2 sqrt(max)."""
    moved = nn.Parameter(torch.zeros_like(matrix))
    moved.grad = matrix
    torch.optim.Muon(
        [moved], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return -moved.detach()


class Muon:
    """The optimizer of the hidden matrices, by name."""

    def __init__(
        self, matrices: Mapping[str, nn.Parameter], decay: float, sharding: tuple[World, Layout] | None = None
    ) -> None:
        """`sharding`: the processes that each hold some rows of every matrix, and the ranges of this one."""
        self.matrices, self._decay, self._sharding = matrices, decay, sharding
        self.momenta = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}

    @torch.no_grad()
    def step(self, lr: float, factors: Mapping[str, float], applies: Tensor) -> None:
        """Move along the gradients at `lr` times each matrix's factor, or, where `applies` [] is 0, change nothing.

        Decay is of `lr` alone, as factors on the rate divide it. Across processes all call this together.
        """
        names = iter([name for name, matrix in self.matrices.items() if matrix.grad is not None])
        while some := list(islice(names, 1 if self._sharding is None else self._sharding[0].size)):
            directions = {name: self._direction(name, applies) for name in some}
            for name, move in self._moves(directions):
                matrix, factor = self.matrices[name], factors.get(name, 1.0)
                matrix.mul_(1 - applies * (lr * self._decay)).add_(move * applies, alpha=-lr * factor)

    def _direction(self, name: str, applies: Tensor) -> Tensor:
        """The gradient and its momentum, as Nesterov combines them; finite and without effect if it does not apply."""
        momentum, gradient = self.momenta[name], self.matrices[name].grad
        assert gradient is not None
        gradient = torch.where(applies > 0, gradient, momentum)
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)

    def _moves(self, directions: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What this process has of the moves along `directions`, of which it has as much."""
        if self._sharding is None:
            yield from ((name, orthogonal(direction)) for name, direction in directions.items())
            return
        world, layout = self._sharding
        shapes = [layout[name].shape for name in directions]
        lengths = [[shard_rows(shape, rank, world.size).length for rank in range(world.size)] for shape in shapes]
        lengths += [[0] * world.size] * (world.size - len(shapes))  # the last ranks may have no matrix
        there = world.exchange(list(directions.values()), lengths[world.rank])
        back: list[Tensor] = []
        if world.rank < len(shapes):
            whole = torch.cat(there).view(shapes[world.rank])
            back = list(orthogonal(whole).flatten().split(lengths[world.rank]))
        found = world.exchange(back, [each[world.rank] for each in lengths])
        yield from (
            (name, move.view_as(direction)) for (name, direction), move in zip(directions.items(), found, strict=False)
        )
