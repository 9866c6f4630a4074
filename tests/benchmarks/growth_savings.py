"""What growing saves: the training FLOPs to a tuned large model's final loss and score, on real data.

    python -m tests.benchmarks.growth_savings [--quick] [--json] [--seeds 5] [--recipe NAME] [--runs DIR] [key=value]

Every run is a whole one through the training loop, with its own cool-down, so losses are compared at their ends:

- `large`: the recipe's last shape from scratch, at the FLOPs F of the recipe, its learning rate tuned on another seed;
- `grown`: at the same rate, the recipe's first shape for a share of the FLOPs, then grown to the last, at several
  budgets around F;
- `small`: the first shape trained on, at the same budgets: a task that it does as well needs no growth.

A budget at which an arm reaches the large model's loss (or score) is read off the line between its two nearest runs,
over the logarithm of FLOPs. Saved is 1 - grown / F, everything spent before and at growth included; seeds are paired.
Where no run reaches the target, -(largest budget - 1) stands for it, where all do, 1 - smallest budget: the truth lies
further out. The loss is the contrastive one of the evaluation pairs, the score the mean of R@1 both ways and of the
zero-shot accuracies. `control_wins` counts the seeds in which the small model gets there first: where it mostly does,
nothing is claimed.
Runs go into DIR, a folder each; a finished one is not trained again, an interrupted one goes on. `--quick` trains toys:
it shows that the benchmark works, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from treering.data.loading.loader import EvaluationSet
from treering.launch.recipe.load import read_recipe
from treering.models.flops import training_flops
from treering.models.growth.plan import changes
from treering.models.model import build
from treering.training.checkpoint.commits import find_commit
from treering.training.device import device_name
from treering.training.evaluate.embed import embed
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.world import World

MEAN_TOKENS = 6.5
"""of an emoji caption, start and end included; only to plan budgets: what is compared was counted"""
RATES = (0.5, 1.0, 2.0)
"""learning rates of the large model that are tried, as multiples of the recipe's"""
TUNING_SEED = 1000
BUDGETS = {"grown": (0.5, 0.8, 1.25), "small": (0.4, 0.8)}
"""of each arm, as shares of the large model's FLOPs; behind the larger one of `small` it would save too little"""
QUICK = [
    "data.batch=32",
    "model.embed_dim=32",
    "model.image={width: 32, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 32, depth: 1, heads: 2, context: 16}",
    "model.captioner=null",
    "objectives={contrastive: {}}",
    "schedule.warmup=64",
    "stages=[{samples: 320}, {grow: {image.depth: 2, text.depth: 2}, samples: 640}]",
    "checkpoint.every=100_000",
]


@dataclass(frozen=True)
class Outcome:
    """The end of one run."""

    flops: float
    loss: float
    score: float


def overrides(recipe: Recipe, arm: str, budget: float, share: float, rate: float) -> list[str]:
    """What makes the recipe an arm at `budget` times its own FLOPs."""
    small, large = recipe.specs()[0], recipe.specs()[-1]
    each = [training_flops(spec, MEAN_TOKENS) for spec in (small, large)]
    spent = sum(
        stage.samples * training_flops(spec, MEAN_TOKENS)
        for stage, spec in zip(recipe.stages, recipe.specs(), strict=True)
    )
    sizes = {path: new for path, (_, new) in changes(small, large).items()}
    lr = f"optimizer.lr={recipe.optimizer.lr * rate}"
    whole = budget * spent
    if arm == "grown":
        first, then = round(share * whole / each[0]), round((1 - share) * whole / each[1])
        return [lr, f"stages=[{{samples: {first}}}, {{grow: {json.dumps(sizes)}, samples: {then}}}]"]
    if arm == "small":
        return [lr, f"stages=[{{samples: {round(whole / each[0])}}}]"]
    shape = [f"model.{path}={size}" for path, size in sizes.items()]
    return [lr, *shape, f"stages=[{{samples: {round(whole / each[1])}}}]"]


def run(name: str, base: Sequence[str], arm: Sequence[str], seed: int, out: Path) -> Outcome:
    """Train one run (or find it trained) and measure its end."""
    recipe = read_recipe(name, [*base, *arm, f"seed={seed}"]).recipe
    summary = train(recipe, out)
    scores = [s for key, s in summary.scores.items() if key.endswith("@1") or key.startswith("zero_shot")]
    commit = find_commit(str(out))
    return Outcome(commit.manifest.state.flops, held_out_loss(recipe, out), statistics.mean(scores))


