"""`treering plan`: what a run will need, before anything is queued: memory, time, loader, network, store, money.

Counts come from the recipe alone, with the formulas of models/flops; the length of captions and the cost of decoding
come from reading the first samples of the run as the run will. Memory of activations is counted tensor by tensor as the
blocks keep them for the backward pass. What a CPU process takes before it has a model is that of this very process.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ..models.flops import parameters, training_flops
from ..models.model import empty
from ..models.spec import ModelSpec, TowerSpec
from ..training.recipe import Recipe
from .errors import RecipeError, show

SAMPLES = 2048
"""read to learn what captions and pictures are like"""
LOGITS_BYTES, TILE_BYTES, PART_BYTES = 32 << 20, 4 << 20, 256 << 20
CUDA_BYTES = 1 << 30
"""context, kernels and communication buffers of a GPU process"""


@dataclass(frozen=True)
class Device:
    """One accelerator: dense bf16 peak in FLOP/s and memory in bytes, from its maker's data sheet."""

    peak: float
    memory: float


DEVICES = {
    "a100": Device(312e12, 80e9),
    "b200": Device(2250e12, 180e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "l40s": Device(362e12, 48e9),
}


@dataclass(frozen=True)
class Data:
    """What the first samples of a run are like."""

    tokens: float
    """of a caption, on average"""
    decode_seconds: float
    """of one core, for one sample"""
    bytes: float
    """of a sample in its shard"""


def plan(recipe: Recipe, nodes: int, per_node: int, device: str, mfu: float, price: float | None) -> dict[str, Any]:
    """Everything about the run on `nodes` times `per_node` devices, as one object. Raises RecipeError or DataError.

    `mfu`: the share of the peak that is reached; `price` for a device and hour.
    """
    if device != "cpu" and device not in DEVICES:
        raise RecipeError(f"--device {show(device)} is not known; known are cpu, {', '.join(DEVICES)}")
    if not 0 < mfu <= 1:
        raise RecipeError(f"--mfu {mfu} is no share of the peak; give a number between 0 and 1, such as 0.4")
    world = nodes * per_node
    try:
        recipe.check_world(world)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    base = _process_memory() if device == "cpu" else CUDA_BYTES
    data = measure(recipe)
    peak, memory = _device(device)
    stages: list[dict[str, Any]] = []
    for number, (spec, stage) in enumerate(zip(recipe.specs(), recipe.stages, strict=True)):
        samples = stage.steps(recipe.data.batch) * recipe.data.batch
        flops = samples * training_flops(spec, data.tokens)
        parts = memory_parts(recipe, spec, world, data.tokens) | {"process": base}
        stages.append(
            {
                "stage": number,
                "samples": samples,
                "parameters": parameters(spec),
                "commit_bytes": commit_bytes(recipe, spec),
                "flops": flops,
                "seconds": flops / (peak * mfu * world),
                "memory": parts | {"total": sum(parts.values())},
            }
        )
    for before, after in pairwise(stages):
        transient = before["commit_bytes"] + after["commit_bytes"] + base  # whole on the process that grows
        after["memory"]["total"] = max(after["memory"]["total"], transient)
    flops, seconds = sum(s["flops"] for s in stages), sum(s["seconds"] for s in stages)
    rate = recipe.total_samples / seconds
    largest, commit = (max(s[each] for s in stages) for each in ("parameters", "commit_bytes"))
    found: dict[str, Any] = {
        "device": device,
        "devices": world,
        "nodes": nodes,
        "mfu": mfu,
        "data": asdict(data),
        "stages": stages,
        "flops": flops,
        "seconds": seconds,
        "device_hours": seconds * world / 3600,
        "cost": None if price is None else seconds * world / 3600 * price,
        "samples_per_second": rate,
        "memory_per_device": max(s["memory"]["total"] for s in stages),
        "memory_of_device": memory,
        "loader_cores_per_node": rate * data.decode_seconds / nodes,
        "shards_bytes_per_second_and_node": rate * data.bytes / nodes,
        "gradient_bytes_per_step_and_device": 0.0 if world == 1 else 8.0 * largest * (world - 1) / world,
        "commit_bytes": commit,
        "commits_kept_bytes": commit * (recipe.checkpoint.keep + 1),
        "commit_seconds_at_1_GB_per_second": commit / 1e9 / nodes,
    }
    return found | {"warnings": warnings(recipe, found, per_node)}


def memory_parts(recipe: Recipe, spec: ModelSpec, world: int, tokens: float) -> dict[str, float]:
    """Bytes a process holds at its fullest moment in a stage with model `spec`, by part."""
    count, pairs, engine = parameters(spec), recipe.data.batch / world, recipe.engine
    shards = min(engine.shard or world, world)
    weights, gradients, optimizer = {"ddp": (1, 1, 1), "fsdp": (shards, shards, shards)}.get(
        engine.kind, (world if engine.zero_stage == 3 else 1, world if engine.zero_stage > 1 else 1, world)
    )
    state = commit_bytes(recipe, spec) - (4 * count if engine.kind != "deepspeed" else 0)  # DeepSpeed's own masters
    half = engine.precision == "bf16"
    caption = spec.text.vocabulary * spec.text.width * 8 + 2 * LOGITS_BYTES if spec.caption else 0
    inputs = 3 * spec.image.resolution**2 * (1 + 4 + 4)
    inputs += sum(8 * tower.frames * tower.features for tower in spec.further.values())
    return {
        "weights": 4 * count / weights,
        "gradients": 4 * count / gradients,
        "optimizer": 0.0 if engine.offload else state / optimizer,
        "activations": pairs * _activations(spec, tokens, half),
        "loss": 4 * TILE_BYTES + 8 * pairs * spec.embed_dim * 4 + caption,
        "batches": pairs * inputs,
        "commit": 2 * min(4 * count / world, PART_BYTES),
    }


def commit_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """Bytes of the tensors of a commit: weights, moments (Muon has one), the average of the weights if it is kept."""
    kinds = ("model", *recipe.optimizer.kinds)
    named = empty(spec).named_parameters()
    return sum(4 * p.numel() for name, p in named for kind in kinds if recipe.optimizer.keeps(kind, name))


def _activations(spec: ModelSpec, tokens: float, half: bool) -> float:
    """Bytes kept for the backward pass by one pair."""
    patches = spec.image.grid**2
    total = spec.image.depth * patches * _block(spec.image, half) + spec.text.depth * tokens * _block(spec.text, half)
    total += sum(tower.depth * tower.frames * _block(tower, half) for tower in spec.further.values())
    if spec.caption:
        text, width = spec.text, 2 if half else 4
        crossing = tokens * (2 * text.width * 4 + 3 * text.attention_width * width)
        crossing += patches * 2 * text.attention_width * width
        total += spec.caption.depth * (tokens * _block(text, half) + crossing)
    return total


def _block(spec: TowerSpec, half: bool) -> float:
    """Bytes of one token in one block: the stream and its norms, q k v, what they mix, and the hidden units twice."""
    return 4 * spec.width * 4 + (5 * spec.attention_width + 2 * spec.mlp_width) * (2 if half else 4)


def measure(recipe: Recipe) -> Data:
    """Read the first samples of the run as the run will."""
    from ..data.loader import Loader

    spec = recipe.specs()[0]
    config = recipe.data.model_copy(update={"workers": 0})
    loader = Loader(config, spec.image.resolution, spec.text.context, recipe.seed, mixtures=recipe.mixtures())
    recipe.specs()[-1].check_samples(loader.columns)
    wanted = min(SAMPLES, recipe.total_samples)
    tokens = samples = 0
    begun = time.process_time()
    for batch in loader.batches(0):
        tokens, samples = tokens + len(batch.tokens), samples + len(batch.lengths)
        if samples >= wanted:
            break
    seconds = time.process_time() - begun
    size = sum(sum(source.shard_sizes) for source in loader.sources)
    return Data(tokens / samples, seconds / samples, size / max(1, sum(map(len, loader.sources))))


def warnings(recipe: Recipe, found: dict[str, Any], per_node: int) -> list[str]:
    """What will not work or will be slow, as sentences with a remedy."""
    said = []
    needed, there = found["memory_per_device"], found["memory_of_device"]
    if needed > 0.92 * there:
        said.append(
            f"a device needs about {needed / 1e9:.0f} GB and has {there / 1e9:.0f} GB; "
            f"use more devices, a smaller data.batch, or engine.precision=bf16"
        )
    cores = found["loader_cores_per_node"]
    workers = recipe.data.workers * per_node
    if found["device"] != "cpu" and cores > max(workers, 1):
        said.append(
            f"decoding needs {cores:.0f} cores a node and data.workers gives {workers}; "
            f"set data.workers={int(cores / per_node) + 1}"
        )
    every = recipe.checkpoint.every_seconds
    if every and found["commit_seconds_at_1_GB_per_second"] > every / 10:
        said.append("commits take more than a tenth of the time between them; set a longer checkpoint.every")
    share = recipe.data.batch // found["devices"]
    if share < 8:
        said.append(f"each device has {share} pairs of a batch; fewer devices would be used better")
    if found["device"] in DEVICES and recipe.engine.precision == "fp32":
        said.append("engine.precision=fp32 does not reach the peak of this device; set engine.precision=bf16")
    return said


def as_table(found: dict[str, Any]) -> Any:
    """The plan as a rich group of tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..training.report.readable import compact, duration, size

    parts = list(found["stages"][0]["memory"])
    table = Table("stage", "samples", "parameters", "FLOPs", "time", *parts, box=None, pad_edge=False)
    for stage in found["stages"]:
        cells = [compact(stage["samples"]), compact(stage["parameters"]), f"{stage['flops']:.2e}"]
        table.add_row(
            str(stage["stage"] + 1), *cells, duration(stage["seconds"]), *(size(stage["memory"][p]) for p in parts)
        )
    cost, tokens = found["cost"], found["data"]["tokens"]
    rows = {
        "devices": f"{found['devices']} {found['device']} on {found['nodes']} nodes, {found['mfu']:.0%} of the peak",
        "time": f"{duration(found['seconds'])}, {found['samples_per_second']:,.0f} samples/s",
        "device hours": f"{found['device_hours']:,.1f}" + (f", costing {cost:,.2f}" if cost else ""),
        "memory": f"{size(found['memory_per_device'])} of {size(found['memory_of_device'])} on a device",
        "loader": f"{found['loader_cores_per_node']:.1f} cores a node, captions of {tokens:.1f} tokens",
        "shards": f"{size(found['shards_bytes_per_second_and_node'])}/s a node",
        "gradients": f"{size(found['gradient_bytes_per_step_and_device'])} sent a step by a device",
        "commit": f"{size(found['commit_bytes'])}, {size(found['commits_kept_bytes'])} kept",
    }
    about = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        about.add_row(Text(name), Text(value))
    return Group(table, about, *(Text(f"warning: {said}") for said in found["warnings"]))


def _device(name: str) -> tuple[float, float]:
    """Peak and memory."""
    if name != "cpu":
        return DEVICES[name].peak, DEVICES[name].memory
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return 50e9 * cores, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _process_memory() -> float:
    """What a training process takes before it has a model: that of this one with the same imports."""
    from ..data import loader  # noqa: F401
    from ..training import loop  # noqa: F401
    from ..training.device import process_memory

    return float(process_memory())
