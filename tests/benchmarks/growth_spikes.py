"""What growth does to the loss in the steps after it, by what new parts are made of and what becomes of the state.

    python -m tests.benchmarks.growth_spikes [--quick] [--json] [--seeds 2]

A stream of 16x16 pictures of two shapes with captions that name them, a contrastive loss, a constant learning rate and
no clipping, so that nothing hides a spike. A small model trains, is grown in each way, and each goes on with the same
batches. The figure is the largest loss in 30 steps, less that of the small model that goes on ungrown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.growth.operator import grown
from treering.models.model import Model, build
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.engines.optimizer import Optimizer, OptimizerConfig
from treering.training.growth.grow import grown_rates, planned
from treering.training.stages import GrowthConfig

LR = 1.5e-3
WINDOW = 30


@dataclass(frozen=True)
class Arm:
    """One way to go on."""

    width: float = 2
    depth: int = 2
    copies: Any = "noise"
    layers: Any = "zero"
    moments: Any = "map"
    rates: bool = True
    """whether split matrices step 1/k as far"""
    steps_kept: bool = False
    """whether a reset keeps the number of steps, as it must not"""


ARMS = {
    "small goes on": Arm(width=1, depth=1),
    "duplicate, mapped": Arm(copies="duplicate"),
    "duplicate, mapped, same rate": Arm(copies="duplicate", rates=False),
    "noise, mapped": Arm(),
    "noise, mapped, same rate": Arm(rates=False),
    "lemon, mapped": Arm(copies="lemon"),
    "lemon, mapped, same rate": Arm(copies="lemon", rates=False),
    "noise, keep_v": Arm(moments="keep_v"),
    "noise, reset": Arm(moments="reset"),
    "noise, reset, same rate": Arm(moments="reset", rates=False),
    "noise, zeroed, steps kept": Arm(moments="reset", steps_kept=True),
    "depth only, mapped": Arm(width=1),
    "depth only, reset": Arm(width=1, moments="reset"),
    "depth only, stack": Arm(width=1, layers="stack"),
    "depth only, interleave": Arm(width=1, layers="interleave"),
    "width only, noise, mapped": Arm(depth=1),
    "width x 1.5, noise, mapped": Arm(width=1.5, depth=1),
}
MUON = [
    "small goes on",
    "duplicate, mapped",
    "noise, mapped",
    "noise, mapped, same rate",
    "lemon, mapped",
    "noise, keep_v",
    "noise, reset",
    "depth only, mapped",
    "depth only, reset",
    "width only, noise, mapped",
    "width x 1.5, noise, mapped",
]
"""the arms that also go on from a small model that Muon trained"""


def spec(width: int, depth: int) -> ModelSpec:
    """A dual encoder with heads of 16 channels and a vocabulary of 32 words."""
    tower = {"width": width, "depth": depth, "heads": width // 16}
    text = TextSpec(context=12, **tower).model_copy(update={"vocabulary": 32})
    return ModelSpec(embed_dim=32, image=ImageSpec(patch=4, resolution=16, **tower), text=text)


def draw(step: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [b, 3, 16, 16] and captions int64 [b, 12] of step `step`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    colours = torch.tensor([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(8)]) * 200 + 55
    ring, cross = torch.ones(4, 4), torch.zeros(4, 4)
    ring[1:3, 1:3], cross[1:3], cross[:, 1:3] = 0, 1, 1
    shapes = torch.stack([torch.ones(4, 4), ring, cross, torch.ones(4, 4).tril()])
    pictures, words = torch.zeros(batch, 3, 16, 16), [torch.zeros(batch, dtype=torch.int64)]
    for _ in range(2):
        colour, shape, size, x, y = (torch.randint(0, n, (batch,), generator=generator) for n in (8, 4, 2, 3, 3))
        mask = shapes[shape].clone()
        mask[size == 0, 3:, :] = 0
        mask[size == 0, :, 3:] = 0
        for b in range(batch):
            place = pictures[b, :, 5 * y[b] : 5 * y[b] + 4, 5 * x[b] : 5 * x[b] + 4]
            place.copy_(torch.where(mask[b] > 0, colours[colour[b]][:, None, None].float(), place))
        words += [1 + colour, 9 + shape, 13 + size, 15 + x, 18 + y]
    words.append(torch.full((batch,), 21))
    return pictures.to(torch.uint8), torch.stack(words, 1)


def train(model: Model, optimizer: Optimizer, steps: range, batch: int, seed: int) -> list[float]:
    """The loss of every step."""
    losses = []
    for step in steps:
        pictures, captions = draw(step, batch, seed)
        output = model(pictures, captions.flatten(), torch.full((batch,), 12))
        image, text = F.normalize(output.image.pooled, dim=-1), F.normalize(output.text.pooled, dim=-1)
        logits, pairs = output.scale * image @ text.T, torch.arange(batch)
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        loss.backward()
        optimizer.step(LR)
        losses.append(loss.item())
    return losses


def go_on(arm: Arm, model: Model, optimizer: Optimizer, seed: int) -> tuple[Model, Optimizer]:
    """The model of an arm and its optimizer."""
    old = model.spec
    new = spec(int(old.image.width * arm.width), old.image.depth * arm.depth)
    if arm.width % 1:  # what ModelSpec.grown does; it would refuse the small vocabulary
        eps = 1e-5 / arm.width
        towers = {t: getattr(new, t).model_copy(update={"norm_eps": eps}) for t in ("image", "text")}
        new = new.model_copy(update=towers)
    how = GrowthConfig(width_init=arm.copies, depth_init=arm.layers, moments=arm.moments)
    state = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    state |= {f"{kind}/{name}": t for kind, ts in optimizer.state().items() for name, t in ts.items()}
    operators = planned(old, new, seed, how, lambda kind, name: state[f"{kind}/{name}"])
    larger = build(new, 99)
    following = Optimizer(larger.named_parameters(), optimizer.config)
    read = grown(operators, lambda kind, name: state[f"{kind}/{name}"])
    with torch.no_grad():
        for name, p in larger.named_parameters():
            p.copy_(read("model", name))
    moments = {kind: {n: read(kind, n) for n in tensors} for kind, tensors in following.state().items()}
    rates = grown_rates(operators, optimizer.multipliers, 1.0, old, new, optimizer.config)
    steps = 0 if arm.moments == "reset" and not arm.steps_kept else optimizer.steps
    following.load(moments, steps, 0, rates if arm.rates else {})
    return larger, following


def measure(
    arms: dict[str, Arm], seed: int, width: int, depth: int, steps: int, batch: int, kind: Any = "adamw"
) -> dict[str, list[float]]:
    """The losses of each arm in the window after growth, all on the same batches, by one kind of optimizer."""
    torch.set_num_threads(1)
    model = build(spec(width, depth), seed)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(kind=kind, weight_decay=0.0))
    train(model, optimizer, range(steps), batch, seed)
    after = range(steps, steps + WINDOW)
    return {name: train(*go_on(arm, model, optimizer, seed), after, batch, seed) for name, arm in arms.items()}


def spike(found: dict[str, list[float]], arm: str) -> float:
    """The largest loss of an arm, less that of the ungrown run."""
    return max(found[arm]) - max(found["small goes on"])


def summary(arms: dict[str, Arm], runs: list[dict[str, list[float]]], prefix: str) -> dict[str, float]:
    """The figures of the arms, each under its name behind `prefix`."""
    figures = {}
    for arm in arms:
        figures[f"{prefix}{arm}/first"] = statistics.mean(run[arm][0] for run in runs)
        figures[f"{prefix}{arm}/largest"] = statistics.mean(max(run[arm]) for run in runs)
        for seed, run in enumerate(runs):
            figures[f"{prefix}{arm}/spike_seed{seed}"] = spike(run, arm)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    size = (16, 1, 150, 48) if options.quick else (32, 2, 600, 128)
    seeds = range(1 if options.quick else options.seeds)
    figures = summary(ARMS, [measure(ARMS, seed, *size) for seed in seeds], "")
    some = {name: ARMS[name] for name in MUON}
    figures |= summary(some, [measure(some, seed, *size, "muon") for seed in seeds], "muon: ")
    if options.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        versions["treering"] = importlib.metadata.version("treering")
        device = f"{platform.machine()}, one thread"
        print(json.dumps({"benchmark": "growth_spikes", "device": device, "versions": versions, "figures": figures}))
        return
    print(f"{'':32}{'first':>8}{'largest':>9}   less the ungrown run's, by seed")
    for arm in (*ARMS, *(f"muon: {name}" for name in MUON)):
        spikes = "".join(f"{figures[f'{arm}/spike_seed{seed}']:8.2f}" for seed in seeds)
        print(f"{arm:32}{figures[f'{arm}/first']:8.2f}{figures[f'{arm}/largest']:9.2f}   {spikes}")


if __name__ == "__main__":
    main()
