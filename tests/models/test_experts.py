"""Mixtures of experts against a plain loop over tokens, and their growth from a dense model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from treering.models.flops import forward_flops, parameters
from treering.models.growth.experts import Upcycle
from treering.models.growth.plan import plan_growth
from treering.models.growth.rules import grown
from treering.models.model import Model, build
from treering.models.spec import ImageSpec, ModelSpec, SpecError, TextSpec
from treering.models.transformer import Experts
from treering.training.objectives.balance import Balance
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=6,
    image=ImageSpec(width=8, depth=1, heads=2, patch=4, resolution=8, experts=4, mlp_ratio=2.0),
    text=TextSpec(width=8, depth=2, heads=2, context=9, experts=3, active=1, mlp="swiglu"),
)


def test_a_mixture_is_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    mixture = Experts(SPEC.image).double()
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    made = mixture(x)
    for token in range(7):
        gates = mixture.router(x[token]).softmax(0)
        best = gates.argsort(descending=True)[:2].tolist()
        expected = sum(gates[e] * mixture.experts[e](x[token]) for e in best) / gates[best].sum()
        assert torch.allclose(made[token], expected, atol=1e-12)
    assert mixture.counts_e.sum() == 14
    assert mixture.gates_e.sum().item() == pytest.approx(7)
    made.sum().backward()
    assert all(p.grad is not None for p in mixture.parameters())


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero() -> None:
    mixture = Experts(SPEC.image)
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[:2, 0] = 100
    mixture(torch.ones(5, 8)).sum().backward()
    assert mixture.counts_e.tolist() == [5, 5, 0, 0]
    assert mixture.experts[3].up.weight.grad.abs().max() == 0


def test_mixtures_are_counted() -> None:
    for spec in (SPEC, SPEC.grown({"caption.depth": 2})):
        with torch.device("meta"):
            assert parameters(spec) == sum(p.numel() for p in Model(spec).parameters())
    model, length = build(SPEC, 0), 9
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(images, torch.zeros(2 * length, dtype=torch.int64), torch.full((2,), length))
    masked = 2 * (SPEC.text.depth - 1) * 4 * length * (length - (length + 1) / 2) * SPEC.text.attention_width
    assert 2 * forward_flops(SPEC, length) + masked == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_mixture_of_copies_is_the_dense_model_until_it_trains() -> None:
    dense = ModelSpec.model_validate(SPEC.model_dump() | {})
    dense = dense.model_copy(
        update={t: getattr(dense, t).model_copy(update={"experts": 1, "active": 2}) for t in ("image", "text")}
    )
    model = build(dense, 0).double()
    spec = dense.grown({"image.experts": 4, "text.experts": 3, "text.depth": 3, "image.width": 16})
    old = {name: p.detach() for name, p in model.named_parameters()}
    plan = plan_growth(dense, spec)
    read = grown(plan, lambda kind, name: old[name])
    mixture = build(spec, 9).double()
    with torch.no_grad():
        for name, p in mixture.named_parameters():
            p.copy_(read("model", name))
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    tokens, lengths = torch.randint(0, 49408, (15,)), torch.tensor([4, 9, 2])
    before, after = model(images, tokens, lengths), mixture(images, tokens, lengths)
    assert (before.image.pooled - after.image.pooled).abs().max() < 1e-12
    assert (before.text.pooled - after.text.pooled).abs().max() < 1e-12
    assert len(after.routing) == 4
    assert before.routing == ()
    experts = mixture.image.transformer.blocks[0].mlp
    assert len(experts.experts) == 4
    after.image.pooled.sin().sum().backward()
    grads = [expert.up.weight.grad for expert in experts.experts]
    assert not torch.allclose(grads[0], grads[1])  # other tokens: they will part


def test_experts_get_a_share_of_the_moments() -> None:
    rule = Upcycle("text", 4, 8, 0).rule("captioner.transformer.blocks.0.mlp.experts.2.down.weight")
    assert rule.source == "captioner.transformer.blocks.0.mlp.down.weight"
    ones = torch.ones(2, 2)
    assert [rule.apply(kind, ones)[0, 0].item() for kind in ("model", "exp_avg", "exp_avg_sq")] == [1, 0.25, 0.0625]


def test_a_mixture_stays_as_it_is() -> None:
    with pytest.raises(SpecError, match=r"image.experts = 8 with active = 2: only a dense MLP .* leave it at 4"):
        plan_growth(SPEC, SPEC.grown({"image.experts": 8}))
    with pytest.raises(SpecError, match="active = 5 of 4 experts cannot be; set active: 4"):
        SPEC.grown({"image.active": 5})


def test_balance_against_its_formula() -> None:
    model = build(SPEC, 0)
    output = model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(10), torch.tensor([4, 6]))
    world = World.join()
    found = Balance(1.0).share(output, None, None, world)
    expected = []
    for counts, gates in output.routing:
        f, p = counts / counts.sum(), gates / gates.sum()
        expected.append(len(f) * (f * p).sum())
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    even = (torch.full((4,), 10), torch.full((4,), 5.0))
    assert Balance(1.0).share(output._replace(routing=(even,)), None, None, world).item() == pytest.approx(1.0)
    assert Balance(1.0).share(output._replace(routing=()), None, None, world).item() == 0.0
