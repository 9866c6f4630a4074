"""A trace of a few steps that a browser opens (chrome://tracing, ui.perfetto.dev): where the time of a step goes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_SKIPPED, _WARM_UP, _STEPS = 3, 1, 4


class Profile:
    """Traces this process's steps 5 to 8 after the start into `out`/trace-rank-N.json.gz; without `out`, nothing."""

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
        """The end of a step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """The end of the run; what was traced up to now is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
