"""Micro-batches with the exact gradient of the whole batch: a larger batch takes more time, not more memory.

A contrastive loss is not a sum over micro-batches, as each pair meets all others. So a step runs the model twice
(GradCache: Gao et al., arXiv 2101.06983): first without a graph, keeping only the outputs that the objectives read;
then the losses of the whole batch give the gradients of these outputs; then each micro-batch runs again with a graph,
and these gradients are propagated through it. Which outputs there are, and how those of the pieces are put together, is
declared by `ModelOutput`. The objectives see the whole batch once. Random numbers are the same both times: most are
functions of the sample's number, and the states of torch's generators are restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...models.output import Leaf, Merge, ModelOutput, leaves, with_leaves
from ..objectives.base import Inputs, Objective
from ..world import World

PieceOutput = tuple[ModelOutput, Tensor]
"""a model's output and its token table"""
_TABLE = Merge("equal")
"""the token table, a parameter that objectives read beside the outputs"""


def backward(
    forward: Callable[[Inputs], PieceOutput],
    objectives: Sequence[Objective],
    inputs: Inputs,
    parts: int,
    world: World,
    hold: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """Add the gradient of the weighted sum of all objectives, times the world's size, to that of the parameters.

    Returns this rank's part of each objective. `forward` gives the model's output and its token table for some inputs,
    with what the objectives ask for (`extras_of`). The inputs run in `parts` pieces. Engines average gradients over
    ranks, so the world's size makes them the sum. `hold` is entered for the backward pass of all pieces but the last,
    so that an engine does not exchange gradients before they are complete (DDP's `no_sync`).
    """
    batch = _Batch(forward, objectives, inputs, parts, world)
    partial_losses = batch.losses(objectives, inputs, world)
    loss = torch.stack([o.weight * partial_losses[o.name] for o in objectives]).sum()
    (loss * world.size).backward()
    gradients = batch.of_pieces([leaf.grad for leaf in batch.whole.values()])
    for number, gradient in enumerate(gradients):
        with contextlib.nullcontext() if number == len(gradients) - 1 else hold():
            torch.autograd.backward(*_ends(batch.again(number), gradient))
    return {name: loss.detach() for name, loss in partial_losses.items()}


@torch.no_grad()
def whole_output(
    forward: Callable[[Inputs], PieceOutput], objectives: Sequence[Objective], inputs: Inputs, parts: int, world: World
) -> PieceOutput:
    """The output for a whole batch and the token table, from `parts` pieces and without a graph; arguments as for
    `backward`."""
    batch = _Batch(forward, objectives, inputs, parts, world)
    whole = {name: tensor.detach() for name, tensor in batch.whole.items()}
    return with_leaves(batch.output, whole), whole["table"]


def gradient_norms(
    forward: Callable[[Inputs], PieceOutput],
    objectives: Sequence[Objective],
    inputs: Inputs,
    parts: int,
    world: World,
    parameters: Sequence[Tensor],
) -> dict[str, float]:
    """The norm of each objective's gradient over the global batch, before weighting; one backward pass each.

    Arguments as for `backward`; `forward` must be that of the unwrapped model (not of an engine's wrapper). All ranks
    call it together. No gradient is added to that of the parameters.
    """
    batch = _Batch(forward, objectives, inputs, parts, world)
    leaves = list(batch.whole.values())
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    wanted, totals = {}, {o.name: [torch.zeros_like(p) for p in parameters] for o in objectives}
    for name, loss in batch.losses(objectives, inputs, world).items():
        slopes = iter(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True))
        wanted[name] = batch.of_pieces([next(slopes) if leaf.requires_grad else None for leaf in leaves])
    for number in range(len(batch.pieces)):
        found = batch.again(number)
        for name, gradients in wanted.items():
            tensors, ends = _ends(found, gradients[number])
            if tensors:
                through = torch.autograd.grad(tensors, parameters, ends, retain_graph=True, allow_unused=True)
                for total, slope in zip(totals[name], through, strict=True):
                    total += 0 if slope is None else slope
    squares = {name: [world.sum(one).double().square().sum() for one in total] for name, total in totals.items()}
    return {name: torch.stack(each).sum().sqrt().item() for name, each in squares.items()}


