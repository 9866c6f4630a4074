"""What each node is asked before a run starts on it; a wrong answer names the node and ends the try.

A node that lacks a GPU, memory, the shared folder or the store would otherwise show as a hang of the whole job.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

SKEW_SECONDS = 60
LEAST_MEMORY = 1 << 30
"""bytes for a process"""


def examine_node(run: Path, processes: int) -> list[str]:
    """What is wrong with this node for `processes` processes of the run in `run`, as sentences; empty if nothing."""
    if not (run / "recipe.yaml").is_file():
        return [f"it does not see the run folder {run}; put --out on a disk that all nodes share"]
    return [wrong for wrong in (_clock(run), _memory(processes), _devices(processes)) if wrong]


def _clock(run: Path) -> str | None:
    """Its clock against that of the shared disk, which is one for all nodes."""
    probe = run / "job" / f".clock-{secrets.token_hex(8)}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        before = time.time()
        probe.touch()
        skew = max(before - probe.stat().st_mtime, probe.stat().st_mtime - time.time())
    except OSError as error:
        return f"it cannot write in {run} ({error.strerror}); check the permissions there"
    finally:
        probe.unlink(missing_ok=True)
    return (
        f"its clock is {skew:.0f} s off that of the shared disk; start its time service"
        if skew > SKEW_SECONDS
        else None
    )


def _memory(processes: int) -> str | None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            if free < processes * LEAST_MEMORY:
                return f"{free / 2**30:.1f} GiB of memory are free for {processes} processes; something else runs there"
    return None


def _devices(processes: int) -> str | None:
    """As many GPUs as processes, where the job asked for GPUs."""
    if not os.environ.get("TREERING_GPUS"):
        return None
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if found >= processes else f"{found} GPUs can be used and {processes} are wanted; have it looked at"


def check_store(run: Path) -> None:
    """The store of the recipe takes an object and gives it back. Raises StoreError."""
    from ..training.store import Store
    from .recipes import read_recipe
    from .run import commits_url

    Store(commits_url(read_recipe(str(run / "recipe.yaml")).recipe, run)).check()
