"""`treering plan`: estimates what a run needs before it is queued: memory, time, loader, network, store, cost.

Counts follow from the recipe alone, by models/flops, models/activations and training/engines/activation_checkpointing.
Caption lengths and decoding cost are measured on the first samples of the run. The memory of a CPU process without a
model is measured on this process.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ...data.machine import usable_cores
from ...data.order import default_window
from ...data.units import counted
from ...models.activations import block_memory, blocks_to_recompute
from ...models.activations import peak as peak_bytes
from ...models.flops import parameters, training_flops
from ...models.parts import BatchShape
from ...models.spec import ModelSpec
from ...training.device import DEVICES
from ...training.engines import activation_checkpointing
from ...training.objectives.terms import build_objectives
from ...training.recipe import Recipe
from ...training.report.readable import bytes_text, compact, decimal, duration_text
from ...training.report.readable import flops as readable_flops
from ..errors import RecipeError, show

SAMPLES = 2048
"""samples read to measure captions and pictures"""
_FEW = 256
"""samples read for captions alone, before a run"""
_TOY = 300
"""seconds of a run that is too short to be worth an advice about its loader"""
_CORES = 16
"""cores of a node for each of its devices; 12 to 16 are usual"""
_CROWDED = 0.2
"""fraction of a batch with neighbours that is worth a warning"""
_COLUMN = 12
"""characters of a stage's column at least"""


@dataclass(frozen=True)
class Data:
    """Means over the first samples of a run."""

    tokens: float
    """per caption"""
    decode_seconds: float
    """per sample, on one core"""
    bytes: float
    """per sample, in its shard"""
    neighbours: float
    """the largest fraction of a batch that has another sample of it within five places of a large source"""


def plan(
    recipe: Recipe, nodes: int, per_node: int, device: str | None, mfu: float, price: float | None
) -> dict[str, Any]:
    """Estimates for the run on `nodes` times `per_node` devices, as one object. Raises RecipeError or DataError.

    `device` None is that of this machine; `mfu` is the fraction of the peak FLOPs that is reached, `price` that of a
    device hour.
    """
    device = device or _of_this_machine()
    if device != "cpu" and device not in DEVICES:
        raise RecipeError(f"--device {show(device)} is not known; known are cpu, {', '.join(DEVICES)}")
    if not 0 < mfu <= 1:
        raise RecipeError(f"--mfu {mfu} is not a fraction of the peak; give a number between 0 and 1, such as 0.4")
    world = nodes * per_node
    try:
        recipe.check_world(world)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    base = _process_memory() if device == "cpu" else activation_checkpointing.CUDA_BYTES
    data, lengths = measure(recipe)
    peak, has = _device(device)
    stages = _stages(recipe, world, lengths, device != "cpu", has, base)
    for stage in stages:
        stage["seconds"] = stage["flops"] / (peak * mfu * world)
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


def shortage(recipe: Recipe, world: int, has: float) -> tuple[str | None, str | None]:
    """What is wrong, and what may be, with the memory of a run on `world` GPUs of `has` bytes: a sentence on the first
    stage that needs more than there is, and on the first that leaves too little for fragmentation. Raises DataError.
    """
    _, lengths = measure(recipe, _FEW)
    found: list[str | None] = [None, None]
    for stage in _stages(recipe, world, lengths, True, has, activation_checkpointing.CUDA_BYTES):
        needs, number = stage["memory"]["total"], stage["stage"]
        said = (
            f"stages.{number} needs about {bytes_text(needs)} of a GPU, which has {bytes_text(has)}; set "
            f"engine.activation_budget=auto, engine.micro_batches, or a smaller data.batch, or use more GPUs "
            f"(`treering plan` has the parts)"
        )
        if needs > has:
            found[0] = found[0] or said
        elif needs > activation_checkpointing.USABLE * has:
            found[1] = found[1] or said
    return found[0], found[1]


def _stages(
    recipe: Recipe, world: int, lengths: list[int], on_gpu: bool, has: float, base: float
) -> list[dict[str, Any]]:
    """Estimates for every stage; `lengths` are caption lengths in tokens, `has` the bytes of a device and `base` those
    of a process without a model."""
    stages = [_stage(recipe, number, world, lengths, on_gpu, has, base) for number in range(len(recipe.stages))]
    for before, after in pairwise(stages):
        transient = before["commit_bytes"] + after["commit_bytes"] + base  # the process that grows holds both models
        after["memory"]["total"] = max(after["memory"]["total"], transient)
    return stages


