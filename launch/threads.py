"""How many threads a training process computes with, and how long they spin for each other.

The one idea: whatever is said to OpenMP stands in the environment before torch is imported, since the runtime reads it
when it is loaded, and since processes that are started inherit it. What a person has set stays.
"""

from __future__ import annotations

import os

SPINS = 2000
"""GOMP_SPINCOUNT: turns of a loop until a waiting thread sleeps; docs/benchmarks/shared_machine.md compares others"""
BLOCK_TIME = 1
"""KMP_BLOCKTIME, the same for Intel's runtime, in milliseconds"""


def limit_spinning() -> None:
    """Let threads that wait sleep soon, in this process and in those it starts.

    libgomp's spin for some milliseconds, Intel's for 200: on a machine that other processes use too they keep the
    cores from the very threads they wait for. Whoever has set OMP_WAIT_POLICY or a runtime's own variable has decided.
    """
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    os.environ.setdefault("KMP_BLOCKTIME", str(BLOCK_TIME))


def share_cores(processes: int) -> None:
    """Share the cores that this process may use evenly among `processes`, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if processes == 1:  # this one, in which torch may have been loaded
        import torch

        torch.set_num_threads(threads)
