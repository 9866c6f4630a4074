"""Traces a few steps with torch.profiler; open the file in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_SKIPPED, _WARM_UP, _STEPS = 3, 1, 4


class Profile:
    """Traces steps 5 to 8 of this process into `out`/trace-rank-N.json.gz; a no-op if `out` is None."""

    def __init__(self, out: Path | None, rank: int, device: torch.device) -> None:
        self._profile = None
        if out is None:
            return
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=_SKIPPED, wait=0, warmup=_WARM_UP, active=_STEPS, repeat=1),
            on_trace_ready=lambda traced: traced.export_chrome_trace(str(out / f"trace-rank-{rank}.json.gz")),
            record_shapes=True,
        )
        self._profile.start()

    def step(self) -> None:
        """Mark the end of a step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Stop at the end of the run; writes what was traced so far."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
