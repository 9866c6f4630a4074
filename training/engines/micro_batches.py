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
    needs = {need for objective in objectives for need in objective.needs}

    def run(piece: Inputs) -> tuple[ModelOutput, dict[str, Leaf]]:
        output, table = forward(piece)
        return output, leaves(output, needs) | {"table": Leaf(table, _TABLE)}

    pieces = cut(inputs, parts)
    kept, generators = [], []
    with torch.no_grad():
        for piece in pieces:
            generators.append(_generators(world.device))
            output, found = run(piece)
            kept.append(found)
    # The whole batch's outputs become leaves of a graph of their own, whose backward pass ends in their gradients.
    whole = {name: _merged([one[name] for one in kept]) for name in kept[0]}
    output = with_leaves(output, whole)
    partial_losses = {o.name: o.partial_loss(output, inputs, whole["table"], world) for o in objectives}
    loss = torch.stack([o.weight * partial_losses[o.name] for o in objectives]).sum()
    (loss * world.size).backward()
    gradients = [_of_pieces(leaf.grad, [one[name] for one in kept]) for name, leaf in whole.items()]
    for number, (piece, states) in enumerate(zip(pieces, generators, strict=True)):
        _set_generators(world.device, states)
        with contextlib.nullcontext() if number == len(pieces) - 1 else hold():
            _, found = run(piece)
            ends = [(leaf.tensor, of[number]) for leaf, of in zip(found.values(), gradients, strict=True)]
            ends = [(tensor, gradient) for tensor, gradient in ends if gradient is not None and tensor.requires_grad]
            torch.autograd.backward([tensor for tensor, _ in ends], [gradient for _, gradient in ends])
    return {name: loss.detach() for name, loss in partial_losses.items()}


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
