"""Where the state is spread no process ever holds the whole of it: not to build it, to commit it or to load it."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store
from treering.training.engines.base import Engine
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, DeepSpeedConfig, FsdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.engines.zero_state import require
from treering.training.objectives.contrastive import Contrastive
from treering.training.state import RunState
from treering.training.world import World

RANKS = 4
M_MMAP_THRESHOLD = -3
"""glibc's malloc.h"""
SPEC = ModelSpec(
    embed_dim=64,
    image=ImageSpec(width=512, depth=6, heads=4, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=1, context=9),
)
FRESH = "TREERING_TEST_IN_A_FRESH_PROCESS"
WEIGHTS = 80_000_000
"""bytes, about: six blocks, of which no tensor has more than a twentieth"""
ENGINES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "zero3": DeepSpeedConfig(zero_stage=3),
}


@contextmanager
def peak(found: dict[str, float], name: str) -> Iterator[None]:
    """The most memory that the process has meanwhile beyond what it had before, over the weights of the model."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    yield
    lines = Path("/proc/self/status").read_text().splitlines()
    most = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    found.setdefault(name, (most - before) / WEIGHTS)


def built(kind: str, world: World, found: dict[str, float]) -> Engine:
    """An engine; what its building takes, but for what DeepSpeed then lays out of the parts: several times the part."""
    import deepspeed

    initialize, measuring = deepspeed.initialize, peak(found, "build")

    def measured(**arguments: Any) -> Any:
        measuring.__exit__(None, None, None)
        return initialize(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", measured)
        measuring.__enter__()
        engine = build_engine(SPEC, [Contrastive(1.0)], ENGINES[kind], OptimizerConfig(), world, 1)
        if kind != "zero3":
            measuring.__exit__(None, None, None)
    return engine


def measured_again(test: str) -> None:
    """The test in a process of its own: ranks forked from one that ran other tests begin with the holes of its heap."""
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:xdist", "-p", "no:cacheprovider", test]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment | {FRESH: "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("kind", ["fsdp", "zero3", pytest.param("ddp", marks=pytest.mark.slow)])
def test_what_one_process_holds(
    kind: str, tmp_path: Path, on_ranks: Callable[..., list[Any]], request: pytest.FixtureRequest
) -> None:
    """In units of the weights, of which each of four processes has a quarter, and as much of each moment."""
    if FRESH not in os.environ:
        return measured_again(f"{request.path}::{request.node.name}")
    commits = Commits(Store(str(tmp_path)))

    def write(engine: Engine, world: World, step: int) -> None:
        state, tensors = RunState(step=step, attempt=1), engine.logical_state()
        commits.begin(Snapshot(SPEC, state, {}, tensors, engine.layout, engine.copies), world).finish()

    def read(engine: Engine) -> None:
        commit = commits.open(commits.names()[0])
        engine.load_logical_state(commit.tensors(layout=engine.layout), 1, 0, {})

    def one_rank(world: World) -> dict[str, float]:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is gone: holes are not what is held
        found: dict[str, float] = {}
        # Once before: pages of libraries come into memory with their first use, more or fewer as the machine is busy.
        build_engine(SPEC, [Contrastive(1.0)], ENGINES[kind], OptimizerConfig(), world, 1).close()
        engine = built(kind, world, found)
        write(engine, world, 1)
        read(engine)  # from now on there are moments
        with peak(found, "commit"):
            write(engine, world, 2)
        with peak(found, "load"):
            read(engine)
        engine.close()
        return found

    require(World(0, 1, torch.device("cpu")))  # ranks are forked: imported here, they need not import it
    for found in on_ranks(RANKS, one_rank):
        # The part, and the largest module three times: its values, random numbers and their product.
        assert (found["build"] < 0.5) == (kind != "ddp"), found
        assert 0.7 < found["commit"] < 0.85, found
        assert (found["load"] < 1.4) == (kind != "ddp"), found
