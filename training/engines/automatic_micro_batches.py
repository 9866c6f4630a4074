"""`engine.micro_batches: auto`: the fewest pieces a batch has to be cut into so that a step fits the device.

Found by trying, on the fullest batch a stage can have, before its first step: accelerate's `find_executable_batch_size`
runs a forward and a backward pass and comes down in size as long as memory runs out. Each process tries alone, without
a collective, so none waits for one that has no memory; then all take the smallest pieces that anyone needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from ..device import device_name
from ..objectives.base import Inputs, load_states, states
from ..state import Event, TrainingError
from ..world import World
from . import micro_batches
from .activation_checkpointing import USABLE
from .base import Engine, Forward


def fewest_pieces(engine: Engine, inputs: Inputs, longest: int) -> int:
    """The fewest pieces in which every rank can take its part of a batch; all call it together, with as many pairs.

    `inputs` is any batch of the stage, whose captions are at most `longest` tokens long. Weights, moments, random
    numbers and objectives are afterwards what they were. Raises TrainingError where a single pair does not fit.
    """
    fullest, pairs, pieces = with_longest_captions(inputs, longest), len(inputs.lengths), 1

    def fewer_pairs() -> int:
        nonlocal pieces
        pieces = max(pieces + 1, pieces * 5 // 4) if pieces < pairs else 0
        return -(-pairs // pieces) if pieces else 0

    def attempt(size: int) -> int:
        try:
            _try(engine, fullest, min(pieces, pairs))
        except RuntimeError as error:
            # Its frames hold the activations: without them the next trial has their memory.
            raise error.with_traceback(None) from None
        return min(pieces, pairs)

    # Not as a decorator: some versions of accelerate drop its argument there (seen: 1.7 to 1.12).
    found = find_executable_batch_size(attempt, starting_batch_size=pairs, reduce_batch_size_fn=fewer_pairs)
    with _unchanged(engine), _usable_memory(engine.world.device):
        # What the first optimizer step allocates is held meanwhile: moments that are not there yet.
        moments = engine.logical_state()
        try:
            own = found()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            own = 0
        del moments
    needed = engine.world.objects(own)
    if not all(needed):
        raise TrainingError(
            f"engine.micro_batches = auto: a single pair does not fit the memory of rank {needed.index(0)}; use "
            f"engine.activation_budget: auto, engine.kind: fsdp on more devices, or a smaller model"
        )
    return int(max(needed))


def find_pieces(engine: Engine, inputs: Inputs, longest: int, stage: int) -> dict[str, Any]:
    """The fewest pieces for a stage, as the lineage records them: there `recorded_pieces` finds them again."""
    pieces, device = fewest_pieces(engine, inputs, longest), device_name(engine.world.device)
    return {"stage": stage, "device": device, "pieces": pieces, "pairs": -(-len(inputs.lengths) // pieces)}


def recorded_pieces(lineage: Sequence[Event], stage: int, world: World) -> int | None:
    """The pieces that a run has found for a stage on as many devices of this kind; None if it has not looked."""
    here = {"stage": stage, "device": device_name(world.device)}
    found = [
        event.detail["pieces"]
        for event in lineage
        if event.event == "micro_batches" and event.world == world.size and here.items() <= event.detail.items()
    ]
    return found[-1] if found else None


def with_longest_captions(inputs: Inputs, longest: int) -> Inputs:
    """The batch with its captions all `longest` tokens long, made of the tokens that it has."""
    pairs = len(inputs.lengths)
    tokens = inputs.tokens.repeat(-(-pairs * longest // len(inputs.tokens)))[: pairs * longest]
    host = torch.full_like(inputs.known_lengths, longest)
    return replace(inputs, tokens=tokens, lengths=torch.full_like(inputs.lengths, longest), host_lengths=host)


def _try(engine: Engine, inputs: Inputs, pieces: int) -> None:
    """A forward and a backward pass of this rank alone, as `Engine.step` makes them."""
    alone = World(0, 1, engine.world.device)
    forward = Forward(engine.model, engine.objectives, alone, engine.config.precision, engine.recomputing)
    engine.take_pieces(pieces)
    if pieces > 1:

        def output(piece: Inputs) -> micro_batches.PieceOutput:
            return forward(piece, losses=False), engine.model.output_table

        micro_batches.backward(output, engine.objectives, inputs, pieces, alone)
        return
    partial_losses = forward(inputs)
    torch.stack([o.weight * partial_losses[o.name] for o in engine.objectives]).sum().backward()


@contextlib.contextmanager
def _unchanged(engine: Engine) -> Iterator[None]:
    """Puts back what a trial changes: pieces, gradients, random numbers, what objectives count."""
    device, counted, pieces = engine.world.device, states(engine.objectives), engine.pieces
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        for parameter in engine.model.parameters():
            parameter.grad = None
        load_states(engine.objectives, counted)
        engine.take_pieces(pieces)


@contextlib.contextmanager
def _usable_memory(device: torch.device) -> Iterator[None]:
    """Lets a GPU run out a little before its memory does: an allocator leaves holes, and batches wait on the device."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(USABLE, device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()
