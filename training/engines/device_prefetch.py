"""Batches become inputs on the device while the step before is still computed there.

The idea is that nothing waits: pinned memory is copied on a stream of its own; the stream that computes waits for the
copy, and the host for neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...data.samples.sample import Batch
from ..objectives.base import Inputs
from ..sample_rng import kept
from ..world import World


class Feed:
    """Moves the batches of a run to the device of this rank."""

    def __init__(self, world: World, seed: int) -> None:
        self._world, self._seed, self.device = world, seed, world.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batch: Batch, samples: int, patch_keep: float, patches: int) -> Inputs:
        """The inputs of a step, from this rank's part of the global batch that comes after `samples` samples.

        Of the `patches` of each picture a fraction `patch_keep` is drawn, by the sample's number in the run.
        """
        pairs = len(batch.lengths)
        numbers = torch.arange(pairs) + (samples + self._world.rank * pairs)
        tensors = (batch.images, batch.tokens, batch.lengths, batch.caption_ids, batch.image_ids, numbers)
        columns = batch.columns
        images, tokens, lengths, caption_ids, image_ids, numbers, *moved = self.move([*tensors, *columns.values()])
        inputs = Inputs(images, tokens, lengths, caption_ids, image_ids, numbers, host_lengths=batch.lengths)
        if columns:
            inputs = replace(inputs, columns=dict(zip(columns, moved, strict=True)))
        if patch_keep < 1:
            inputs = replace(inputs, patches=kept(self._seed, "image/patches", numbers, patches, patch_keep))
        return inputs

    def move(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host tensors on the device, ready for whatever the current stream is given from now on."""
        if self._stream is None:
            return list(tensors)
        with torch.cuda.stream(self._stream):
            moved = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(current)  # its memory is not the side stream's to give away before it has been read
        return moved
