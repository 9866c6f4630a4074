"""What a stage says about its growth: moments, re-warm-up, fading multipliers, lossy choices; resumes across them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.spec import SpecError
from treering.tests.support.tiny_runs import SIZES, lines, measured, same_end, train_through
from treering.training.checkpoint.commits import find_commit
from treering.training.engines.optimizer import Optimizer
from treering.training.growth.grow import planned
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.stages import GrowthConfig, StageConfig, faded, rewarmed, since_growth
from treering.training.world import World

TINY = [
    *SIZES,
    "model.captioner=null",
    "stages=[{samples: 36}, {grow: {image.width: 24, text.width: 16, captioner.depth: 1}, moments: keep_v, "
    "rewarmup: 24, multiplier_fade: 36, samples: 24}, "
    "{samples: 24, shrink: {text.width: 8}, grow: {image.depth: 3}, depth_init: stack}]",
    "checkpoint.every=12",
    "checkpoint.keep=20",
    "eval.suites=[]",
]


def recipe(*overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, *overrides]).recipe


def losses(out: Path) -> list[tuple[int, float, float, float]]:
    return measured(out, "loss", "grad_norm", "lr")


def test_a_run_gets_a_captioner_shrinks_and_says_what_was_lossy(whole: Path) -> None:
    first, second = lines(whole, "grow")
    assert first["to"]["captioner.depth"] == 1
    assert first["from"]["captioner.depth"] == 0
    assert first["logit_difference"] < 1e-5
    assert not any(operator.get("lossy") for operator in first["operators"])
    assert second["to"] == {"image.depth": 3, "text.width": 8, "text.heads": 2}
    assert second["logit_difference"] > 1e-3
    assert [o["operator"] for o in second["operators"] if o.get("lossy")] == ["truncate"] * 3 + ["depth"]
    steps = lines(whole, "step")
    assert [set(row["losses"]) for row in steps[:3]] == [{"contrastive"}] * 3
    assert all("caption" in row["losses"] for row in steps[3:])
    assert all(row["loss"] < 20 for row in steps)


def test_the_rate_rises_again_after_growth(whole: Path) -> None:
    rates = [row["lr"] for row in lines(whole, "step")]
    assert rates[2] == pytest.approx(2 * rates[3])
    assert rates[4] == pytest.approx(rates[2])


@pytest.mark.parametrize("at", ["step 4", "enter 5", "step 6"])
def test_resumes_are_bit_identical(at: str, whole: Path, tmp_path: Path) -> None:
    """Inside a re-warm-up and a fade, at a growth while multipliers fade, and after it."""
    train_through(at, recipe(), tmp_path)
    assert losses(tmp_path) == losses(whole)
    same_end(tmp_path, whole)


def test_multipliers_fade_to_one(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = find_commit(str(whole)).manifest.state.multipliers
    # Grown by 3/2 at sample 36, grown again at 60, when 24 of 36 samples had faded.
    assert held["image.projection.weight"] == pytest.approx((2 / 3) ** (1 / 3))
    seen = []
    real = Optimizer.step
    monkeypatch.setattr(
        Optimizer, "step", lambda self, lr, fade: (real(self, lr, fade), seen.append(_rates(self, lr)))[0]
    )
    train(recipe("stages.1.samples=60", "stages.1.rewarmup=0"), tmp_path)
    expected = [2 / 3, (2 / 3) ** (2 / 3), (2 / 3) ** (1 / 3), 1, 1]
    assert [rates["image.projection.weight"] for rates in seen[3:8]] == pytest.approx(expected)


def _rates(optimizer: Optimizer, lr: float) -> dict[str, float]:
    names = {parameter: name for name, parameter in optimizer.parameters.items()}
    groups = optimizer._adam.param_groups
    for group in groups:
        assert group["lr"] * group["weight_decay"] == pytest.approx(lr * group["decay"])
    return {names[p]: group["lr"] / lr for group in groups for p in group["params"]}


def test_time_since_growth_runs_over_stages_that_do_not_grow() -> None:
    stages = [
        StageConfig(samples=20),
        StageConfig(samples=20, grow={"image.depth": 2}, multiplier_fade=40, rewarmup=10),
        StageConfig(samples=20),
    ]
    assert since_growth(stages, 0, 5, 10) == (stages[0], 5)
    assert since_growth(stages, 2, 45, 10) == (stages[1], 25)
    assert [faded(stages, stage, samples, 10) for stage, samples in [(0, 10), (1, 20), (1, 30), (2, 50)]] == [
        1.0,
        1.0,
        0.75,
        0.25,
    ]
    assert faded(stages, 2, 70, 10) == 0.0
    assert [rewarmed(stages, 1, samples, 5) for samples in (20, 25, 30)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("moments", "zeroed"), [("map", []), ("keep_v", ["exp_avg"]), ("reset", ["exp_avg", "exp_avg_sq"])]
)
def test_moments_by_name(moments: Any, zeroed: list[str]) -> None:
    old, new = recipe().specs()[:2]
    operators = planned(old, new, 0, GrowthConfig(moments=moments), lambda kind, name: torch.ones(1))
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        tensor = torch.ones(16, 432)
        for operator in operators:
            tensor = operator.rule("image.patches.weight").apply(kind, tensor)
        assert (tensor.abs().sum() == 0) == (kind in zeroed)
    assert planned(old, old, 0, GrowthConfig(moments=moments), lambda kind, name: torch.ones(1)) == []


def test_a_reset_counts_steps_anew(tmp_path: Path) -> None:
    stages = "stages=[{samples: 36}, {grow: {image.depth: 2}, moments: reset, samples: 24}]"
    train(recipe(stages, "model.captioner={depth: 1}"), tmp_path)
    assert find_commit(str(tmp_path)).manifest.state.applied == 2


def test_a_run_gets_experts_and_balances_them_in_any_world(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    sizes = "text.experts: 6, text.experts_per_token: 4, image.experts: 4, image.experts_per_token: 4"
    more = f"{{grow: {{{sizes}}}, samples: 24}}"
    stages = f"stages=[{{samples: 36}}, {{grow: {{text.experts: 3, image.experts: 2}}, samples: 24}}, {more}]"
    balanced = recipe(stages, "objectives.caption=null", "objectives.balance={}")
    train(balanced, tmp_path)

    def one_rank(group: World) -> bool:
        return train(balanced, tmp_path / "two").finished

    assert on_ranks(2, one_rank) == [True, True]
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(grown["logit_difference"] < 1e-5 for grown in lines(tmp_path, "grow"))
    assert [o["operator"] for o in lines(tmp_path, "grow")[1]["operators"]] == ["more_experts"] * 2
    steps = lines(tmp_path, "step")
    assert "balance" not in steps[2]["losses"]
    assert all(0.9 < row["losses"]["balance"] < 3 for row in steps[3:])
    with pytest.raises(RecipeError, match=r"objectives.balance needs a mixture of experts; set model.image.experts or"):
        recipe("objectives.balance={}")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{samples: 12, grow: {embed_dim: 32}, moments: reset}", "set moments: map, or grow embed_dim in a stage of"),
        ("{samples: 12, grow: {text.depth: 0}}", "or write it under shrink"),
        ("{samples: 12, shrink: {text.depth: 2}}", "or write it under grow"),
        ("{samples: 12, grow: {text.vocabulary: 49410}, token_init: [[3]]}", "token_init has 1 entries for 2 new rows"),
        ("{samples: 12, inherit: ema}", "the run keeps none; set optimizer.ema: 0.999, or stages.1.inherit: 1.0"),
        ("{samples: 12, inherit: 1.5}", "1.5 is not a fraction; write one from 0 to 1, or ema"),
        ("{samples: 12, inherit: averages}", "stages.1.inherit"),
        ("{samples: 12, grow: {image.width: 20}}", "set image.width: 24, or set image.head_dim and heads too"),
    ],
)
def test_impossible_stages_are_refused(stage: str, message: str) -> None:
    with pytest.raises((RecipeError, SpecError, ValidationError), match=message):
        recipe(f"stages=[{{samples: 36}}, {stage}]", "objectives.caption=null")
