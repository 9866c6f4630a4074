"""Muon: the matrices inside of blocks step along their momentum made orthogonal (Jordan et al., 2024).

The momentum is taken number by number and kept as AdamW keeps its first moment, so commits and growth see one more
`exp_avg`. Only what makes it orthogonal needs a whole matrix; it is the iteration of torch.optim.Muon, for all matrices
of a shape at once, as a step is otherwise thousands of small kernels. A step is left out by a factor of zero that stays
on the device, and where a process holds some rows of every matrix, each makes every n-th of them orthogonal.

Which matrices: those between two streams of hidden channels. Tables, patches, projections into the joint space, what
leads to shared blocks and routers are inputs and outputs, whose rows are words, pixels or experts; they, biases and
norms stay with AdamW, as its authors and those of Moonlight (arXiv 2502.16982) do. A step is 0.2 times the root of the
longer side as large (Moonlight): its entries are then of the size of AdamW's, and both share a learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..world import World
from .layout import Layout, shard_rows

_MATRIX = re.compile(r"\.blocks\.\d+\..*\.(query|key|value|out|gate|up|down)\.weight$")
_MOMENTUM = 0.95
"""share of the momentum that a step keeps, as its authors have it"""
_QUINTIC, _ITERATIONS, _SMALL = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""of Newton-Schulz, as its authors have them"""
_TOGETHER = 1 << 26
"""numbers of the matrices that are made orthogonal at once"""


def hidden(name: str) -> bool:
    """Whether Muon is for the parameter of this name."""
    return _MATRIX.search(name) is not None


def orthogonal(matrices_nab: Tensor) -> Tensor:
    """How far matrices [n, a, b] move along `matrices_nab` at a learning rate of 1: all singular values of each about
    0.2 sqrt(max(a, b)). In bf16, as torch.optim.Muon."""
    rows, columns = matrices_nab.shape[1:]
    x = matrices_nab.bfloat16()
    x = x.mT if rows > columns else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALL)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    return x.to(matrices_nab.dtype) * (0.2 * max(rows, columns) ** 0.5)


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
        if not self.matrices:
            return
        names = [name for name, matrix in self.matrices.items() if matrix.grad is not None]
        for some in self._groups(names):
            directions = self._directions(some, applies)
            moves = self._moves(some, directions)
            torch._foreach_mul_(moves, applies)
            torch._foreach_mul_(moves, [-lr * factors.get(name, 1.0) for name in some])
            matrices: list[Tensor] = [self.matrices[name] for name in some]
            torch._foreach_mul_(matrices, 1 - applies * (lr * self._decay))
            torch._foreach_add_(matrices, moves)

    def _groups(self, names: Sequence[str]) -> Iterator[list[str]]:
        """The matrices that are moved together: those of one shape, or, across processes, one for each of them."""
        if self._sharding is not None:
            size = self._sharding[0].size
            yield from (list(names[at : at + size]) for at in range(0, len(names), size))
            return
        shapes: dict[torch.Size, list[str]] = {}
        for name in names:
            shapes.setdefault(self.matrices[name].shape, []).append(name)
        for shape, alike in shapes.items():
            most = max(1, _TOGETHER // shape.numel())
            yield from (alike[at : at + most] for at in range(0, len(alike), most))

    def _directions(self, names: Sequence[str], applies: Tensor) -> list[Tensor]:
        """Gradients and their momenta, as Nesterov combines them; finite and without effect if they do not apply."""
        momenta, found = [self.momenta[name] for name in names], []
        for name, momentum in zip(names, momenta, strict=True):
            gradient = self.matrices[name].grad
            assert gradient is not None
            found.append(torch.where(applies > 0, gradient, momentum))
        torch._foreach_lerp_(momenta, found, 1 - _MOMENTUM)
        torch._foreach_lerp_(found, momenta, _MOMENTUM)
        return found

    def _moves(self, names: Sequence[str], directions: Sequence[Tensor]) -> list[Tensor]:
        """What this process has of the moves along `directions`, of which it has as much."""
        if self._sharding is None:
            return list(orthogonal(torch.stack(list(directions))).unbind())
        world, layout = self._sharding
        shapes = [layout[name].shape for name in names]
        lengths = [[shard_rows(shape, rank, world.size).length for rank in range(world.size)] for shape in shapes]
        lengths += [[0] * world.size] * (world.size - len(shapes))  # the last ranks may have no matrix
        there = world.exchange(directions, lengths[world.rank])
        back: list[Tensor] = []
        if world.rank < len(shapes):
            whole = torch.cat(there).view(shapes[world.rank])
            back = list(orthogonal(whole[None]).flatten().split(lengths[world.rank]))
        found = world.exchange(back, [each[world.rank] for each in lengths])
        return [move.view_as(direction) for move, direction in zip(found, directions, strict=False)]