class _Batch:
    """The first pass over a batch: its outputs as leaves of a graph of their own."""

    def __init__(
        self,
        forward: Callable[[Inputs], PieceOutput],
        objectives: Sequence[Objective],
        inputs: Inputs,
        parts: int,
        world: World,
    ) -> None:
        self._forward, self._device = forward, world.device
        self._needs = {need for objective in objectives for need in objective.needs}
        self.pieces = cut(inputs, parts)
        self._kept, self._generators = [], []
        with torch.no_grad():
            for piece in self.pieces:
                self._generators.append(_generators(self._device))
                output, found = self._run(piece)
                self._kept.append(found)
        self.whole = {name: _merged([one[name] for one in self._kept]) for name in self._kept[0]}
        """the outputs of the whole batch, by name"""
        self.output = with_leaves(output, self.whole)

    def losses(self, objectives: Sequence[Objective], inputs: Inputs, world: World) -> dict[str, Tensor]:
        """This rank's part of each objective."""
        return {o.name: o.partial_loss(self.output, inputs, self.whole["table"], world) for o in objectives}

    def _run(self, piece: Inputs) -> tuple[ModelOutput, dict[str, Leaf]]:
        output, table = self._forward(piece)
        return output, leaves(output, self._needs) | {"table": Leaf(table, _TABLE)}

    def of_pieces(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
        """The gradients of all outputs of the whole batch as those of each piece."""
        names = zip(gradients, self.whole, strict=True)
        split = [_of_pieces(gradient, [one[name] for one in self._kept]) for gradient, name in names]
        return [[one[number] for one in split] for number in range(len(self.pieces))]

    def again(self, number: int) -> list[Tensor]:
        """The outputs of a piece once more, with a graph."""
        _set_generators(self._device, self._generators[number])
        return [leaf.tensor for leaf in self._run(self.pieces[number])[1].values()]


def _ends(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs through which a gradient flows back, and the gradients."""
    pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None and t.requires_grad]
    return [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]


def cut(inputs: Inputs, parts: int) -> list[Inputs]:
    """The inputs in `parts` pieces whose numbers of pairs differ by at most one; no more pieces than pairs."""
    pairs = len(inputs.lengths)
    parts = min(parts, pairs)
    sizes = [pairs // parts + (number < pairs % parts) for number in range(parts)]
    tokens = [int(lengths.sum()) for lengths in inputs.known_lengths.split(sizes)]
    tensors = {name: one for name, one in vars(inputs).items() if isinstance(one, Tensor)}
    split = {name: one.split(tokens if name == "tokens" else sizes) for name, one in tensors.items()}
    columns = {name: column.split(sizes) for name, column in inputs.columns.items()}
    return [
        replace(
            inputs,
            columns={name: column[number] for name, column in columns.items()},
            **{name: pieces[number] for name, pieces in split.items()},
        )
        for number in range(parts)
    ]


def _merged(pieces: list[Leaf]) -> Tensor:
    """An output of the whole batch, with a gradient to come."""
    tensors, how = [leaf.tensor for leaf in pieces], pieces[0].merge.how
    if how == "concatenate":
        whole = torch.cat(tensors)
    else:
        whole = torch.stack(tensors).sum(0) if how == "sum" else tensors[-1]
    return whole.detach().requires_grad_(whole.is_floating_point())


def _of_pieces(gradient: Tensor | None, pieces: list[Leaf]) -> Sequence[Tensor | None]:
    """The gradient of an output of the whole batch as those of its pieces."""
    how = pieces[0].merge.how
    if gradient is None or how == "sum":
        return [gradient] * len(pieces)
    if how == "concatenate":
        return gradient.split([len(leaf.tensor) for leaf in pieces])
    # What is equal in all pieces depends on the parameters alone: its gradient counts once, in the last piece.
    return [*[None] * (len(pieces) - 1), gradient]


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's default generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