def _stage(
    recipe: Recipe, number: int, world: int, lengths: list[int], on_gpu: bool, has: float, base: float
) -> dict[str, Any]:
    """Estimates for stage `number`; for the rest see `_stages`."""
    stage, spec = recipe.stages[number], recipe.specs()[number]
    samples = stage.steps(recipe.data.batch) * recipe.data.batch
    cut, patches = [min(length, stage.longest(spec)) for length in lengths], stage.kept_patches(spec)
    tokens = sum(cut) / len(cut)
    parts = activation_checkpointing.memory_parts(
        spec, recipe.engine, recipe.optimizer, world, recipe.data.batch / world, "cuda" if on_gpu else "cpu"
    )
    room = activation_checkpointing.USABLE * has - sum(parts.values()) - base
    recomputed, held = _activations(recipe, spec, _fullest(recipe, world, cut, patches, on_gpu), room)
    parts |= {"activations": held, "process": base}
    return {
        "stage": number,
        "samples": samples,
        "tokens": tokens,
        "patches": patches,
        "parameters": parameters(spec),
        "commit_bytes": activation_checkpointing.commit_bytes(spec, recipe.optimizer),
        "recomputed": recomputed,
        "flops": samples * training_flops(spec, tokens, patches, _reads_tokens(recipe)),
        "memory": parts | {"total": sum(parts.values())},
    }


