"""What train_step asks of a device beside the step itself: waits, equal bits, the stall of a commit, the loader.

Each function returns figures by name and may raise: the caller goes on with the next.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treering.data.config import DataConfig, SourceConfig
from treering.data.loading.loader import Loader
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store
from treering.training.device import repeating
from treering.training.engines.base import Engine
from treering.training.engines.device_prefetch import Feed
from treering.training.objectives.base import Inputs
from treering.training.state import RunState
from treering.training.world import World

_SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1),
)
_TENSOR = (1024, 1024)
_RATE = 1e-3


def waits(engine: Engine, inputs: Inputs) -> dict[str, float]:
    """Whether three steps ask the device for something; torch raises at the first that does."""
    for _ in range(2):  # the first steps make the optimizer's state and the kernels
        engine.step(inputs, 0.0)
    on_gpu = engine.world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            engine.step(inputs, 0.0)
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0.0}


def repeat(make: Callable[[bool], Engine], inputs: Inputs) -> dict[str, float]:
    """The share of weights and moments whose bits two equal steps gave alike, as they come and `deterministic`, and
    what that costs: the time of a step over that of one as they come."""
    figures, seconds = {}, {}
    for name, wanted in (("as_they_come", False), ("deterministic", True)):
        with repeating(wanted):
            states: list[dict[str, Tensor]] = []
            for _ in range(2):
                engine = make(wanted)
                engine.step(inputs, _RATE)
                states.append({path: tensor.clone() for path, tensor in engine.logical_state().items()})
                seconds[name] = _seconds(lambda engine=engine: engine.step(inputs, _RATE), engine.world.device)  # type: ignore[misc]
                engine.close()
            equal = sum(int((states[0][path] == states[1][path]).sum()) for path in states[0])
            figures[f"equal_bits_{name}"] = equal / sum(tensor.numel() for tensor in states[0].values())
    return figures | {"deterministic_over_as_they_come": seconds["deterministic"] / seconds["as_they_come"]}


def _seconds(step: Callable[[], Any], device: torch.device, steps: int = 3) -> float:
    _wait_for(device)
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    _wait_for(device)
    return (time.perf_counter() - begun) / steps


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def commit_stall(device: torch.device, size: int) -> dict[str, float]:
    """Seconds that training stands still for a commit of `size` bytes that lie on the device: of the first, which makes
    the pinned memory, and of the least of two later ones."""
    count = max(1, size // (3 * 4 * _TENSOR[0] * _TENSOR[1]))
    tensors = {
        f"{kind}/layer.{number}": torch.randn(_TENSOR, device=device)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for number in range(count)
    }
    stalls = []
    with tempfile.TemporaryDirectory() as folder:
        commits, world = Commits(Store(folder)), World(0, 1, device)
        for step in range(1, 4):
            begun = time.perf_counter()
            writing = commits.begin(Snapshot(_SPEC, RunState(step=step, attempt=1), {}, tensors), world)
            stall = time.perf_counter() - begun
            while not writing.done:
                while writing.busy:
                    time.sleep(0.01)  # training
                edge = time.perf_counter()
                writing.advance()
                stall += time.perf_counter() - edge
            stalls.append(stall)
    bytes_ = sum(tensor.nbytes for tensor in tensors.values())
    return {"commit_bytes": float(bytes_), "commit_stall_first": stalls[0], "commit_stall": min(stalls[1:])}


def looped(engine: Engine, photos: Path, batch: int, steps: int) -> dict[str, float]:
    """Samples a second with the loader in the loop, from shards of the photos in a folder, and the share of the time in
    which a step waited for its batch."""
    workers = min(14, max(1, (os.cpu_count() or 2) - 2))
    with tempfile.TemporaryDirectory() as folder:
        _shards(photos, Path(folder))
        sources = (SourceConfig(source=f"{folder}/*.tar"),)
        spec = engine.model.spec
        loader = Loader(
            DataConfig(train=sources, batch=batch, workers=workers), spec.image.resolution, spec.text.context, 0
        )
        feed, waited, begun = Feed(engine.world, 0), 0.0, 0.0
        batches = loader.batches(0)
        for step in range(steps + 2):
            if step == 2:  # processes have started, kernels are there
                _wait_for(engine.world.device)
                waited, begun = 0.0, time.perf_counter()
            before = time.perf_counter()
            some = next(batches)
            waited += time.perf_counter() - before
            engine.step(feed(some, step * batch, 1.0, spec.image.grid**2), 0.0)
        _wait_for(engine.world.device)
        spent = time.perf_counter() - begun
        batches.close()
    return {"loop_samples_per_second": steps * batch / spent, "loop_waited": waited / spent, "loop_workers": workers}


def _shards(photos: Path, folder: Path) -> None:
    """The photos of a folder with a captions.tsv as tar shards of 250."""
    captions: dict[str, str] = {}
    for line in (photos / "captions.tsv").read_text(encoding="utf-8").splitlines():
        name, _, caption = line.partition("\t")
        if (photos / name).is_file():
            captions.setdefault(name, caption)
    names = sorted(captions)
    for number, at in enumerate(range(0, len(names), 250)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for name in names[at : at + 250]:
                key = name.partition(".")[0]
                text = folder / "caption.txt"
                text.write_text(captions[name], encoding="utf-8")
                tar.add(photos / name, f"{key}.jpg")
                tar.add(text, f"{key}.txt")
