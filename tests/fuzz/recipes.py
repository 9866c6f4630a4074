"""Random recipes with every option drawn, each trained, killed, resumed elsewhere, grown, evaluated and exported.

    python -m tests.fuzz.recipes 0 200      # seeds; prints a line each, and every failure with its recipe

What must hold: no traceback (a refusal is a sentence of ours), and the same losses: to the bit where the run dies and
continues as it was, to 2e-3 after twenty steps on another engine and another number of processes.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from treering.data.errors import DataError
from treering.launch.commands.eval import evaluate_commit
from treering.launch.commands.export import export_commit
from treering.launch.commands.grow import grow_offline
from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.models.interchange.errors import InterchangeError
from treering.models.spec import SpecError
from treering.training.checkpoint.store import StoreError
from treering.training.loop import train
from treering.training.state import TrainingError
from treering.training.world import World

from ..support.tiny_runs import dies

REFUSALS = (RecipeError, DataError, StoreError, TrainingError, SpecError, InterchangeError)
BATCH, STEPS = 12, 20
OnRanks = Callable[..., list[Any]]


def drawn(seed: int) -> list[str]:
    """The overrides of random recipe `seed`; some are refused."""
    r = random.Random(f"recipe {seed}")

    def maybe(chance: float, *texts: str) -> list[str]:
        return [r.choice(texts)] if r.random() < chance else []

    heads = r.choice([1, 2, 4])
    image = {
        "width": 8 * heads,
        "depth": r.choice([1, 2]),
        "heads": heads,
        "patch": r.choice([6, 12]),
        "resolution": 24,
    }
    text = {"width": r.choice([8, 16]), "depth": r.choice([1, 2]), "heads": 2, "context": r.choice([8, 16])}
    for tower in (image, text):
        if r.random() < 0.25:
            tower |= {"experts": r.choice([2, 3]), "experts_per_token": r.choice([1, 2])}
        if r.random() < 0.3:
            tower["mlp"] = r.choice(["gelu_tanh", "quick_gelu", "swiglu"])
        if r.random() < 0.2:
            tower["layer_scale"] = 0.1
    image |= r.choice(
        [{}, {}, {"class_token": True, "pool": "class"}, {"pool": "attention", "queries": 4, "pool_heads": 2}]
    )
    image |= r.choice([{}, {"pre_norm": True}, {"patch_bias": False}, {"norm_after_pool": True}])
    text |= r.choice([{}, {}, {"causal": False, "pool": "last"}, {"pool": "class"}, {"pool": "first"}])
    captioner = r.choice([None, None, {"depth": 1}, {"depth": 1, "cross_attention": "after"}])
    objectives: dict[str, Any] = {"contrastive": {"kind": r.choice(["softmax", "softmax", "sigmoid", "filip"])}}
    objectives["contrastive"] |= r.choice([{}, {"positives": "caption"}, {"label_smoothing": 0.1}])
    objectives["contrastive"] |= r.choice([{}, {"schedule": [[0.0, 0.2], [1.0, 1.0]]}])
    objectives["caption"] = {"parallel_fraction": r.choice([0.0, 0.5])} if captioner else None
    if "experts" in image or "experts" in text:
        objectives["balance"] = {}
    grows = {
        "image.depth": image["depth"] + 1,
        "text.width": 2 * text["width"],
        "image.resolution": 48,
        "embed_dim": 24,
        "image.heads": 2 * heads,
        "text.context": 24,
        "image.experts": 4,
        "captioner.depth": 2,
    }
    grow = {path: grows[path] for path in r.sample(sorted(grows), r.choice([0, 1, 1, 2]))}
    if "captioner.depth" in grow and captioner is None:
        objectives["caption"] = {}
    stages: list[dict[str, Any]] = [{"samples": BATCH * 10}, {"samples": BATCH * 10, "grow": grow}]
    stages[0] |= r.choice([{}, {}, {"patch_keep": 0.5}, {"context": 6}])
    if grow:
        stages[1] |= r.choice(
            [{}, {"depth_init": "stack"}, {"inherit": 0.5}, {"moments": "reset"}, {"width_init": "lemon"}]
        )
        stages[1] |= r.choice([{}, {"rewarmup": 24}, {"multiplier_fade": 60}])
    sources = [{"source": "samples://emoji", "name": "one"}]
    if r.random() < 0.3:
        sources.append({"source": "samples://emoji/held_out", "name": "two", "weight": 0})
        stages[1] |= {"mixture": {"one": 3, "two": 1}}
    model = {"embed_dim": 16, "image": image, "text": text, "captioner": captioner,
             "logit_bias": objectives["contrastive"]["kind"] == "sigmoid"}  # fmt: skip
    return [
        f"data.batch={BATCH}",
        f"seed={seed}",
        f"model={json.dumps(model)}",
        f"objectives={json.dumps(objectives)}",
        f"stages={json.dumps(stages)}",
        f"data.train={json.dumps(sources)}",
        "schedule.warmup=24",
        "log.every=1",
        f"checkpoint={{every: {BATCH * r.choice([2, 3, 5])}, keep: {r.choice([1, 9])}}}",
        f"optimizer.lr={r.choice([1e-3, 1e-2])}",
        *maybe(0.3, "optimizer.ema=0.9"),
        *maybe(0.3, "schedule.cooldown=0.5", "schedule.final_fraction=0.1"),
        *maybe(0.3, "data.augment={flip: true}", "data.augment={crop_scale: [0.4, 1.0]}"),
        *maybe(0.2, "data.augment={color_jitter: {brightness: 0.4, hue: 0.1, grayscale: 0.2}}"),
        *maybe(0.3, "data.workers=1"),
        f"eval={{suites: {json.dumps(r.choice([[], ['retrieval'], ['retrieval', 'zero_shot', 'geometry']]))}, "
        f"every: {r.choice(['null', '96'])}, examples: {r.choice([0, 2])}}}",
        *(["optimizer.kind=muon"] if r.random() < 0.2 else engine(r, 0.3)),
    ]


def engine(r: random.Random, chance: float) -> list[str]:
    """The override of an engine with drawn options."""
    kind = r.choice(
        [
            "{kind: ddp}",
            "{kind: ddp, micro_batches: 3}",
            "{kind: ddp, activation_budget: 0.5}",
            "{kind: fsdp}",
            "{kind: fsdp, micro_batches: 2}",
            "{kind: deepspeed, zero_stage: 1}",
            "{kind: deepspeed, zero_stage: 2}",
            "{kind: deepspeed, zero_stage: 3}",
        ]
    )
    return [f"engine={kind}"] if r.random() < chance else []


def live(seed: int, folder: Path, on_ranks: OnRanks) -> str:
    """One life of random recipe `seed`; a line about it. Raises what should not have happened."""
    overrides, r = drawn(seed), random.Random(f"life {seed}")
    try:
        recipe = read_recipe("emoji", overrides).recipe
    except RecipeError as refusal:
        return f"refused: {refusal}"

    def run(world: World, out: str, dying: int | None, more: list[str]) -> bool:
        torch.set_num_threads(1)
        recipe = read_recipe("emoji", [*overrides, *more]).recipe
        if dying is None:
            return train(recipe, folder / out).finished
        with dies("step", dying):
            train(recipe, folder / out)
        return False

    on_ranks(1, run, "whole", None, [])
    truth, step = _losses(folder / "whole"), r.randrange(3, STEPS)
    assert [number for number, _ in truth] == list(range(1, STEPS + 1))
    on_ranks(1, run, "again", step, [])
    on_ranks(1, run, "again", None, [])
    assert _losses(folder / "again") == truth, f"died at step {step}"
    on_ranks(1, run, "elsewhere", step, [])
    there = engine(r, 1.0)
    world = r.choice([1, 2, 3])
    try:
        read_recipe("emoji", [*overrides, *there])
    except RecipeError as refusal:
        return f"not elsewhere: {refusal}"
    on_ranks(world, run, "elsewhere", None, there)
    for (number, ours), (_, theirs) in zip(_losses(folder / "elsewhere"), truth, strict=True):
        assert abs(ours - theirs) <= 2e-3 * max(1.0, abs(theirs)), (
            f"step {number}: {ours} under {there} x {world}, {theirs}"
        )
    said = [_attempt(lambda: evaluate_commit(str(folder / "whole"), ["retrieval"], None))]
    depth = recipe.specs()[-1].image.depth + 1
    grown = str(folder / "grown")
    said.append(
        _attempt(lambda: grow_offline(str(folder / "whole"), [f"image.depth={depth}"], [], ["samples=24"], grown))
    )
    for to in ("safetensors", "open_clip"):
        said.append(_attempt(lambda to=to: export_commit(str(folder / "whole"), to, folder / to)))  # type: ignore[misc]
    return f"died at {step}; then {there[0]} x {world}; eval, grow, export: {', '.join(said)}"


def _attempt(work: Callable[[], Any]) -> str:
    try:
        work()
    except REFUSALS as refusal:
        return f"refused ({str(refusal)[:60]})"
    return "done"


def _losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["event"] == "step"]


def main(first: int, last: int) -> int:
    """Run seeds `first` to `last` - 1; the number of failures."""
    from ..conftest import ranks_runner

    failures = 0
    for seed in range(first, last):
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(seed, live(seed, Path(folder), ranks_runner()), flush=True)
            except Exception:
                failures += 1
                print(seed, "FAILED", *drawn(seed), traceback.format_exc()[-3000:], sep="\n  ", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(99, main(*map(int, sys.argv[1:3]))))