def _fullest(recipe: Recipe, world: int, lengths: list[int], patches: int, on_gpu: bool) -> BatchShape:
    """The largest micro-batch, for captions of these lengths in tokens."""
    half = recipe.engine.precision == "bf16"
    pairs = max(1, recipe.data.batch // (world * (recipe.engine.pieces or 1)))
    pieces = [lengths[at : at + pairs] for at in range(0, len(lengths), pairs)]
    each = pairs / max(map(len, pieces))  # fewer samples were measured than a micro-batch has
    tokens = max(map(sum, pieces)) * each
    # On a GPU in bf16 attention runs on captions without padding.
    places = tokens if half and on_gpu else max(map(max, pieces)) * pairs
    return BatchShape(pairs, tokens, places, patches, half, _reads_tokens(recipe))


def _activations(recipe: Recipe, spec: ModelSpec, shape: BatchShape, room: float) -> tuple[dict[str, int], float]:
    """The number of recomputed blocks by part, and the bytes of activations that the blocks then keep."""
    found = block_memory(spec, shape)
    recomputed = blocks_to_recompute(found, activation_checkpointing.budget(recipe.engine, found, max(0.0, room)))
    return recomputed, peak_bytes(found, recomputed)


def _reads_tokens(recipe: Recipe) -> bool:
    return any("tokens" in objective.needs for objective in build_objectives(recipe.objectives))


def measure(recipe: Recipe, samples: int = SAMPLES) -> tuple[Data, list[int]]:
    """Read the first `samples` samples as the run does; returns their means and their caption lengths before any
    stage's cut."""
    from ...data.loading.loader import Loader
    from ...training.logging.counting import counting

    spec, context = recipe.specs()[0], max(spec.text.context for spec in recipe.specs())
    config = recipe.data.model_copy(update={"workers": 0})
    with counting("shards read") as progress:
        mixtures = recipe.mixtures()
        loader = Loader(config, spec.image.resolution, context, recipe.seed, mixtures=mixtures, progress=progress)
    recipe.specs()[-1].check_samples(loader.columns)
    wanted = min(samples, recipe.total_samples)
    lengths: list[int] = []
    begun = time.process_time()
    with counting("samples read") as progress:
        for batch in loader.batches(0):
            lengths += batch.lengths.tolist()
            progress(len(lengths), wanted)
            if len(lengths) >= wanted:
                break
    seconds = time.process_time() - begun
    count, stored = len(lengths), sum(source.size for source in loader.sources)
    drawn = zip(loader.order.sources, loader.order.counts(1), strict=True)
    near = max((line.crowding(draws) for line, draws in drawn if line.lanes), default=0.0)
    return Data(sum(lengths) / count, seconds / count, stored / max(1, sum(map(len, loader.sources))), near), lengths


def warnings(recipe: Recipe, found: dict[str, Any], per_node: int) -> list[str]:
    """What will fail or be slow, as sentences with a remedy."""
    messages = []
    needed, there = found["memory_per_device"], found["memory_of_device"]
    if needed > 0.92 * there:
        messages.append(
            f"a device needs about {bytes_text(needed)} and has {bytes_text(there)}; "
            f"use more devices, engine.activation_budget=auto, engine.micro_batches, or engine.precision=bf16"
        )
    if found["device"] != "cpu" and found["seconds"] > _TOY:
        messages += _about_decoding(recipe, found, per_node)
    every = recipe.checkpoint.every_seconds
    if every and found["commit_seconds_at_1_GB_per_second"] > every / 10:
        messages.append("a commit takes more than a tenth of the time between commits; set a longer checkpoint.every")
    near = found["data"]["neighbours"]
    if near > _CROWDED:
        messages.append(
            f"{near:.0%} of a batch have a neighbour of their shard in it, as data.shuffle_window = "
            f"{recipe.data.shuffle_window:,} is small compared with data.batch; leave it out, or set "
            f"{default_window(recipe.data.batch):,} or more"
        )
    pairs = recipe.data.batch // found["devices"]
    if pairs < 8:
        messages.append(f"each device has {pairs} pairs of a batch; fewer devices would be better utilised")
    if found["device"] in DEVICES and recipe.engine.precision == "fp32":
        messages.append("engine.precision=fp32 does not reach the peak of this device; set engine.precision=bf16")
    return messages


def _about_decoding(recipe: Recipe, found: dict[str, Any], per_node: int) -> list[str]:
    """Whether the decoding processes, or all the cores of a usual node, are too few for its devices."""
    each, given = found["loader_cores_per_node"] / per_node, recipe.data.workers
    if each > _CORES:
        return [
            f"the run is bound by decoding: a device takes the pictures of {each:.0f} cores, and nodes have about "
            f"{_CORES} cores a device, with which it takes {duration_text(found['seconds'] * each / _CORES)}; choose "
            f"nodes with more cores, or store the pictures smaller; set data.workers={_CORES}"
        ]
    if each * per_node > max(given * per_node, 1):
        return [
            f"decoding needs {each * per_node:.0f} cores per node and data.workers gives {given * per_node}; "
            f"set data.workers={int(each) + 1}"
        ]
    return []


def as_table(found: dict[str, Any], width: int) -> Any:
    """The plan as a rich group of tables for a terminal of `width` characters: a row for each quantity, a column for
    each stage."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns, stages = max(1, (width - 16) // (_COLUMN + 1)), found["stages"]
    tables = [_stage_table(stages[at : at + columns]) for at in range(0, len(stages), columns)]
    about = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _about(found).items():
        about.add_row(Text(name), Text(value))
    return Group(*tables, about, *(Text(f"warning: {message}") for message in found["warnings"]))


def _stage_table(stages: list[dict[str, Any]]) -> Any:
    """The figures of each stage, then its memory on a device, part by part."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for stage in stages:
        table.add_column(f"stage {stage['stage'] + 1}", justify="right", min_width=_COLUMN, no_wrap=True)
    rows: dict[str, list[str]] = {
        "samples": [compact(stage["samples"]) for stage in stages],
        "caption tokens": [f"{stage['tokens']:.1f}" for stage in stages],
        "patches": [f"{stage['patches']}" for stage in stages],
        "parameters": [compact(stage["parameters"]) for stage in stages],
        "compute": [readable_flops(stage["flops"]) for stage in stages],
        "time": [duration_text(stage["seconds"]) for stage in stages],
        "memory": [bytes_text(stage["memory"]["total"]) for stage in stages],
    }
    for part in stages[0]["memory"]:
        if part != "total":
            rows[f"  {part}"] = [bytes_text(stage["memory"][part]) for stage in stages]
    for name, cells in rows.items():
        table.add_row(Text(name), *cells)
    return table


def _about(found: dict[str, Any]) -> dict[str, str]:
    """What holds for the whole run."""
    cost, tokens = found["cost"], found["data"]["tokens"]
    recomputed = {stage["stage"] + 1: _blocks(stage["recomputed"]) for stage in found["stages"]}
    devices = f"{found['devices']} {found['device']} on {counted(found['nodes'], 'node')}"
    return {
        "devices": f"{devices}, {found['mfu']:.0%} of the peak",
        "time": f"{duration_text(found['seconds'])}, {found['samples_per_second']:,.0f} samples/s",
        "device hours": decimal(found["device_hours"], 3) + (f", costing {cost:,.2f}" if cost else ""),
        "memory": f"{bytes_text(found['memory_per_device'])} of {bytes_text(found['memory_of_device'])} on a device",
        "loader": f"{found['loader_cores_per_node']:.1f} cores per node, captions of {tokens:.1f} tokens",
        "shuffle": _shuffle(found["data"]["neighbours"]),
        "shards": f"{bytes_text(found['shards_bytes_per_second_and_node'])}/s per node",
        "gradients": f"{bytes_text(found['gradient_bytes_per_step_and_device'])} sent per device and step",
        "recomputed": "; ".join(f"stage {number}: {blocks}" for number, blocks in recomputed.items() if blocks)
        or "no block",
        "commit": f"{bytes_text(found['commit_bytes'])}, {bytes_text(found['commits_kept_bytes'])} kept",
    }


def _blocks(recomputed: dict[str, int]) -> str:
    """The number of recomputed blocks by part, as text; empty if there is none."""
    return ", ".join(f"{name} {count}" for name, count in recomputed.items() if count)


def _shuffle(near: float) -> str:
    return f"{near:.1%} of a batch have a neighbour of their shard in it" if near else "sources are shuffled as a whole"


def _of_this_machine() -> str:
    """The device to plan for where none is named. Raises RecipeError for a GPU that is not in the table."""
    import torch

    from ...training.device import device_name, model_name

    if not torch.cuda.is_available():
        return "cpu"
    device = torch.device("cuda", 0)
    name = model_name(device)
    if name is None:
        raise RecipeError(f"the figures of {device_name(device)} are not known; name a similar one with --device")
    return name


def _device(name: str) -> tuple[float, float]:
    """Peak FLOPs per second and bytes of memory of a device."""
    if name != "cpu":
        return DEVICES[name].peak, DEVICES[name].memory
    cores = usable_cores()
    return 50e9 * cores, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _process_memory() -> float:
    """Bytes of a training process without a model: those of this process with the same imports."""
    from ...data.loading import loader  # noqa: F401
    from ...training import loop  # noqa: F401
    from ...training.device import process_memory

    return float(process_memory())
