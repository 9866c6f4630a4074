"""GrowCLIP's experiment at a small scale: data that arrives in four portions, and models that grow with it or do not.

    python -m tests.benchmarks.arriving_data [--quick] [--json] [--seeds 3] [--runs DIR] [key=value ...]

The training emoji are dealt into four portions at random. A run has four stages of equal samples; stage t reads all
portions up to the t-th, each of its samples as often as any other. The arms see the same samples:

- `small`, `large`: one shape all the way, the first and the largest of the growth space;
- `random`: before each new portion one of the larger sizes that the search might choose, drawn by the seed;
- `searched`: the one that the search chooses (`treering` docs/growth.md), its trials counted in the FLOPs;
- `random_momentum`, `searched_momentum`: the same with `inherit: 0.9`, a reconstruction of GrowCLIP's inheriting with
  momentum.

Compared are the scores at the end, the mean of R@1 both ways and of the zero-shot accuracies on the held-out emoji,
paired by seed, beside the FLOPs. GrowCLIP (Deng et al., ICCV 2023) reports +2.3 points on nine tasks for its whole
method. Runs go into DIR, a folder each; a finished one is not trained again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treering.data.order import stable_hash
from treering.data.shards.source import held_out, open_source
from treering.data.shards.tar_writer import TarWriter
from treering.launch.recipe.load import read_recipe
from treering.models.spec import ModelSpec
from treering.training.checkpoint.commits import find_commit
from treering.training.device import device_name
from treering.training.loop import train
from treering.training.stages import StageConfig
from treering.training.world import World

SOURCE = "samples://emoji"
PORTIONS = 4
SMALL = {"image.width": 24, "image.depth": 1, "text.width": 24, "text.depth": 1}
SPACE = [
    {"image.width": [36], "image.depth": [2], "text.width": [36]},
    {"image.width": [36, 48], "image.depth": [2], "text.depth": [2]},
    {"image.width": [48], "image.depth": [2, 3], "text.width": [36, 48]},
]
"""sizes to choose among before the second portion, the third and the fourth; not below what was chosen before"""
LARGE = {"image.width": 48, "image.depth": 3, "text.width": 48, "text.depth": 2}
BOUND = 2.0
"""most FLOPs a sample after one growth, as a multiple of those before"""
MOMENTUM = 0.9
ARMS = ("small", "large", "random", "random_momentum", "searched", "searched_momentum")


@dataclass(frozen=True)
class Outcome:
    """The end of one run."""

    score: float
    flops: float
    searched: float
    """FLOPs of the trials among them"""
    sizes: dict[str, int | float]


def deal(folder: Path) -> list[str]:
    """Shards of the training emoji, one for each portion; each goes where a hash of its key sends it."""
    urls = [str(folder / f"portion-{number}.tar") for number in range(PORTIONS)]
    if not all(Path(url).exists() for url in urls):
        source = open_source(SOURCE)
        records = [source.record(number) for number in range(len(source))]
        for number, url in enumerate(urls):
            with open(url, "wb") as file, TarWriter(file) as shard:
                for record in records:
                    if stable_hash("portion", record.key) % PORTIONS == number:
                        shard.write(record.key, record.fields)
    return urls


def model(sizes: dict[str, int]) -> str:
    """The override that makes a model of these sizes, with heads of 12 channels."""
    image = f"{{width: {sizes['image.width']}, depth: {sizes['image.depth']}, heads: {sizes['image.width'] // 12}"
    text = f"{{width: {sizes['text.width']}, depth: {sizes['text.depth']}, heads: {sizes['text.width'] // 12}"
    return f"model={{embed_dim: 64, image: {image}, patch: 12, resolution: 36}}, text: {text}, context: 16}}}}"


def stages(arm: str, seed: int, samples: int, trial: int) -> list[dict[str, Any]]:
    """The four stages of an arm."""
    spec = read_recipe("emoji", ["objectives={contrastive: {}}", model(SMALL)]).recipe.model
    draw = random.Random(stable_hash("random growth", seed))
    made: list[dict[str, Any]] = []
    for number in range(PORTIONS):
        stage: dict[str, Any] = {"samples": samples, "mixture": {f"portion{i}": 1 for i in range(number + 1)}}
        if number and arm.endswith("_momentum"):
            stage["inherit"] = MOMENTUM
        if number and arm.startswith(("random", "searched")):
            search = {"space": SPACE[number - 1], "max_flops": BOUND, "samples": trial}
            if arm.startswith("searched"):
                stage["search"] = search
            else:
                stage["grow"], spec = drawn(spec, StageConfig.model_validate({"samples": 1, "search": search}), draw)
        made.append(stage)
    return made


def drawn(spec: ModelSpec, stage: StageConfig, draw: random.Random) -> tuple[dict[str, int | float], ModelSpec]:
    """One of the growths that a search could choose; none if there is none."""
    larger = [(sizes, grown) for sizes, grown in stage.candidates(spec) if sizes]
    return draw.choice(larger) if larger else ({}, spec)


def run(arm: str, seed: int, options: argparse.Namespace, urls: Sequence[str], out: Path) -> Outcome:
    """Train one run (or find it trained) and read its end."""
    samples, trial = (384, 128) if options.quick else (options.samples, options.trial)
    sources = [{"source": url, "name": f"portion{i}", "weight": int(i == 0)} for i, url in enumerate(urls)]
    overrides = [
        f"data.train={json.dumps(sources)}",
        model(LARGE if arm == "large" else SMALL),
        "objectives={contrastive: {}}",
        f"stages={json.dumps(stages(arm, seed, samples, trial))}",
        f"schedule.warmup={samples // 8}",
        "checkpoint.every=100_000_000",
        "eval.every=null",
        "eval.examples=0",
        f"eval.data={held_out(SOURCE)}",
        f"seed={seed}",
    ]
    summary = train(read_recipe("emoji", [*overrides, *options.overrides]).recipe, out)
    scores = [score for key, score in summary.scores.items() if key.endswith("@1") or key.startswith("zero_shot")]
    manifest = find_commit(str(out)).manifest
    state, sizes = manifest.state, manifest.spec.sizes()
    return Outcome(
        score=statistics.mean(scores),
        flops=state.flops,
        searched=sum(event.detail["flops"] for event in state.lineage if event.event == "search"),
        sizes={path: sizes[path] for path in SMALL},
    )


def figures_of(outcomes: dict[str, list[Outcome]]) -> dict[str, float]:
    """Means over seeds, and each arm's lead over `small`, seed by seed."""
    figures: dict[str, float] = {}
    for arm, ends in outcomes.items():
        figures[f"{arm}_score"] = statistics.mean(end.score for end in ends)
        figures[f"{arm}_flops"] = statistics.mean(end.flops for end in ends)
        figures[f"{arm}_search_flops"] = statistics.mean(end.searched for end in ends)
        leads = [end.score - small.score for end, small in zip(ends, outcomes["small"], strict=True)]
        figures[f"{arm}_lead"], figures[f"{arm}_lead_low"] = statistics.mean(leads), min(leads)
        figures[f"{arm}_lead_high"] = max(leads)
        figures |= {f"seed{seed}/{arm}": end.score for seed, end in enumerate(ends)}
    for how in ("random", "searched"):
        gains = [a.score - b.score for a, b in zip(outcomes[f"{how}_momentum"], outcomes[how], strict=True)]
        figures[f"{how}_gain_of_momentum"] = statistics.mean(gains)
    ahead = [a.score - b.score for a, b in zip(outcomes["searched"], outcomes["random"], strict=True)]
    figures["gain_of_search"] = statistics.mean(ahead)
    return figures


