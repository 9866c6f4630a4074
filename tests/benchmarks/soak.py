"""Many steps with every objective on: memory, throughput and losses at the end are those of the beginning.

    python -m tests.benchmarks.soak [--quick] [--json]

A small model with a captioner and mixtures of experts takes 2,000 steps (200 with `--quick`) of softmax, sigmoid, late
interaction, captioning (half of the captions word by word, half in parallel) and balance at once, on batches whose
captions have other lengths each time. The first tenth warms up; then resident memory without what the allocator has
free, and seconds of processor time for a step, are taken over every tenth. It ends with an error if memory grows by
more than 2%, if the median of the second half of the tenths takes 10% longer than that of the first, or at the first
loss that is not finite.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import statistics
import time

import torch

from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.tests.benchmarks.losses import MIB, proc_bytes
from treering.training.device import device_name, process_memory
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.balance import Balance
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive, LateContrastive, SigmoidContrastive
from treering.training.world import World

PAIRS, CONTEXT, TENTHS = 16, 24, 10
SPEC = ModelSpec(
    embed_dim=32,
    image=ImageSpec(width=32, depth=2, heads=2, patch=8, resolution=32, experts=2),
    text=TextSpec(width=32, depth=2, heads=2, context=CONTEXT, experts=2),
    captioner=CaptionerSpec(depth=1),
    logit_bias=True,
)


def objectives() -> list[Objective]:
    """All of them; a recipe has one contrastive kind at a time, here each has a name of its own."""
    made: dict[str, Objective] = {
        "softmax": Contrastive(1.0, label_smoothing=0.05),
        "sigmoid": SigmoidContrastive(0.1, positives="caption"),
        "filip": LateContrastive(1.0),
        "caption": CaptionLoss(1.0, parallel_fraction=0.5, seed=3),
        "balance": Balance(0.01),
    }
    for name, objective in made.items():
        objective.name = name  # type: ignore[misc]
    return list(made.values())


def batch(step: int) -> Inputs:
    """Noise, with captions of 3 to CONTEXT tokens."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, CONTEXT + 1, (PAIRS,), generator=generator)
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    numbers = torch.arange(PAIRS) + step * PAIRS
    return Inputs(images, tokens, lengths, numbers, numbers, numbers, host_lengths=lengths)


def soak(steps: int) -> dict[str, float]:
    """The figures of that many steps."""
    engine = DdpEngine(SPEC, objectives(), DdpConfig(), OptimizerConfig(), World(0, 1, torch.device("cpu")), seed=0)
    memory, seconds, worst = [], [], 0.0
    for tenth in range(TENTHS):
        begun = time.process_time()
        for step in range(tenth * steps // TENTHS, (tenth + 1) * steps // TENTHS):
            result = engine.step(batch(step), 1e-3)
            values = torch.stack([*result.losses.values(), result.grad_norm])
            if not values.isfinite().all():
                raise SystemExit(f"step {step}: {result.losses}, gradient norm {result.grad_norm}")
            worst = max(worst, float(values[:-1].max()))
        seconds.append((time.process_time() - begun) * TENTHS / steps)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free is no growth, however much of it the allocator keeps
        memory.append(proc_bytes("self/status", "VmRSS"))
    warm, half = seconds[1:], len(seconds[1:]) // 2
    return {
        "steps": float(steps),
        "skipped": float(engine.skipped),
        "largest_loss": worst,
        "resident_mib_after_a_tenth": memory[0] / MIB,
        "resident_mib_at_the_end": memory[-1] / MIB,
        "memory_growth": memory[-1] / memory[0] - 1,
        "peak_mib": process_memory() / MIB,
        "milliseconds_a_step": 1e3 * statistics.median(warm),
        "slower": statistics.median(warm[half:]) / statistics.median(warm[:half]) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = soak(200 if options.quick else 2000)
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "treering")}
        device = device_name(torch.device("cpu"))
        print(json.dumps({"benchmark": "soak", "device": device, "versions": versions, "figures": figures}))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):28}{value:12.4g}")
    if figures["memory_growth"] > 0.02:
        raise SystemExit(f"resident memory grew by {figures['memory_growth']:.1%}")
    if figures["slower"] > 0.1:
        raise SystemExit(f"a step takes {figures['slower']:.1%} longer at the end")


if __name__ == "__main__":
    main()
