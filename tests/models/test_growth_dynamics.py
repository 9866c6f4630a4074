"""After growth: the gradient is the mapped one, and training goes on as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.growth.axes import uses
from treering.models.growth.operator import grown, grown_rate
from treering.models.growth.plan import plan_growth
from treering.models.model import Model
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.tests.support.grown_models import AUDIO, TIED, difference, grow, outputs, perturbed
from treering.training.engines.optimizer import Optimizer, OptimizerConfig


def score(found: dict[str, Tensor]) -> Tensor:
    return sum((part.sin().sum() for part in found.values()), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(
    "targets",
    [
        {"image.width": 36},
        {"text.width": 16},
        {"image.mlp_ratio": 5.5, "text.mlp_ratio": 4.5},
        {"image.width": 24, "text.width": 24, "text.mlp_ratio": 5.0},
        {"image.head_dim": 12, "text.head_dim": 7},
        {"shared.width": 16, "text.width": 16},
        {"modalities.audio.width": 24, "modalities.audio.mlp_ratio": 5.5},
    ],
    ids=str,
)
def test_the_grown_gradient_is_the_mapped_one(targets: dict[str, Any]) -> None:
    """For plain copies: the first moment's map is the gradient's, the second's that of its square."""
    spec = TIED.grown({"shared.depth": 1, "shared.width": 8, "shared.heads": 2})
    spec = spec.model_copy(update={"modalities": {"audio": AUDIO}})
    model = perturbed(spec)
    score(outputs(model)).backward()
    larger = grow(model, targets, "duplicate")
    score(outputs(larger)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    plan = plan_growth(spec, larger.spec, 3, "duplicate")
    first = grown(plan, lambda kind, name: gradients[name])
    second = grown(plan, lambda kind, name: gradients[name].square())
    for name, p in larger.named_parameters():
        assert torch.allclose(first("exp_avg", name), p.grad, rtol=1e-9, atol=1e-12), name
        assert torch.allclose(second("exp_avg_sq", name), p.grad.square(), rtol=1e-9, atol=1e-15), name


def train(model: Model, optimizer: Optimizer, steps: range) -> list[float]:
    """Contrastive and captioning loss on a stream of random batches, in fp64."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        lengths = torch.tensor([5, 9, 3, 7])
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(0, 60, (24,), generator=generator)
        output = model(images, tokens, lengths)
        logits = output.scale * F.normalize(output.image.pooled, dim=-1) @ F.normalize(output.text.pooled, dim=-1).T
        pairs = torch.arange(4)
        caption = F.cross_entropy(output.caption @ model.text.token_embedding.weight.T, tokens.roll(-1))
        loss = F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs) + caption
        loss.backward()
        optimizer.step(1e-3)
        losses.append(loss.item())
    return losses


def continued(model: Model, optimizer: Optimizer, targets: dict[str, Any], mapped: str) -> tuple[Model, Optimizer]:
    """The grown model and its optimizer; `mapped` says which part of the state is mapped: all, moments or rates."""
    spec = model.spec.grown(targets)
    plan = plan_growth(model.spec, spec, 3, "duplicate")
    larger = grow(model, targets, "duplicate")
    following = Optimizer(larger.named_parameters(), optimizer.config)
    moments = grown(plan, lambda kind, name: optimizer.state()[kind][name])
    state = {kind: {name: moments(kind, name) for name in following.parameters} for kind in optimizer.state()}
    rates = {name: grown_rate(plan, optimizer.multipliers, name) for name in following.parameters}
    if mapped == "rates":
        state = {kind: {n: torch.zeros_like(t) for n, t in tensors.items()} for kind, tensors in state.items()}
    following.load(state, optimizer.steps, 0, {} if mapped == "moments" else rates)
    return larger, following


def divergence(mapped: str, targets: dict[str, Any], steps: int = 100) -> float:
    """Largest difference of a loss between a run that only deepens and one that also widens."""
    torch.manual_seed(0)
    model = perturbed(TIED)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.3, eps=1e-20))
    train(model, optimizer, range(10))
    deeper = {"image.depth": 2, "text.depth": 2, "captioner.depth": 2}
    alone = continued(model, optimizer, deeper, "all")
    both = continued(model, optimizer, deeper | targets, mapped)
    ours, theirs = train(*both, range(10, 10 + steps)), train(*alone, range(10, 10 + steps))
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "targets", [{"image.width": 24, "text.width": 24}, {"image.mlp_ratio": 12.0}, {"text.head_dim": 12}], ids=str
)
def test_copies_with_mapped_state_follow_the_ungrown_run(targets: dict[str, Any]) -> None:
    assert divergence("all", targets) < 1e-6


@pytest.mark.parametrize("mapped", ["moments", "rates"])
def test_half_of_the_state_would_not_do(mapped: str) -> None:
    assert divergence(mapped, {"image.width": 24, "text.width": 16}, steps=20) > 1e-3


def test_rates_multiply_over_growths_and_go_to_new_blocks() -> None:
    wide = TIED.grown({"image.width": 24})
    deep = wide.grown({"image.depth": 2, "image.width": 72, "image.mlp_ratio": 6.0})
    block = "image.transformer.blocks.1"
    names = {f"{block}.mlp.up.weight": 1 / 6, f"{block}.mlp.down.weight": 1 / 9, f"{block}.attention.out.bias": 1.0}
    names |= {"image.projection.weight": 1 / 6, "captioner.transformer.blocks.0.cross.key.weight": 1 / 6}
    names |= {"text.projection.weight": 1.0, "image.position_embedding": 1.0, "logit_scale": 1.0}
    first, second = plan_growth(TIED, wide), plan_growth(wide, deep)
    held = {name: grown_rate(first, {}, name) for name in names}
    held |= {n.replace("blocks.1", "blocks.0"): grown_rate(first, {}, n.replace("blocks.1", "blocks.0")) for n in names}
    assert {name: grown_rate(second, held, name) for name in names} == pytest.approx(names)


def test_noise_tells_copies_apart_and_plain_copies_stay_alike() -> None:
    """Copies of readers differ at once; so do the gradients of what writes to them, which start as true copies."""
    model = perturbed(TIED)
    blocks = "text.transformer.blocks.0"
    readers = ("image.projection.weight", f"{blocks}.mlp.up.weight", "captioner.transformer.norm.weight")
    writers = ("image.patches.weight", f"{blocks}.mlp.up.bias", "text.token_embedding.weight")
    for copies in ("noise", "duplicate"):
        larger = grow(model, {"image.width": 24, "text.width": 16}, copies)
        score(outputs(larger)).backward()
        named = dict(larger.named_parameters())
        for name in readers + writers:
            dim = uses(name)[-1 if name in readers else 0].dim
            tensor = named[name].detach() if name in readers else named[name].grad
            parts = torch.stack(tensor.chunk(2, dim))
            apart = (parts - parts.mean(0)).square().mean() / parts.mean(0).square().mean()
            assert apart < 1e-20 if copies == "duplicate" else apart > 1e-4, name
            if copies == "noise" and name in readers[:1]:
                assert 0.04 < apart < 0.25  # a signal-to-noise ratio of 10 dB is 0.1


def test_new_joint_channels_without_moments_come_alive() -> None:
    """As after an import, or from weights alone: rows too small to be seen have a gradient, and grow by its steps."""
    model = perturbed(TIED)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
    larger = grow(model, {"embed_dim": 9})
    assert difference(model, larger) < 1e-12
    optimizer = Optimizer(larger.named_parameters(), OptimizerConfig(lr=1e-2))
    for tower in (larger.image, larger.text):
        assert 0 < tower.projection.weight[6:].abs().max() < 1e-12
    train(larger, optimizer, range(40))
    for tower in (larger.image, larger.text):
        assert (tower.projection.weight[6:].abs().amax(1) > 1e-4).all()


def test_what_is_drawn_anew_has_its_own_learning_rate() -> None:
    """Routers, maps of a new captioner to the picture, new parts, and with inherit: 0 every matrix; copies have their
    original's, and so has a blend."""
    rates = {
        "text.transformer.blocks.0.attention.key.weight": 0.5,
        "text.transformer.blocks.0.mlp.up.bias": 0.25,
        "text.transformer.norm.weight": 0.5,
        "logit_scale": 0.5,
    }
    small = ModelSpec(
        embed_dim=6,
        image=ImageSpec(width=8, depth=1, heads=2, patch=4, resolution=8),
        text=TextSpec(width=8, depth=1, heads=2, context=9),
    )
    captioned = plan_growth(small, small.grown({"captioner.depth": 1, "text.experts": 2}))
    block = "captioner.transformer.blocks.0"
    assert grown_rate(captioned, rates, f"{block}.cross.key.weight") == 1.0
    assert grown_rate(captioned, rates, "captioner.transformer.norm.weight") == 1.0
    assert grown_rate(captioned, rates, f"{block}.cross.query.weight") == 1.0
    assert grown_rate(captioned, rates, f"{block}.attention.key.weight") == 0.5
    assert grown_rate(captioned, rates, "text.transformer.blocks.0.mlp.router.weight") == 1.0
    assert grown_rate(captioned, rates, "text.transformer.blocks.0.mlp.experts.1.up.bias") == 0.25
    assert grown_rate(captioned, rates, "logit_scale") == 0.5
    wide = small.grown({"text.width": 16})
    key = "text.transformer.blocks.0.attention.key.weight"
    for inherit, rate in ((1.0, 0.25), (0.5, 0.25), (0.0, 1.0)):
        assert grown_rate(plan_growth(small, wide, inherit=inherit), rates, key) == rate
    audio = small.grown(
        {f"modalities.audio.{size}": n for size, n in {"width": 8, "depth": 1, "heads": 2, "features": 3}.items()}
    )
    assert grown_rate(plan_growth(small, audio), rates, "modalities.audio.logit_scale") == 1.0


def test_new_joint_channels_leave_zero() -> None:
    """Rows near zero on both sides have next to no gradient; their momentum moves them, and then they have one."""
    model = perturbed(TIED)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
    train(model, optimizer, range(5))
    larger, following = continued(model, optimizer, {"embed_dim": 9}, "all")
    assert difference(model, larger) < 1e-12
    train(larger, following, range(5, 6))
    found = outputs(larger)
    found["logits"].sin().sum().backward()
    for tower in (larger.image, larger.text):
        assert 0 < tower.projection.weight[6:].abs().max() < 5e-3
        assert (tower.projection.weight.grad[6:].abs().amax(1) > 0).all()
