"""The step against torch's plain AdamW written out, and what happens when a gradient is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treering.launch.recipe.load import read_recipe
from treering.models.model import build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.engines.base import Engine
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.optimizer import OptimizerConfig, decays
from treering.training.growth.grow import grow
from treering.training.loop import train
from treering.training.objectives.base import Inputs
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive
from treering.training.schedule import CosineConfig, WsdConfig
from treering.training.stages import GrowthConfig
from treering.training.state import TrainingError
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
)
ALONE = World(0, 1, torch.device("cpu"))
OBJECTIVES = [Contrastive(1.0), CaptionLoss(0.5)]
TINY = [
    "data.batch=4",
    "model={embed_dim: 8, image: {width: 8, depth: 1, heads: 1, patch: 12, resolution: 12}, "
    "text: {width: 8, depth: 1, heads: 1, context: 8}, captioner: {depth: 1}}",
    "schedule.warmup=4",
    "eval.suites=[]",
]


def engine(config: OptimizerConfig) -> Engine:
    return DdpEngine(SPEC, list(OBJECTIVES), DdpConfig(), config, ALONE, seed=1)


def batch(seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (6,), generator=generator)
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Inputs(images, tokens, lengths, torch.arange(6), torch.arange(6))


def test_steps_equal_plain_adamw_with_clipping() -> None:
    """Five steps; the reference clips by hand and uses torch's unfused loop, one group a parameter."""
    config = OptimizerConfig(lr=1e-3, weight_decay=0.3, grad_clip=0.5)
    ours, theirs = engine(config), build(SPEC, 1)
    groups = [
        {"params": [p], "weight_decay": 0.3 if p.ndim >= 2 and "embedding" not in n else 0.0}
        for n, p in theirs.named_parameters()
    ]
    adam = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, foreach=False)
    for step in range(5):
        inputs, lr = batch(step), 1e-3 * (step + 1)
        output = theirs(inputs.images, inputs.tokens, inputs.lengths)
        table = theirs.text.token_embedding.weight
        loss = sum(o.weight * o.partial_loss(output, inputs, table, ALONE) for o in OBJECTIVES)
        adam.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in theirs.parameters()).sqrt()
        for p in theirs.parameters():
            p.grad.mul_(min(1.0, 0.5 / (norm.item() + 1e-6)))
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        result = ours.step(inputs, lr)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert sum(o.weight * result.losses[o.name] for o in OBJECTIVES).item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, p), q in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        # Weights moved by up to 1.5e-2. Softmax is blind to the bias of keys: there Adam steps along rounding noise.
        assert (p - q).abs().max() < (1e-5 if not name.endswith("key.bias") else 1e-3), name
    assert ours.optimizer.steps == 5
    assert ours.skipped == 0


def test_the_average_of_the_weights_follows_its_formula_and_a_skipped_step_leaves_it() -> None:
    ours = engine(OptimizerConfig(ema=0.75))
    expected = {name: p.detach().double().clone() for name, p in ours.model.named_parameters()}
    for step in range(3):
        ours.step(batch(step), 1e-2)
        for name, p in ours.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach().double()
    ours.objectives[0] = Contrastive(float("inf"))
    ours.step(batch(3), 1e-2)
    assert ours.skipped == 1
    state = ours.logical_state()
    assert all(torch.allclose(state[f"ema/{name}"].double(), e, atol=1e-6) for name, e in expected.items())
    with ours.whole_model() as averaged:
        assert all(torch.equal(p, state[f"ema/{name}"]) for name, p in averaged.named_parameters())
        assert not any(torch.equal(p, state[f"model/{n}"]) for n, p in averaged.named_parameters())


def test_the_average_grows_as_weights_do() -> None:
    """Where it is equal to the weights before, it is after."""

    def build_one(spec: ModelSpec) -> Engine:
        return DdpEngine(spec, list(OBJECTIVES), DdpConfig(), OptimizerConfig(ema=0.75), ALONE, seed=1)

    small = build_one(SPEC)
    small.step(batch(0), 1e-2)
    state = small.logical_state()
    for name, _ in small.model.named_parameters():
        state[f"ema/{name}"].copy_(state[f"model/{name}"])
    large, _ = grow(small, build_one, SPEC.grown({"image.width": 32, "text.depth": 2}), None, 3, GrowthConfig())
    grown = large.logical_state()
    for name, p in large.model.named_parameters():
        assert torch.equal(grown[f"ema/{name}"], p), name


