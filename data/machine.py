"""How much of the machine this process may use: cores and memory, as its affinity and its control groups say.

In a container, or in a job of a cluster, the numbers of the machine mislead: a process with a quota of two cores sees
all 64, and 64 threads would take turns on two. Imports only the standard library.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cores(proc: Path = _PROC, groups: Path = _GROUPS) -> int:
    """The number of cores that this process may use: those it is bound to, or its quota if that is smaller."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for folder in _own_groups("cpu", proc, groups):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                )
            if quota not in ("max", "-1"):
                quotas.append(math.ceil(int(quota) / int(period)))
    return max(1, min([bound, *quotas]))


def usable_memory(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Bytes of memory that are free for this process, at most those its group may have; None if it is not known."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (proc / "meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for folder in _own_groups("memory", proc, groups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # the word max means no limit
                found.append(int((folder / name).read_text()))
    return min(found, default=None)


def _own_groups(controller: str, proc: Path, groups: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, from its own to the root, of either version."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = groups / controllers if controllers else groups
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)
