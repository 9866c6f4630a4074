"""Checks of each node before a run starts on it; a node that fails is named in the log and excluded.

A node that lacks a GPU, memory, the shared folder, the store or a fast network would otherwise appear as a hang of the
whole job, or slow it down without an error. The network is checked by the processes, which time an all-reduce; if its
bandwidth is below the site's minimum, each node sends to the next one in turn, which identifies the slow nodes.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.machine import usable_memory
from ...data.units import counted
from ..errors import RunError
from ..run_folder import RECIPE_FILE, STOPPED
from .attempts import BAD_NODE, UNFIT

if TYPE_CHECKING:
    from torch import Tensor

    from ...training.world import World

SKEW_SECONDS = 60
MIN_MEMORY = 1 << 30
"""bytes per process"""
MIN_BANDWIDTH = "TREERING_MIN_BANDWIDTH"
"""environment variable with the minimum all-reduce bandwidth between nodes, in GB/s; without it the bandwidth is
measured and printed, and any is accepted"""
_CPU_BYTES, _GPU_BYTES = 2 << 20, 64 << 20
_HEAD_START = 5.0
"""seconds that a healthy node waits, so that the slow ones report their failure first"""


def examine_node(run: Path, processes: int) -> list[str]:
    """What prevents this node from training `processes` processes of `run`, as sentences; empty if nothing does."""
    if not (run / "recipe.yaml").is_file():
        return [f"it cannot see the run folder {run}; put --out on a disk that all nodes share"]
    return [wrong for wrong in (_clock(run), _memory(processes), _devices(processes)) if wrong]


def _clock(run: Path) -> str | None:
    """Compare the node's clock with that of the shared disk, which is the same for all nodes."""
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
    free = usable_memory()
    if free is None or free >= processes * MIN_MEMORY:
        return None
    return (
        f"{free / 2**30:.1f} GiB of memory for {counted(processes, 'process')}; other programs use "
        "the rest, or the job may have no more: see --mem and --mem-per-cpu"
    )


def _devices(processes: int) -> str | None:
    """Check that there is a GPU per process, if the job requested GPUs."""
    if not os.environ.get("TREERING_GPUS"):
        return None
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return None if found >= processes else f"{found} GPUs are usable and {processes} are needed; have the node checked"


def check_store_from_node(run: Path) -> None:
    """Write an object to the recipe's store and read it back. Raises StoreError."""
    from ...training.checkpoint.store import Store
    from ..recipe.load import read_recipe

    Store(read_recipe(str(run / RECIPE_FILE)).recipe.commits_url(run)).check()


def check_network() -> None:
    """Time an all-reduce across all processes; rank 0 prints the bandwidth. Collective: every process calls this.

    If it is too slow, raises RunError in the processes of the slow nodes, and some seconds later in all others.
    """
    from ...training.world import World

    world = World.join()
    hosts = world.hosts()
    if len(hosts) == 1:
        return
    seconds = _seconds(world, lambda data: _all_reduce(world, data))
    size = _bytes(world)
    bandwidth = 2 * (world.size - 1) / world.size * size / seconds / 1e9
    if world.is_first:
        print(f"all-reduce of {size >> 20} MiB across {counted(len(hosts), 'node')}: {bandwidth:.3g} GB/s", flush=True)
    least = float(os.environ.get(MIN_BANDWIDTH, "0"))
    if bandwidth >= least:
        return
    slow = _slow_nodes(world, hosts)
    names = ", ".join(slow)
    if socket.gethostname() in slow:
        raise RunError(
            f"{UNFIT}: all-reduce at {bandwidth:.3g} GB/s, the site requires {least:g}; slow: {names}", BAD_NODE
        )
    time.sleep(_HEAD_START)
    raise RunError(f"the network of {names} is too slow", STOPPED)


def _slow_nodes(world: World, hosts: list[str]) -> list[str]:
    """The nodes with slow links to both neighbours in a ring; with two nodes both, as one link cannot tell them
    apart."""
    import torch.distributed as dist

    homes = world.objects(socket.gethostname())
    first = [homes.index(host) for host in hosts]
    times = []
    for i, a in enumerate(first):
        b = first[(i + 1) % len(first)]

        def send(data: Tensor, a: int = a, b: int = b) -> None:  # there and back
            if world.rank == a:
                dist.send(data, b)
                dist.recv(data, b)
            elif world.rank == b:
                dist.recv(data, a)
                dist.send(data, a)

        times.append(_seconds(world, send))
    worst = [max(times[i - 1], times[i]) if len(hosts) == 2 else min(times[i - 1], times[i]) for i in range(len(hosts))]
    return [host for host, seconds in zip(hosts, worst, strict=True) if seconds > max(worst) / 2]


def _seconds(world: World, transfer: Callable[[Tensor], None]) -> float:
    """Seconds of the second of two transfers, the maximum over all processes (the first sets up connections)."""
    import torch

    data = torch.zeros(_bytes(world) // 4, device=world.device)
    for _ in range(2):
        world.barrier()
        begun = time.monotonic()
        transfer(data)
        if data.is_cuda:
            torch.cuda.synchronize()
    taken = torch.tensor(time.monotonic() - begun, dtype=torch.float64, device=world.device)
    return float(world.max(taken))


def _all_reduce(world: World, data: Tensor) -> None:
    import torch.distributed as dist

    dist.all_reduce(data, group=world.group)


def _bytes(world: World) -> int:
    return _GPU_BYTES if world.device.type == "cuda" else _CPU_BYTES
