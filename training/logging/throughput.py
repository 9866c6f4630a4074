"""Measurements between two log lines: time, data wait, FLOPs, captions. Time that is not training is excluded."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...data.samples.sample import Batch
from ..device import peak_flops, peak_memory
from ..state import RunState
from ..world import World


class ThroughputMeter:
    """Measures from one log line to the next."""

    def __init__(self, state: RunState, world: World) -> None:
        self._world = world
        self._restart(state)

    def _restart(self, state: RunState) -> None:
        self._begun = time.monotonic()
        self._step, self._flops, self._skipped = state.step, state.flops, state.skipped
        self._waited = 0.0
        self._captions = torch.zeros(3, dtype=torch.int64)  # captions, their tokens, truncated captions

    def exclude_time(self, seconds: float) -> None:
        """Exclude the last `seconds`, which were not training: an evaluation, a commit."""
        self._begun += seconds

    def exclude_flops(self, flops: float) -> None:
        """Exclude FLOPs that were not spent on training steps."""
        self._flops += flops

    def add_wait(self, seconds: float) -> None:
        """Add time in which a step waited for its batch."""
        self._waited += seconds

    def add_captions(self, batch: Batch) -> None:
        """Count the captions of this rank's part of a batch."""
        self._captions += torch.tensor([len(batch.lengths), len(batch.tokens), int(batch.cut.sum())])

    def since(self, state: RunState, skipped: int) -> tuple[int, int]:
        """Steps since the last line, and how many of them were skipped; `skipped` is the run's total so far."""
        return state.step - self._step, skipped - self._skipped

    def line(self, state: RunState, pairs: int) -> dict[str, Any]:
        """The figures of a step line at `state`, with `pairs` per global batch; then start over. All ranks call it
        together."""
        world = self._world
        captions, tokens, cut = world.sum(self._captions.to(world.device)).tolist()
        elapsed = max(time.monotonic() - self._begun, 1e-9)
        peak, waited = peak_flops(world.device), self._waited
        figures = {
            "samples_per_second": (state.step - self._step) * pairs / elapsed,
            "data_wait": waited / elapsed,
            "mfu": (state.flops - self._flops) / elapsed / (peak * world.size) if peak else None,
            "flops": state.flops,
            "peak_memory": peak_memory(world.device),
            "seconds": {"data": waited, "compute": elapsed - waited},
            "caption_length": tokens / captions,
            "captions_cut": cut / captions,
        }
        self._restart(state)
        return figures
