"""After any growth, however the state arrives, every tensor learns, and what is new is not what the run began with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treering.models.model import build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.engines.base import Engine
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.growth.grow import grow
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Between, Contrastive
from treering.training.stages import GrowthConfig
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
OPTIMIZER = OptimizerConfig(ema=0.9)
SMALL = ModelSpec(
    embed_dim=6,
    image=ImageSpec(width=8, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=2, context=9, vocabulary=23),
)
CAPTIONED = SMALL.model_copy(update={"captioner": CaptionerSpec(depth=1)})
AUDIO = {
    f"modalities.audio.{size}": n
    for size, n in {"width": 8, "depth": 1, "heads": 2, "features": 3, "frames": 2}.items()
}
GROWTHS: dict[str, tuple[ModelSpec, dict[str, Any], dict[str, Any]]] = {
    "embed_dim": (SMALL, {"embed_dim": 10}, {}),
    "embed_dim with audio": (SMALL.grown(AUDIO), {"embed_dim": 10}, {}),
    "depth": (SMALL, {"image.depth": 3, "text.depth": 2}, {}),
    "stacked": (SMALL, {"image.depth": 2}, {"depth_init": "stack"}),
    "width": (SMALL, {"image.width": 16, "text.width": 16}, {}),
    "a fraction wider": (SMALL, {"image.width": 12, "text.width": 12}, {}),
    "lemon": (SMALL, {"image.width": 16}, {"width_init": "lemon"}),
    "heads": (SMALL, {"image.heads": 4, "image.head_dim": 4}, {}),
    "head_dim": (SMALL, {"text.head_dim": 6}, {}),
    "mlp": (SMALL, {"image.mlp_ratio": 6.0}, {}),
    "experts": (SMALL, {"image.experts": 2}, {}),
    "captioner": (SMALL, {"captioner.depth": 1}, {}),
    "captioner's depth": (CAPTIONED, {"captioner.depth": 2, "text.vocabulary": 29}, {}),
    "shared": (SMALL, {"shared.depth": 1, "shared.width": 8, "shared.heads": 2}, {}),
    "audio": (SMALL, AUDIO, {}),
    "context": (SMALL, {"text.context": 12}, {}),
    "patches": (SMALL, {"image.patch": 2}, {}),
    "inherit half": (SMALL, {"image.width": 16}, {"inherit": 0.5}),
    "inherit none": (SMALL, {"image.width": 16}, {"inherit": 0.0}),
    "from the average": (SMALL, {"image.depth": 2}, {"inherit": "ema"}),
}
QUICK = ("embed_dim", "captioner", "inherit none")
ARRIVALS = ("moments", "no moments", "weights of the grown", "reset", "keep_v")


def inputs(spec: ModelSpec, step: int) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    lengths, ids = torch.full((8,), 8), torch.arange(8)
    tokens = torch.randint(0, 23, (64,), generator=generator)
    side = spec.image.resolution
    images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=generator)
    columns = {name: torch.randn(8, 2, 3, generator=generator) for name in spec.modalities}
    return Inputs(images, tokens, lengths, ids, ids, columns=columns)


def made(spec: ModelSpec) -> Engine:
    terms: list[Objective] = [Contrastive(1.0), *([CaptionLoss(1.0)] if spec.captioner else [])]
    terms += [Between(1.0, towers=(name, "text")) for name in spec.modalities]
    return build_engine(spec, terms, DdpConfig(), OPTIMIZER, ALONE, 0)


def train(engine: Engine, steps: int) -> None:
    for step in range(steps):
        engine.step(inputs(engine.model.spec, step), 3e-3)


def forget(engine: Engine) -> None:
    """As a run that begins with weights alone."""
    state = {
        path: tensor.clone() if path.startswith(("model/", "ema/")) else torch.zeros_like(tensor)
        for path, tensor in engine.logical_state().items()
    }
    engine.load_logical_state(state, 0, 0, {})


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize(
    "growth", [growth if growth in QUICK else pytest.param(growth, marks=pytest.mark.slow) for growth in GROWTHS]
)
def test_everything_learns(growth: str, arrival: str) -> None:
    small, sizes, options = GROWTHS[growth]
    if "embed_dim" in sizes and arrival in ("reset", "keep_v"):
        pytest.skip("refused in a recipe")
    engine = made(small)
    train(engine, 5)
    if arrival == "no moments":
        forget(engine)
    how = GrowthConfig.model_validate({**options, **({"moments": arrival} if arrival in ("reset", "keep_v") else {})})
    larger, _ = grow(engine, made, small.grown(sizes), None, 0, how)
    if arrival == "weights of the grown":
        forget(larger)
    before = {path: t.clone() for path, t in larger.logical_state().items() if path.startswith("model/")}
    train(larger, 40)
    after = larger.logical_state()
    still = [path for path, tensor in before.items() if torch.equal(tensor, after[path])]
    assert still == []
    if "embed_dim" in sizes:
        for path, tensor in after.items():
            if path.startswith("model/") and ".projection." in f".{path}":
                assert (tensor[6:].abs().amax(1) > 1e-4).all(), path


@pytest.mark.parametrize("growth", ["inherit none", "inherit half", "captioner", "shared", "audio", "experts"])
def test_fresh_is_fresh(growth: str) -> None:
    """Of what growth draws, nothing is the draw that the run began with."""
    small, sizes, options = GROWTHS[growth]
    engine = made(small)
    first = {name: p.detach() for name, p in build(small, 0).named_parameters()}
    larger, _ = grow(engine, made, small.grown(sizes), None, 0, GrowthConfig.model_validate(options))
    drawn = {name: p.detach() for name, p in larger.model.named_parameters() if p.ndim >= 2}
    inherit = options.get("inherit", 1.0)
    for name, tensor in drawn.items():
        if inherit < 1.0 and name in first and first[name].shape == tensor.shape:
            fresh = (tensor - inherit * first[name]) / (1 - inherit)
            assert not torch.allclose(fresh, first[name], atol=1e-4), name
    flat = [tensor.flatten()[:32] for tensor in drawn.values() if tensor.numel() >= 32]
    twice = [(a, b) for i, a in enumerate(flat) for b in flat[:i] if len(a) == len(b) and torch.equal(a, b)]
    assert inherit == 1.0 or twice == []