def test_what_decays() -> None:
    decayed = {n for n, p in build(SPEC, 0).named_parameters() if decays(n, p)}
    assert "image.patches.weight" in decayed
    assert "text.transformer.blocks.0.mlp.up.weight" in decayed
    assert not {n for n in decayed if "embedding" in n or "norm" in n or n.endswith("bias") or n == "logit_scale"}


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    ours = engine(OptimizerConfig())
    ours.step(batch(0), 1e-3)
    with torch.no_grad():
        scale = ours.model.logit_scale.clone()
        ours.model.logit_scale.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in ours.logical_state().items()}
    assert not ours.step(batch(1), 1e-3).grad_norm.isfinite()
    after = ours.logical_state()
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)
    assert (ours.optimizer.steps, ours.skipped) == (1, 1)
    with torch.no_grad():
        ours.model.logit_scale.copy_(scale)
    ours.step(batch(2), 1e-3)
    assert (ours.optimizer.steps, ours.skipped) == (2, 1)
    assert any(not torch.equal(before[n], ours.logical_state()[n]) for n in before if n.startswith("model/"))


def test_a_run_without_finite_gradients_stops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few are skipped and told; ten in a row end the run."""
    overrides = [*TINY, "stages=[{samples: 120}]", "log.every=1"]
    clip = torch.nn.utils.get_total_norm
    broken = {3, 4, *range(10, 30)}
    calls = iter(range(1, 1000))
    monkeypatch.setattr(
        torch.nn.utils, "get_total_norm", lambda g: clip(g) * (float("nan") if next(calls) in broken else 1)
    )
    with pytest.raises(
        TrainingError,
        match=r"no finite gradient in the last 10 steps up to step 19, and there is no commit to go back to; lower opt",
    ):
        train(read_recipe("emoji", overrides).recipe, tmp_path)
    assert "1 of the last 1 steps had a gradient that is not finite" in capsys.readouterr().err


def test_a_commit_between_two_log_lines_hides_no_skipped_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*TINY, "stages=[{samples: 40}]", "checkpoint.every=20"]
    clip, calls = torch.nn.utils.get_total_norm, iter(range(1, 1000))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda g: clip(g) * (float("nan") if next(calls) == 3 else 1))
    train(read_recipe("emoji", overrides).recipe, tmp_path)
    assert "1 of the last 10 steps had a gradient that is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_the_schedule_warms_up_stays_and_decays(batch: int) -> None:
    config = WsdConfig(warmup=1000, cooldown=0.2, final_fraction=0.1)
    total = -(-10_000 // batch) * batch
    rates = [config.factor(samples, batch, total) for samples in range(0, total, batch)]
    assert rates[0] == pytest.approx(batch / 1000)
    assert all(0 < rate <= 1 for rate in rates)
    peak = [i for i, rate in enumerate(rates) if rate == 1.0]
    assert peak == list(range(peak[0], peak[-1] + 1))
    assert abs(peak[0] * batch - 1000) <= 2 * batch
    assert abs((peak[-1] + 1) * batch - 0.8 * total) <= batch
    assert rates[-1] == pytest.approx(0.1 + 0.9 * batch / (0.2 * total))
    assert sorted(rates[peak[-1] :], reverse=True) == rates[peak[-1] :]


@pytest.mark.parametrize("batch", [1, 7, 128])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_cosine_is_that_of_torch(batch: int, final: float) -> None:
    """After a warm-up that is a whole number of steps: torch's own schedule, over the rest of the run."""
    warm, total = 10 * batch, 210 * batch
    config = CosineConfig(warmup=warm, final_fraction=final)
    rates = [config.factor(samples, batch, total) for samples in range(0, total, batch)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200, eta_min=final)
    expected = []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10:] == pytest.approx(expected, abs=1e-12)
    assert config.falls_from(total) == warm
