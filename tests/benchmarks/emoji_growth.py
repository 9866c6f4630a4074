"""Does growing pay on the emoji recipe? The recipe as it is, beside runs without growth at equal training FLOPs.

    python -m tests.benchmarks.emoji_growth [--quick] [--json] [--seeds 3] [--runs DIR]

Three arms a seed: `grown` (the recipe), `large` (the final model from scratch) and `small` (the first model trained
on), the last two with as many samples as the grown run's FLOPs buy. Runs go into DIR, a folder each; a finished one is
not trained again. `--quick` trains a hundredth of it: it shows that the benchmark works, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from treering.launch.recipe.load import read_recipe
from treering.models.flops import training_flops
from treering.training.recipe import Recipe

MEAN_TOKENS = 6.5
"""of an emoji caption, start and end included"""
ARMS = ("grown", "large", "small")


def overrides(arm: str, recipe: Recipe) -> list[str]:
    """What makes the recipe an arm of equal FLOPs."""
    if arm == "grown":
        return []
    specs = recipe.specs()
    budget = sum(s.samples * training_flops(spec, MEAN_TOKENS) for s, spec in zip(recipe.stages, specs, strict=True))
    spec = specs[-1] if arm == "large" else specs[0]
    sizes = [f"model.{path}={size}" for path, size in spec.sizes().items() if path.endswith("depth")]
    return [*sizes, f"stages=[{{samples: {round(budget / training_flops(spec, MEAN_TOKENS))}}}]"]


def run(arm: str, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Train one arm (or find it trained) and read its last scores, its FLOPs and its time."""
    from treering.launch.run import start

    sooner = ["stages=[{samples: 240}, {grow: {image.depth: 6, text.depth: 4}, samples: 480}]", "schedule.warmup=128"]
    small = [*sooner, "eval.every=null"] if quick else []
    recipe = read_recipe("emoji", small).recipe
    resolved = read_recipe("emoji", [*small, *overrides(arm, recipe), f"seed={seed}"])
    out = folder / f"{arm}{seed}"
    start(resolved, out, 1)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    final = [row for row in rows if row["event"] == "eval"][-1]
    return {
        "samples": steps[-1]["samples"],
        "flops": steps[-1]["flops"],
        "scores": final["scores"],
        "chance": final["chance"],
        "device": next(row["device"] for row in rows if row["event"] == "start"),
    }


def mean_score(scores: dict[str, float]) -> float:
    """One number a run: the mean of R@1 both ways and the zero-shot accuracies."""
    return statistics.mean(s for name, s in scores.items() if name.endswith("@1") or name.startswith("zero_shot"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    seeds = 1 if options.quick else options.seeds
    folder = options.runs or Path(tempfile.mkdtemp(prefix="emoji-growth-"))
    found = {arm: [run(arm, seed, folder, options.quick) for seed in range(seeds)] for arm in ARMS}
    figures: dict[str, float] = {}
    for arm, runs in found.items():
        figures[f"{arm}_flops"] = runs[0]["flops"]
        figures[f"{arm}_samples"] = runs[0]["samples"]
        for name in runs[0]["scores"]:
            figures[f"{arm}/{name}"] = statistics.mean(r["scores"][name] for r in runs)
        for seed, one in enumerate(runs):
            figures[f"{arm}_mean_score_seed{seed}"] = mean_score(one["scores"])
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "treering")}
        device = found["grown"][0]["device"]
        print(json.dumps({"benchmark": "emoji_growth", "device": device, "versions": versions, "figures": figures}))
        return
    print(f"{'score':34}" + "".join(f"{arm:>10}" for arm in ARMS) + f"{'chance':>10}")
    for name, chance in found["grown"][0]["chance"].items():
        print(f"{name:34}" + "".join(f"{figures[f'{arm}/{name}']:10.1%}" for arm in ARMS) + f"{chance:10.1%}")
    for seed in range(seeds):
        row = "".join(f"{figures[f'{arm}_mean_score_seed{seed}']:10.1%}" for arm in ARMS)
        print(f"{f'mean of @1 and zero-shot, seed {seed}':34}{row}")
    print(f"{'samples':34}" + "".join(f"{figures[f'{arm}_samples']:10,.0f}" for arm in ARMS))
    print(f"{'training FLOPs, 1e12':34}" + "".join(f"{figures[f'{arm}_flops'] / 1e12:10.1f}" for arm in ARMS))


if __name__ == "__main__":
    main()