def show(figures: dict[str, float], outcomes: dict[str, list[Outcome]]) -> None:
    """The table."""
    print(
        f"{'arm':20}{'score':>8}{'over small':>12}{'low':>8}{'high':>8}{'FLOPs':>10}{'search':>9}  final sizes, by seed"
    )
    for arm, ends in outcomes.items():
        score, lead, low, high = (figures[f"{arm}_{what}"] for what in ("score", "lead", "lead_low", "lead_high"))
        sizes = " ".join("/".join(str(size) for size in end.sizes.values()) for end in ends)
        spent = f"{figures[f'{arm}_flops']:10.2e}{figures[f'{arm}_search_flops']:9.1e}"
        print(f"{arm:20}{score:8.1%}{100 * lead:+12.1f}{100 * low:+8.1f}{100 * high:+8.1f}{spent}  {sizes}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16_000, help="of each portion's stage")
    parser.add_argument("--trial", type=int, default=1_280, help="samples that a candidate of the search is tried on")
    parser.add_argument("--runs", type=Path)
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(1)
    folder = options.runs or Path(tempfile.mkdtemp(prefix="arriving-data-"))
    folder.mkdir(parents=True, exist_ok=True)
    urls, seeds = deal(folder), range(1 if options.quick else options.seeds)
    ends = {seed: {arm: run(arm, seed, options, urls, folder / f"{arm}-{seed}") for arm in ARMS} for seed in seeds}
    outcomes = {arm: [ends[seed][arm] for seed in seeds] for arm in ARMS}
    figures = figures_of(outcomes)
    if not options.json:
        show(figures, outcomes)
        return
    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("torch", "treering")}
    device = f"{device_name(World.join().device)}, one thread"
    print(json.dumps({"benchmark": "arriving_data", "device": device, "versions": versions, "figures": figures}))


if __name__ == "__main__":
    main()
