"""Mixtures of experts against a plain loop over tokens, and their growth, from a dense model and from fewer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from treering.models.flops import forward_flops, parameters
from treering.models.growth.experts import Upcycle
from treering.models.growth.operator import Operator, grown, grown_rate
from treering.models.growth.plan import plan_growth
from treering.models.mlp import Experts
from treering.models.model import Model, build
from treering.models.output import Extras
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, SharedSpec, SpecError, TextSpec
from treering.tests.support.grown_models import perturbed
from treering.training.objectives.balance import Balance
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=6,
    image=ImageSpec(width=8, depth=1, heads=2, patch=4, resolution=8, experts=4, mlp_ratio=2.0),
    text=TextSpec(width=8, depth=2, heads=2, context=9, experts=3, experts_per_token=1, mlp="swiglu"),
)


def test_a_mixture_is_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    mixture = Experts(SPEC.image).double()
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    made, routing = mixture(x)
    for token in range(7):
        gates = mixture.router(x[token]).softmax(0)
        best = gates.argsort(descending=True)[:2].tolist()
        expected = sum(gates[e] * mixture.experts[e](x[token]) for e in best) / gates[best].sum()
        assert torch.allclose(made[token], expected, atol=1e-12)
    assert routing.counts_e.sum() == 14
    assert routing.gates_e.sum().item() == pytest.approx(7)
    made.sum().backward()
    assert all(p.grad is not None for p in mixture.parameters())


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero() -> None:
    mixture = Experts(SPEC.image)
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[:2, 0] = 100
    made, routing = mixture(torch.ones(5, 8))
    made.sum().backward()
    assert routing.counts_e.tolist() == [5, 5, 0, 0]
    assert mixture.experts[3].up.weight.grad.abs().max() == 0


def chosen(model: Model, **extras: Any) -> list[int]:
    """How many choices each mixture made, for captions of 9, 7, 5 and 3 tokens and four pictures of 4 patches."""
    lengths = torch.tensor([9, 7, 5, 3])
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    output = model(images, torch.arange(1, 25), lengths, Extras(**extras))
    return [int(routing.counts_e.sum()) for routing in output.routing]


def test_choices_are_those_of_every_token_that_is_somebodys() -> None:
    """Two experts for each of 16 patches, one for each of 24 tokens, in two text blocks and in one of the captioner:
    however many passes a mixture makes in a step. The inputs that CapPa masks are no caption's tokens."""
    captions = build(SPEC.grown({"captioner.depth": 1}), 0)
    masked = torch.tensor([True, False, True, False])
    assert chosen(captions) == [32, 24, 24, 24]
    assert chosen(captions, parallel_b=masked) == [32, 24, 24, 24]
    both = SharedSpec(width=8, depth=2, heads=2, experts=4)
    assert chosen(build(SPEC.model_copy(update={"shared": both}), 0)) == [32, 24, 24, 2 * (16 + 24), 2 * (16 + 24)]


@pytest.mark.parametrize("checkpointed", [0, 2])
def test_the_balance_of_shared_experts_pulls_at_both_modalities(checkpointed: int) -> None:
    """Against the formula over all tokens of a pass over pictures and one over captions; also recomputed."""
    spec = SPEC.model_copy(update={"shared": SharedSpec(width=8, depth=1, heads=2, experts=4)})
    model = build(spec, 0).double()
    for transformer in model.transformers().values():
        transformer.checkpointed_blocks = checkpointed
    scores: list[Tensor] = []
    mixture = model.shared.transformer.blocks[0].mlp  # type: ignore[union-attr]
    mixture.router.register_forward_hook(lambda module, inputs, output: scores.append(output.softmax(-1)))
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    output = model(images, torch.arange(1, 25), torch.tensor([9, 7, 5, 3]), Extras())
    gates_te = torch.cat(scores)
    assert gates_te.shape == (16 + 24, 4)
    choices_e = torch.zeros(4).scatter_add(0, gates_te.topk(2).indices.flatten(), torch.ones(80)).double()
    truth = 4 * (choices_e / choices_e.sum() * gates_te.mean(0)).sum()
    shared = output._replace(routing=output.routing[-1:])
    found = Balance(1.0).partial_loss(shared, None, None, World(0, 1, torch.device("cpu")))  # type: ignore[arg-type]
    weight = mixture.router.weight
    slopes = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (found, truth)]
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(*slopes)


def test_mixtures_are_counted() -> None:
    for spec in (SPEC, SPEC.grown({"captioner.depth": 2})):
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
        update={
            t: getattr(dense, t).model_copy(update={"experts": 1, "experts_per_token": 2}) for t in ("image", "text")
        }
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


IDS, LENGTHS = torch.arange(15), torch.tensor([4, 9, 2])
IMAGES = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def mixture(experts: int, active: int, mlp: Any, caption: bool, dtype: torch.dtype = torch.float64) -> Model:
    """A model whose towers both have experts, as after training."""
    tower = {
        "width": 8,
        "depth": 2,
        "heads": 2,
        "experts": experts,
        "experts_per_token": active,
        "mlp": mlp,
        "mlp_ratio": 2.0,
    }
    text = TextSpec(context=9, **tower).model_copy(update={"vocabulary": 60})
    spec = ModelSpec(embed_dim=6, image=ImageSpec(patch=4, resolution=8, **tower), text=text)
    spec = spec.model_copy(update={"captioner": CaptionerSpec(depth=1) if caption else None})
    return perturbed(spec, dtype)


def outputs(model: Model) -> list[Tensor]:
    output = model(IMAGES, IDS, LENGTHS)
    logits = [] if output.caption is None else [output.caption @ model.text.token_embedding.weight.T]
    return [output.image.pooled, output.text.pooled, *logits]


