"""How many OpenMP threads a training process uses, how long they spin while they wait for each other, and how a GPU's
memory is divided.

The one idea: settings are put into the environment before torch is imported, because the runtimes read them when they
are loaded and child processes inherit them. Settings of the user are kept.
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


def use_expandable_segments() -> None:
    """Let torch grow pieces of a GPU's memory in place, unless the user has configured its allocator.

    Captions have another number of tokens in every step, and a growth frees tensors of sizes that do not return: in
    pieces of fixed size both leave holes.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # torch's newer name, which it ignores in some versions (2.9 to 2.11)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def share_cores(processes: int) -> None:
    """Divide the cores that this process may use evenly among `processes`, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, usable_cores() // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if processes == 1:  # training runs in this process, where torch may be loaded already
        import torch

        torch.set_num_threads(threads)
