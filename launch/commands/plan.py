"""`treering plan`: what a run will need, before anything is queued: memory, time, loader, network, store, money.

Counts come from the recipe alone, with the formulas of models/flops and the accounts of models/activations and
training/memory; the length of captions and the cost of decoding come from reading the first samples of the run as the
run will. What a CPU process takes before it has a model is that of this very process.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ...models.activations import block_memory, blocks_to_recompute
from ...models.activations import peak as peak_bytes
from ...models.flops import parameters, training_flops
from ...models.parts import BatchShape
from ...models.spec import ModelSpec
from ...training.device import DEVICES
from ...training.engines import activation_checkpointing
from ...training.objectives.terms import build_objectives
from ...training.recipe import Recipe
from ..errors import RecipeError, show

SAMPLES = 2048
"""read to learn what captions and pictures are like"""


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
    base = _process_memory() if device == "cpu" else activation_checkpointing.CUDA_BYTES
    data, lengths = measure(recipe)
    peak, has = _device(device)
    stages = [_stage(recipe, number, world, lengths, device, base) for number in range(len(recipe.stages))]
    for stage in stages:
        stage["seconds"] = stage["flops"] / (peak * mfu * world)
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
        "memory_of_device": has,
        "loader_cores_per_node": rate * data.decode_seconds / nodes,
        "shards_bytes_per_second_and_node": rate * data.bytes / nodes,
        "gradient_bytes_per_step_and_device": 0.0 if world == 1 else 8.0 * largest * (world - 1) / world,
        "commit_bytes": commit,
        "commits_kept_bytes": commit * (recipe.checkpoint.keep + 1),
        "commit_seconds_at_1_GB_per_second": commit / 1e9 / nodes,
    }
    return found | {"warnings": warnings(recipe, found, per_node)}


def _stage(recipe: Recipe, number: int, world: int, lengths: list[int], device: str, base: float) -> dict[str, Any]:
    """What stage `number` does and holds; `lengths` are those of captions, `base` is what a process takes anyway."""
    stage, spec = recipe.stages[number], recipe.specs()[number]
    samples = stage.steps(recipe.data.batch) * recipe.data.batch
    cut, patches = [min(length, stage.longest(spec)) for length in lengths], stage.kept_patches(spec)
    tokens = sum(cut) / len(cut)
    parts = activation_checkpointing.parts(spec, recipe.engine, recipe.optimizer, world, recipe.data.batch / world)
    room = activation_checkpointing.USABLE * _device(device)[1] - sum(parts.values()) - base
    again, held = _activations(recipe, spec, _fullest(recipe, world, cut, patches, device), room)
    parts |= {"activations": held, "process": base}
    return {
        "stage": number,
        "samples": samples,
        "tokens": tokens,
        "patches": patches,
        "parameters": parameters(spec),
        "commit_bytes": activation_checkpointing.commit_bytes(spec, recipe.optimizer),
        "recomputed": again,
        "flops": samples * training_flops(spec, tokens, patches, _reads_tokens(recipe)),
        "memory": parts | {"total": sum(parts.values())},
    }


def _fullest(recipe: Recipe, world: int, lengths: list[int], patches: int, device: str) -> BatchShape:
    """The most that goes through the model at once: of the pieces that captions of these lengths fall into."""
    half = recipe.engine.precision == "bf16"
    pairs = max(1, recipe.data.batch // (world * (recipe.engine.pieces or 1)))
    pieces = [lengths[at : at + pairs] for at in range(0, len(lengths), pairs)]
    each = pairs / max(map(len, pieces))  # where fewer were read than a piece has
    tokens = max(map(sum, pieces)) * each
    # On a GPU in half precision captions attend without padding.
    places = tokens if half and device != "cpu" else max(map(max, pieces)) * pairs
    return BatchShape(pairs, tokens, places, patches, half, _reads_tokens(recipe))


def _activations(recipe: Recipe, spec: ModelSpec, shape: BatchShape, room: float) -> tuple[dict[str, int], float]:
    """The blocks that are made again, and the bytes that blocks hold then."""
    found = block_memory(spec, shape)
    again = blocks_to_recompute(found, activation_checkpointing.budget(recipe.engine, found, max(0.0, room)))
    return again, peak_bytes(found, again)


def _reads_tokens(recipe: Recipe) -> bool:
    return any("tokens" in objective.needs for objective in build_objectives(recipe.objectives))


def measure(recipe: Recipe) -> tuple[Data, list[int]]:
    """Read the first samples of the run as the run will; also the lengths of their captions, cut by no stage."""
    from ...data.loading.loader import Loader

    spec, context = recipe.specs()[0], max(spec.text.context for spec in recipe.specs())
    config = recipe.data.model_copy(update={"workers": 0})
    loader = Loader(config, spec.image.resolution, context, recipe.seed, mixtures=recipe.mixtures())
    recipe.specs()[-1].check_samples(loader.columns)
    wanted = min(SAMPLES, recipe.total_samples)
    lengths: list[int] = []
    begun = time.process_time()
    for batch in loader.batches(0):
        lengths += batch.lengths.tolist()
        if len(lengths) >= wanted:
            break
    seconds = time.process_time() - begun
    size = sum(sum(source.shard_sizes) for source in loader.sources)
    count = len(lengths)
    return Data(sum(lengths) / count, seconds / count, size / max(1, sum(map(len, loader.sources)))), lengths


def warnings(recipe: Recipe, found: dict[str, Any], per_node: int) -> list[str]:
    """What will not work or will be slow, as sentences with a remedy."""
    said = []
    needed, there = found["memory_per_device"], found["memory_of_device"]
    if needed > 0.92 * there:
        said.append(
            f"a device needs about {needed / 1e9:.0f} GB and has {there / 1e9:.0f} GB; "
            f"use more devices, engine.activation_budget=auto, engine.micro_batches, or engine.precision=bf16"
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

    from ...training.report.readable import compact, duration, size

    parts = list(found["stages"][0]["memory"])
    table = Table(
        "stage", "samples", "tokens", "patches", "parameters", "FLOPs", "time", *parts, box=None, pad_edge=False
    )
    for stage in found["stages"]:
        cells = [compact(stage["samples"]), f"{stage['tokens']:.1f}", f"{stage['patches']}"]
        cells += [compact(stage["parameters"]), f"{stage['flops']:.2e}"]
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
        "recomputed": "; ".join(f"stage {s['stage'] + 1}: {_blocks(s['recomputed'])}" for s in found["stages"]),
        "commit": f"{size(found['commit_bytes'])}, {size(found['commits_kept_bytes'])} kept",
    }
    about = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        about.add_row(Text(name), Text(value))
    return Group(table, about, *(Text(f"warning: {said}") for said in found["warnings"]))


def _blocks(again: dict[str, int]) -> str:
    """Blocks that are made again, as text."""
    return ", ".join(f"{name} {count}" for name, count in again.items() if count) or "no block"


def _device(name: str) -> tuple[float, float]:
    """Peak and memory."""
    if name != "cpu":
        return DEVICES[name].peak, DEVICES[name].memory
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return 50e9 * cores, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _process_memory() -> float:
    """What a training process takes before it has a model: that of this one with the same imports."""
    from ...data.loading import loader  # noqa: F401
    from ...training import loop  # noqa: F401
    from ...training.device import process_memory

    return float(process_memory())
