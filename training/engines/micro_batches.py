"""Micro-batches with the exact gradient of the whole batch, so that a batch is a matter of patience, not of memory.

A contrastive loss is no sum over micro-batches: each pair meets all others. So the step goes twice through the model
(GradCache: Gao et al., arXiv 2101.06983): first without a graph, keeping of each micro-batch only what the objectives
read; then the losses of the whole batch give the gradient in these outputs; then each micro-batch goes through again,
with a graph, and that gradient is put in at its outputs. The objectives see the whole batch once and know nothing of
it. Random numbers are the same both times: what was drawn by the sample's number is anyway, and the states of torch's
generators are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...models.model import ModelOutput
from ...models.towers import TowerOutput
from ...models.transformer import Dense, Packed
from ..objectives.base import Inputs, Need, Objective
from ..world import World

Output = tuple[ModelOutput, Tensor]
"""a model's output and its token table"""
_PARTS: dict[str, tuple[Need, Callable[[ModelOutput], Tensor | None]]] = {
    "image": ("embeddings", lambda output: output.image.pooled),
    "text": ("embeddings", lambda output: output.text.pooled),
    "image_tokens": ("tokens", lambda output: output.image_tokens),
    "text_tokens": ("tokens", lambda output: output.text_tokens),
    "caption": ("caption", lambda output: output.caption),
}
"""What objectives may read of each sample, by the need that says they do."""
_SUMS = "routing/"
"""What begins so is a sum over the tokens of a piece, and over those of the batch the sum of these."""
_FURTHER, _SCALES = "further/", "scale/"
"""What begins so is the embeddings of a further tower, and its temperature."""


def backward(
    forward: Callable[[Inputs], Output],
    objectives: Sequence[Objective],
    inputs: Inputs,
    parts: int,
    world: World,
    hold: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """Add the gradient of the weighted sum of all objectives, times the world's size, to the parameters'; the shares.

    `forward` gives the model's output and its token table for some inputs, with whatever the objectives ask for
    (`extras_of`). The inputs go through it in `parts` pieces; as engines average gradients over ranks, the world's size
    makes it the sum. `hold` is entered for the backward pass of all pieces but the last: what keeps an engine from
    exchanging gradients before they are complete (DDP's `no_sync`).
    """
    needs = {need for objective in objectives for need in objective.needs}
    pieces = cut(inputs, parts)
    kept, generators = [], []
    with torch.no_grad():
        for piece in pieces:
            generators.append(_generators(world.device))
            kept.append(_read(*forward(piece), needs))
    whole = {name: _leaf(name, [one[name] for one in kept]) for name in kept[0]}
    output, table = _assembled(whole, inputs)
    shares = {o.name: o.share(output, inputs, table, world) for o in objectives}
    loss = torch.stack([o.weight * shares[o.name] for o in objectives]).sum()
    (loss * world.size).backward()
    sizes = {name: [len(one[name]) for one in kept] for name in whole if _of_samples(name)}
    slopes = {name: leaf.grad for name, leaf in whole.items()}
    for number, (piece, states) in enumerate(zip(pieces, generators, strict=True)):
        last = number == len(pieces) - 1
        _set_generators(world.device, states)
        with contextlib.nullcontext() if last else hold():
            found = _read(*forward(piece), needs)
            roots = []
            for name, tensor in found.items():
                slope = slopes[name]
                once = not (_of_samples(name) or name.startswith(_SUMS))
                if slope is None or not tensor.requires_grad or (once and not last):
                    continue  # scales, bias and table are one for all pieces: their slopes go in once
                roots.append((tensor, slope.split(sizes[name])[number] if _of_samples(name) else slope))
            torch.autograd.backward([tensor for tensor, _ in roots], [slope for _, slope in roots])
    return {name: share.detach() for name, share in shares.items()}


def cut(inputs: Inputs, parts: int) -> list[Inputs]:
    """The inputs in `parts` pieces of equal numbers of pairs, give or take one; no more pieces than pairs."""
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


def _of_samples(name: str) -> bool:
    """Whether what is read of a piece is of its samples, and of the batch all of these."""
    return name in _PARTS or name.startswith(_FURTHER)


def _read(output: ModelOutput, table: Tensor, needs: set[Need]) -> dict[str, Tensor]:
    """What the objectives read of a forward pass."""
    read = {name: get(output) for name, (need, get) in _PARTS.items() if need in needs}
    if "routing" in needs:
        for number, (counts_e, gates_e) in enumerate(output.routing):
            read |= {f"{_SUMS}{number}/counts": counts_e, f"{_SUMS}{number}/gates": gates_e}
    for name, tower in output.further.items():
        read |= {f"{_FURTHER}{name}": tower.pooled, f"{_SCALES}{name}": tower.scale}
    read |= {"scale": output.scale, "bias": output.bias, "table": table}
    return {name: tensor for name, tensor in read.items() if tensor is not None}


def _leaf(name: str, pieces: list[Tensor]) -> Tensor:
    whole = torch.cat(pieces) if _of_samples(name) else pieces[-1]
    if name.startswith(_SUMS):
        whole = torch.stack(pieces).sum(0)
    return whole.detach().requires_grad_(whole.is_floating_point())


def _assembled(whole: dict[str, Tensor], inputs: Inputs) -> tuple[ModelOutput, Tensor]:
    """A model's output for the whole batch, with what was read of it and nothing else, and the token table."""
    pairs, nothing = len(inputs.lengths), inputs.images.new_empty(0)
    image = TowerOutput(whole.get("image", nothing), nothing, Dense(pairs, 0))
    layout = Packed.of(inputs.lengths, len(inputs.tokens), int(inputs.known_lengths.max()))
    text = TowerOutput(whole.get("text", nothing), nothing, layout)
    mixtures = sum(name.startswith(_SUMS) for name in whole) // 2
    routing = tuple((whole[f"{_SUMS}{i}/counts"], whole[f"{_SUMS}{i}/gates"]) for i in range(mixtures))
    tokens = whole.get("image_tokens"), whole.get("text_tokens")
    output = ModelOutput(image, text, whole["scale"], whole.get("bias"), whole.get("caption"), routing, *tokens)
    further = {
        name.removeprefix(_FURTHER): TowerOutput(
            pooled, nothing, Dense(pairs, 0), whole[_SCALES + name.removeprefix(_FURTHER)]
        )
        for name, pooled in whole.items()
        if name.startswith(_FURTHER)
    }
    return output._replace(further=further), whole["table"]


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's default generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
