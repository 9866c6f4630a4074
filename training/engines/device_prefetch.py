"""Batches on their way to the device, beside the step that is computed there.

The idea is that nothing waits: pinned memory is copied on a stream of its own, while the device still works on the step
before; the stream that computes waits for the copy, and the host for neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Feed:
    """The way to one device; on the CPU tensors are there already."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host tensors on the device, ready for whatever is asked of the current stream from now on."""
        if self._stream is None:
            return list(tensors)
        with torch.cuda.stream(self._stream):
            moved = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in moved:
            tensor.record_stream(current)  # its memory is not the side stream's to give away before it has been read
        return moved