def larger(model: Model, factors: tuple[int, int], copies: Any, **more: Any) -> tuple[Model, list[Operator]]:
    """The model with so many times as many experts and active ones in both towers, and the plan that made it."""
    old = model.spec
    towers = {
        name: getattr(old, name).model_copy(
            update={
                "experts": old.image.experts * factors[0],
                "experts_per_token": old.image.experts_per_token * factors[1],
                **more,
            }
        )
        for name in ("image", "text")
    }
    new = old.model_copy(update=towers)
    plan = plan_growth(old, new, 3, copies)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    read = grown(plan, lambda kind, name: weights[name])
    made = build(new, 9).to(model.logit_scale.dtype)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(read("model", name))
    return made, plan


@given(
    experts=st.integers(2, 4),
    active=st.integers(1, 4),
    factor=st.integers(2, 3),
    copies=st.sampled_from(["noise", "duplicate", "lemon"]),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    deeper=st.integers(0, 1),
    double=st.booleans(),
)
@settings(max_examples=15)
def test_more_experts_of_which_as_many_more_are_active_change_nothing(
    experts: int, active: int, factor: int, copies: str, mlp: str, deeper: int, double: bool
) -> None:
    model = mixture(experts, min(active, experts), mlp, caption=True, dtype=torch.float64 if double else torch.float32)
    made, plan = larger(model, (factor, factor), copies, depth=2 + deeper)
    assert all(operator.preserves for operator in plan)
    for before, after in zip(outputs(model), outputs(made), strict=True):
        assert (before - after).abs().max() < (1e-12 if double else 1e-5)
    block = made.text.transformer.blocks[0].mlp.experts
    alike = torch.equal(block[0].down.weight, block[experts].down.weight)
    assert alike == (copies == "duplicate")
    assert torch.equal(block[0].up.weight, block[experts].up.weight)


def test_more_experts_alone_are_lossy_and_say_so() -> None:
    model = mixture(4, 2, "gelu", caption=False)
    for factors, copies in (((2, 1), "noise"), ((2, 1), "duplicate"), ((1, 2), "noise")):
        made, plan = larger(model, factors, copies)
        assert not any(operator.preserves for operator in plan)
        assert (outputs(made)[0] - outputs(model)[0]).abs().max() > 1e-4
    made, _ = larger(model, (2, 1), "noise")
    mlp = made.image.transformer.blocks[0].mlp
    rows = mlp.router.weight
    assert torch.allclose(rows[:4] + rows[4:], 2 * model.image.transformer.blocks[0].mlp.router.weight, atol=1e-12)
    assert (rows[:4] - rows[4:]).abs().max() > 1e-2
    counts, _ = made(IMAGES, IDS, LENGTHS).routing[0]
    assert min(counts[:4].sum(), counts[4:].sum()) > 0  # copies share the tokens
    some, plan = larger(model, (1, 1), "noise", experts=6)
    assert not plan[0].preserves
    before, after = (each.text.transformer.blocks[0].mlp.experts for each in (model, some))
    assert [torch.equal(after[i].up.weight, before[j].up.weight) for i, j in ((4, 0), (5, 1), (4, 1))] == [1, 1, 0]


def test_gradients_and_moments_of_more_experts_are_the_mapped_ones() -> None:
    model = mixture(3, 2, "swiglu", caption=True)
    made, plan = larger(model, (2, 2), "duplicate")
    for each in (model, made):
        sum(part.sin().sum() for part in outputs(each)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    first = grown(plan, lambda kind, name: gradients[name])
    second = grown(plan, lambda kind, name: gradients[name].square())
    for name, p in ((name, p) for name, p in made.named_parameters() if p.grad is not None):
        assert torch.allclose(first("exp_avg", name), p.grad, rtol=1e-9, atol=1e-13), name
        assert torch.allclose(second("exp_avg_sq", name), p.grad.square(), rtol=1e-9, atol=1e-15), name
        assert grown_rate(plan, {}, name) == 1.0
    router = made.image.transformer.blocks[0].mlp.router.weight.grad
    assert router.abs().max() > 1e-4
    noisy, _ = larger(model, (2, 2), "noise")
    sum(part.sin().sum() for part in outputs(noisy)).backward()
    one, copy = (noisy.image.transformer.blocks[0].mlp.experts[number].up.weight.grad for number in (0, 3))
    assert not torch.allclose(one, copy, rtol=1e-2)  # they will part


def test_experts_do_not_become_fewer() -> None:
    with pytest.raises(
        SpecError, match=r"image.experts = 2 with experts_per_token = 2: a mixture only grows; leave it at 4"
    ):
        plan_growth(SPEC, SPEC.shrunk({"image.experts": 2}))
    with pytest.raises(SpecError, match=r"image.experts = 8 with experts_per_token = 1: a mixture only grows"):
        plan_growth(SPEC, SPEC.shrunk({"image.experts_per_token": 1}).grown({"image.experts": 8}))
    with pytest.raises(SpecError, match="experts_per_token = 5 is more than experts = 4; set experts_per_token: 4"):
        SPEC.grown({"image.experts_per_token": 5})


def test_balance_against_its_formula() -> None:
    model = build(SPEC, 0)
    output = model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(10), torch.tensor([4, 6]))
    world = World.join()
    found = Balance(1.0).partial_loss(output, None, None, world)
    expected = []
    for counts, gates in output.routing:
        f, p = counts / counts.sum(), gates / gates.sum()
        expected.append(len(f) * (f * p).sum())
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    even = (torch.full((4,), 10), torch.full((4,), 5.0))
    assert Balance(1.0).partial_loss(output._replace(routing=(even,)), None, None, world).item() == pytest.approx(1.0)
    assert Balance(1.0).partial_loss(output._replace(routing=()), None, None, world).item() == 0.0