@torch.no_grad()
def held_out_loss(recipe: Recipe, out: Path) -> float:
    """The symmetric contrastive loss over all evaluation pairs at once, each picture with its first caption."""
    commit = find_commit(str(out))
    model = build(commit.manifest.spec, recipe.seed)
    kind = "ema" if recipe.optimizer.ema else "model"
    weights = commit.tensors(kind)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[f"{kind}/{name}"])
    world = World(0, 1, torch.device("cpu"))
    spec = model.spec
    samples = EvaluationSet(recipe.evaluation_source, spec.image.resolution, spec.text.context, None)
    data = embed(model, samples, recipe.eval.batch, world)
    firsts = torch.tensor([data.owners.tolist().index(i) for i in range(len(data.images))])
    logits, pairs = model.scale() * data.images @ data.texts[firsts].T, torch.arange(len(firsts))
    return ((F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2).item()


def reached(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The FLOPs at which `points` (FLOPs, loss) first come down to `target`, linear in log FLOPs between two of them;
    the first one's if it is there already, None if none is."""
    before: tuple[float, float] | None = None
    for flops, loss in sorted(points):
        if loss <= target:
            if before is None:
                return flops
            share = (before[1] - target) / (before[1] - loss)
            return exp(log(before[0]) + share * (log(flops) - log(before[0])))
        before = (flops, loss)
    return None


def saved(points: Sequence[tuple[float, float]], target: float, spent: float) -> float:
    """The share of `spent` that is saved on the way to `target`; a bound where the points do not enclose it."""
    found = reached(points, target)
    return min(0.0, 1 - max(flops for flops, _ in points) / spent) if found is None else 1 - found / spent


def first(ones: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]], target: float) -> bool:
    """Whether `ones` come down to the target, and with fewer FLOPs than `others`."""
    ours, theirs = reached(ones, target), reached(others, target)
    return ours is not None and (theirs is None or ours < theirs)


def compare(large: Outcome, arms: dict[str, list[Outcome]]) -> dict[str, float]:
    """One seed's savings of each arm, by loss and by score, and whether the control is first."""
    found: dict[str, float] = {}
    for by, height in (("loss", lambda end: end.loss), ("score", lambda end: -end.score)):
        curves = {arm: [(end.flops, height(end)) for end in runs] for arm, runs in arms.items()}
        for arm, points in curves.items():
            found[f"{arm}_{by}"] = saved(points, height(large), large.flops)
        found[f"control_{by}"] = first(curves["small"], curves["grown"], height(large))
    return found


def measure(options: argparse.Namespace, folder: Path) -> tuple[float, list[Outcome], list[dict[str, list[Outcome]]]]:
    """The tuned rate, and of each seed the large run and those of the other arms."""
    base = [*(QUICK if options.quick else []), "eval.every=null", "eval.examples=0", *options.overrides]
    recipe = read_recipe(options.recipe, base).recipe
    budgets = {"grown": (0.6, 1.0), "small": (0.6, 1.0)} if options.quick else BUDGETS

    def one(arm: str, budget: float, rate: float, seed: int) -> Outcome:
        changed = overrides(recipe, arm, budget, options.share, rate)
        return run(options.recipe, base, changed, seed, folder / f"{arm}-{budget}-{rate}-{seed}")

    rates = RATES[1:] if options.quick else RATES
    rate = min(rates, key=lambda rate: one("large", 1.0, rate, TUNING_SEED).loss)
    seeds = range(1 if options.quick else options.seeds)
    large = [one("large", 1.0, rate, seed) for seed in seeds]
    others = [{arm: [one(arm, b, rate, seed) for b in shares] for arm, shares in budgets.items()} for seed in seeds]
    return rate, large, others


def figures_of(rate: float, large: list[Outcome], others: list[dict[str, list[Outcome]]]) -> dict[str, float]:
    """Medians and ranges over seeds."""
    seeds = [compare(one, arms) for one, arms in zip(large, others, strict=True)]
    figures: dict[str, float] = {"rate": rate, "seeds": len(seeds)}
    for name, key in (("saved_flops", "grown_loss"), ("saved_flops_score", "grown_score"), ("small", "small_loss")):
        values = [seed[key] for seed in seeds]
        figures[f"{name}_median"] = statistics.median(values)
        figures[f"{name}_low"], figures[f"{name}_high"] = min(values), max(values)
    figures["control_wins"] = sum(seed["control_loss"] for seed in seeds)
    figures["control_wins_score"] = sum(seed["control_score"] for seed in seeds)
    for number, (one, arms) in enumerate(zip(large, others, strict=True)):
        for arm, runs in {"large": [one], **arms}.items():
            for index, end in enumerate(runs):
                place = f"seed{number}/{arm}{index}"
                figures |= {f"{place}/flops": end.flops, f"{place}/loss": end.loss, f"{place}/score": end.score}
    return figures


def show(figures: dict[str, float]) -> None:
    """The table."""
    tuned = f"{figures['rate']:g} times the recipe's, tuned for the large model"
    print(f"learning rate: {tuned}; {figures['seeds']:g} paired seeds")
    print(f"{'saved of the large model’s FLOPs':44}{'median':>9}{'low':>9}{'high':>9}{'speed-up':>10}")
    rows = {
        "saved_flops": "grown, to its loss",
        "saved_flops_score": "grown, to its score",
        "small": "small, to its loss",
    }
    for name, said in rows.items():
        values = [figures[f"{name}_{which}"] for which in ("median", "low", "high")]
        print(f"{said:44}" + "".join(f"{value:9.1%}" for value in values) + f"{1 / (1 - values[0]):9.2f}x")
    if 2 * figures["control_wins"] > figures["seeds"]:
        print("the small model gets there first in most seeds: no saving is claimed")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.4, help="of the FLOPs before growth")
    parser.add_argument("--recipe", default="emoji")
    parser.add_argument("--runs", type=Path)
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    figures = figures_of(*measure(options, options.runs or Path(tempfile.mkdtemp(prefix="growth-savings-"))))
    if not options.json:
        show(figures)
        return
    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("torch", "treering")}
    device = f"{device_name(World.join().device)}, one thread"
    print(json.dumps({"benchmark": "growth_savings", "device": device, "versions": versions, "figures": figures}))


if __name__ == "__main__":
    main()
