"""What each node is asked before a run starts on it; one that gives a wrong answer is named, and left out.

A node that lacks a GPU, memory, the shared folder, the store or a fast network would otherwise show as a hang of the
whole job, or as one that is slow for no reason. The processes look at the network, as they alone have it: they add up
some megabytes, and if that is slower than the site says it must be, each node sends to the next in turn.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RunError
from ..run_folder import RECIPE_FILE, STOPPED
from .attempts import BAD_NODE, UNFIT

if TYPE_CHECKING:
    from torch import Tensor

    from ...training.world import World

SKEW_SECONDS = 60
LEAST_MEMORY = 1 << 30
"""bytes for a process"""
LEAST_BANDWIDTH = "TREERING_BANDWIDTH"
"""environment variable with the least all-reduce bandwidth between nodes, in GB/s; without it the network is measured
and told, and never found wanting"""
_CPU_BYTES, _GPU_BYTES = 2 << 20, 64 << 20
_SPEAKS_FIRST = 5.0
"""seconds that a node waits for a worse one to say so, before it ends as well"""


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


def check_store_from_node(run: Path) -> None:
    """The store of the recipe takes an object and gives it back. Raises StoreError."""
    from ...training.checkpoint.store import Store
    from ..recipe.load import read_recipe

    Store(read_recipe(str(run / RECIPE_FILE)).recipe.commits_url(run)).check()


def check_network() -> None:
    """Measure an all-reduce across all processes; the first one prints it. Every process of the job calls this.

    Raises RunError in the processes of a node whose network is too slow, and a while later in those of the others.
    """
    from ...training.world import World

    world = World.join()
    hosts = world.hosts()
    if len(hosts) == 1:
        return
    seconds = _seconds(world, lambda data: _add_up(world, data))
    size = _bytes(world)
    bandwidth = 2 * (world.size - 1) / world.size * size / seconds / 1e9
    if world.is_first:
        print(f"all-reduce of {size >> 20} MiB across {len(hosts)} nodes: {bandwidth:.3g} GB/s", flush=True)
    least = float(os.environ.get(LEAST_BANDWIDTH, "0"))
    if bandwidth >= least:
        return
    slow = _slow_nodes(world, hosts)
    names = ", ".join(slow)
    if socket.gethostname() in slow:
        raise RunError(
            f"{UNFIT}: all-reduce at {bandwidth:.3g} GB/s, the site wants {least:g}; slow: {names}", BAD_NODE
        )
    time.sleep(_SPEAKS_FIRST)
    raise RunError(f"the network of {names} is too slow", STOPPED)


def _slow_nodes(world: World, hosts: list[str]) -> list[str]:
    """The nodes with a slow way to both neighbours in a ring; of two nodes both, as nobody can tell."""
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
    """What the transfer of some megabytes takes, the second time, as the slowest process sees it."""
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


def _add_up(world: World, data: Tensor) -> None:
    import torch.distributed as dist

    dist.all_reduce(data, group=world.group)


def _bytes(world: World) -> int:
    return _GPU_BYTES if world.device.type == "cuda" else _CPU_BYTES
