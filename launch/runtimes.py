"""How many OpenMP threads a training process uses, and how long they spin while they wait for each other.

The one idea: OpenMP's settings are put into the environment before torch is imported, because the runtime reads them
when it is loaded and child processes inherit them. Settings of the user are kept.
"""

from __future__ import annotations

import os

from ..data.machine import usable_cores

SPINS = 2000
"""GOMP_SPINCOUNT: loop iterations until a waiting thread sleeps; compared in docs/benchmarks/shared_machine.md"""
BLOCK_TIME = 1
"""KMP_BLOCKTIME, the same for Intel's runtime, in milliseconds"""


def limit_spinning() -> None:
    """Make waiting threads sleep soon, in this process and in its children.

    By default libgomp's threads spin for some milliseconds, Intel's for 200. On a machine shared with other processes
    they occupy the very cores that the threads they wait for need. A user's OMP_WAIT_POLICY, GOMP_SPINCOUNT or
    KMP_BLOCKTIME is kept.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    os.environ.setdefault("KMP_BLOCKTIME", str(BLOCK_TIME))


def share_cores(processes: int) -> None:
    """Divide the cores that this process may use evenly among `processes`, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, usable_cores() // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if processes == 1:  # training runs in this process, where torch may be loaded already
        import torch

        torch.set_num_threads(threads)
