"""Runs that grow wider: killed, resumed and grown again, with the learning-rate multipliers that growth leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.launch.recipe.load import read_recipe
from treering.models.model import build
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.tests.support.tiny_runs import SIZES, lines, measured, same_end, train_through
from treering.training.checkpoint.commits import find_commit
from treering.training.engines.optimizer import Optimizer, OptimizerConfig, decays
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.world import World

TINY = [
    *SIZES,
    "model.captioner.depth=1",
    "stages=[{samples: 48}, {grow: {image.width: 32, text.width: 16, image.depth: 2, embed_dim: 24}, samples: 48}, "
    "{grow: {text.width: 48, text.mlp_ratio: 5.0}, width_init: duplicate, samples: 36}]",
    "checkpoint.every=24",
    "eval.suites=[]",
]


def recipe(*overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, *overrides]).recipe


def losses(out: Path) -> list[tuple[int, float, float]]:
    return measured(out, "loss", "grad_norm")


def test_a_run_that_widens_keeps_its_function_and_its_multipliers(whole: Path) -> None:
    assert [step for step, _, _ in losses(whole)] == list(range(1, 12))
    first, second = lines(whole, "grow")
    assert first["logit_difference"] < 1e-5
    assert second["logit_difference"] < 1e-5
    assert first["to"] == {"embed_dim": 24, "image.width": 32, "image.heads": 4, "image.depth": 2} | {
        "text.width": 16,
        "text.heads": 4,
    }
    held = find_commit(str(whole)).manifest.state.multipliers
    assert held["image.transformer.blocks.1.attention.query.weight"] == 1 / 2
    assert held["text.projection.weight"] == pytest.approx(1 / 6)
    assert held["text.transformer.blocks.0.mlp.down.weight"] == pytest.approx(1 / 2 * 64 / 240)
    assert "text.token_embedding.weight" not in held


@pytest.mark.parametrize("at", ["step 6", "enter 4", "enter 8", "step 10"])
def test_a_resume_across_width_growth_is_bit_identical(at: str, whole: Path, tmp_path: Path) -> None:
    train_through(at, recipe(), tmp_path)
    assert losses(tmp_path) == losses(whole)
    same_end(tmp_path, whole)


def test_a_forgotten_multiplier_would_be_seen(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Optimizer.load
    monkeypatch.setattr(
        Optimizer, "load", lambda self, moments, steps, skipped, _: real(self, moments, steps, skipped, {})
    )
    train(recipe(), tmp_path)
    assert losses(tmp_path)[:5] == losses(whole)[:5]
    assert losses(tmp_path)[5:] != losses(whole)[5:]


def test_the_world_does_not_matter(whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(group: World) -> dict[str, float]:
        return train(recipe(), tmp_path).scores

    on_ranks(2, one_rank)
    for (_, loss, _), (_, other, _) in zip(losses(tmp_path), losses(whole), strict=True):
        assert loss == pytest.approx(other, abs=1e-5)


def test_larger_pictures_and_longer_captions_go_on(tmp_path: Path) -> None:
    """Both change what the model sees: the loader follows, and for pictures there is no difference to state."""
    grow = "{grow: {image.resolution: 36, text.context: 24}, samples: 24}"
    assert train(recipe(f"stages=[{{samples: 24}}, {grow}]"), tmp_path).finished
    assert lines(tmp_path, "grow")[0]["logit_difference"] is None
    assert len(losses(tmp_path)) == 4


def test_multipliers_scale_the_rate_and_not_the_decay() -> None:
    """Against torch's unfused AdamW, one group a parameter."""
    spec = ModelSpec(
        embed_dim=4,
        image=ImageSpec(width=8, depth=1, heads=2, patch=4, resolution=8),
        text=TextSpec(width=8, depth=1, heads=2, context=4),
    )
    ours, theirs = build(spec, 1), build(spec, 1)
    factors = {"image.projection.weight": 0.25, "text.transformer.norm.weight": 0.5}
    optimizer = Optimizer(ours.named_parameters(), OptimizerConfig(weight_decay=0.3))
    optimizer.load(
        {k: {n: torch.zeros_like(p) for n, p in ours.named_parameters()} for k in optimizer.state()}, 0, 0, factors
    )
    groups = []
    for name, p in theirs.named_parameters():
        factor = factors.get(name, 1.0)
        decay = 0.3 / factor if decays(name, p) else 0.0
        groups.append({"params": [p], "lr": 1e-2 * factor, "weight_decay": decay})
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step(1e-2)
        adam.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)
