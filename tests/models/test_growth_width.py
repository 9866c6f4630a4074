"""Width, heads, hidden units, joint space and positions: the function stays, gradients and training dynamics too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from treering.models.growth import axes
from treering.models.growth.axes import uses
from treering.models.growth.heads import HeadDim
from treering.models.growth.operator import Operator, grown, grown_rate
from treering.models.growth.options import WidthInit
from treering.models.growth.plan import plan_growth
from treering.models.growth.positions import Context, Resolution
from treering.models.model import Model, build
from treering.models.output import Extras
from treering.models.parts import part_of
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, SharedSpec, TextSpec
from treering.training.engines.optimizer import Optimizer, OptimizerConfig

TIED = ModelSpec(
    embed_dim=6,
    image=ImageSpec(width=12, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
)


AUDIO = ModalitySpec(width=12, depth=1, heads=2, features=5, frames=4, mlp="swiglu")


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small models, their heads tied to the width or not, with a captioner or not."""

    def tower(most: int) -> dict[str, Any]:
        heads, size = draw(st.integers(2, 3)), draw(st.sampled_from([8, 12]))
        width = draw(st.sampled_from([heads * size, most]))
        tied = width == heads * size
        ratio = draw(st.sampled_from([1.5, 2.0, 4.0]))
        mlp = draw(st.sampled_from(["gelu", "swiglu"]))
        return {"width": width, "heads": heads, "head_dim": None if tied else size, "mlp_ratio": ratio, "mlp": mlp}

    return ModelSpec(
        embed_dim=draw(st.integers(14, 18)),
        image=ImageSpec(depth=draw(st.integers(1, 2)), patch=4, resolution=8, **tower(40)),
        text=TextSpec(depth=draw(st.integers(1, 2)), context=9, **tower(30)),
        captioner=draw(st.sampled_from([None, CaptionerSpec(depth=1), CaptionerSpec(depth=2)])),
        shared=draw(st.sampled_from([None, SharedSpec(width=8, depth=1, heads=2)])),
        modalities=draw(st.sampled_from([{}, {"audio": AUDIO}])),
    )


OPERATIONS: dict[str, Callable[[ModelSpec, int], dict[str, int | float]]] = {
    "image.width": lambda s, n: {"image.width": s.image.width * (n + 1)},
    "text.width": lambda s, n: {"text.width": s.text.width * (n + 1)},
    "image.width by a fraction": lambda s, n: {"image.width": s.image.width + n * s.image.head_width},
    "text.width by a fraction": lambda s, n: (
        {} if s.captioner else {"text.width": s.text.width + n * s.text.head_width}
    ),
    "image.head_dim": lambda s, n: {"image.head_dim": s.image.head_width + n},
    "text.head_dim": lambda s, n: {"text.head_dim": s.text.head_width + n},
    "image.heads": lambda s, n: {"image.heads": s.image.heads + n} if s.image.head_dim else {},
    "text.heads": lambda s, n: {"text.heads": s.text.heads + n} if s.text.head_dim else {},
    "image.mlp_ratio": lambda s, n: {"image.mlp_ratio": s.image.mlp_ratio + 0.75 * n},
    "text.mlp_ratio": lambda s, n: {"text.mlp_ratio": s.text.mlp_ratio + 0.75 * n},
    "embed_dim": lambda s, n: {"embed_dim": s.embed_dim + n},
    "depth": lambda s, n: {"image.depth": s.image.depth + n, "text.depth": s.text.depth + n},
    "caption": lambda s, n: {"captioner.depth": (s.captioner.depth if s.captioner else 0) + n},
    "experts": lambda s, n: {"image.experts": n + 1, "text.experts": n + 2},
    "shared": lambda s, n: (
        {"shared.depth": 1 + n, "shared.width": 8 + 4 * n, "shared.mlp_ratio": 4.0 + n}
        if s.shared
        else {"shared.depth": n, "shared.width": 8, "shared.heads": 2}
    ),
    "modalities": lambda s, n: {
        f"modalities.depth.{size}": value
        for size, value in {"depth": n, "width": 8 * n, "heads": 2, "features": 3, "frames": n, "experts": n}.items()
    },
    "modalities.audio": lambda s, n: {
        f"modalities.audio.{size}": value + getattr(s.modalities["audio"], size)
        for size, value in {"width": 6 * n, "depth": n, "mlp_ratio": 0.75 * n, "experts": n}.items()
        if "audio" in s.modalities
    },
    "modalities.audio.head_dim": lambda s, n: (
        {"modalities.audio.head_dim": s.modalities["audio"].head_width + n} if "audio" in s.modalities else {}
    ),
    "vocabulary": lambda s, n: {"text.vocabulary": s.text.vocabulary + n},
}


def perturbed(spec: ModelSpec, dtype: torch.dtype = torch.float64) -> Model:
    """A model as after training: no parameter at its initial zero or one."""
    model = build(spec, 0).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.05)
    return model


def filled(spec: ModelSpec, operators: list[Operator], old: dict[str, Tensor], dtype: torch.dtype) -> Model:
    """The model of `spec` whose every tensor a plan makes, in its exact shape."""
    read = grown(operators, lambda kind, name: old[name])
    larger = build(spec, 99).to(dtype)
    with torch.no_grad():
        for name, p in larger.named_parameters():
            made = read("model", name)
            assert made.shape == p.shape, name
            p.copy_(made)
    return larger


def grow(model: Model, targets: dict[str, Any], copies: WidthInit = "noise", seed: int = 3) -> Model:
    spec = model.spec.grown(targets)
    old = {name: p.detach() for name, p in model.named_parameters()}
    return filled(spec, plan_growth(model.spec, spec, seed, copies), old, model.image_mean.dtype)


def outputs(model: Model, lengths: tuple[int, ...] = (4, 9, 2)) -> dict[str, Tensor]:
    """Scaled cosines, all embeddings and the captioner's logits on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    side = model.spec.image.resolution
    images = torch.randint(0, 256, (len(lengths), 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 49408, (sum(lengths),), generator=generator)
    modalities = {
        name: torch.randn(len(lengths), tower.frames, tower.features, generator=generator).to(model.image_mean)
        for name, tower in model.spec.modalities.items()
    }
    output = model(images, tokens, torch.tensor(lengths), Extras(modalities=modalities))
    image, text = output.image.pooled, output.text.pooled
    found = {"logits": output.scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T}
    found |= {"image": image, "text": text}
    if output.caption is not None:
        found["caption"] = output.caption @ model.text.token_embedding.weight.T
    for name, tower in output.modalities.items():
        similar = F.normalize(tower.pooled, dim=-1) @ F.normalize(text, dim=-1).T
        found |= {name: tower.pooled, f"{name} logits": tower.scale * similar}
    return found


@torch.no_grad()
def difference(model: Model, larger: Model) -> float:
    """Largest difference of any output; new channels of the joint space count with what they hold."""
    before, after = outputs(model), outputs(larger)
    if "caption" in before:  # the scores of new tokens are new
        after["caption"] = after["caption"][:, : before["caption"].shape[1]]
    return max((F.pad(b, (0, after[k].shape[1] - b.shape[1])) - after[k]).abs().max().item() for k, b in before.items())


CASES = given(
    spec=specs(),
    chosen=st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=3, unique=True),
    more=st.integers(1, 2),
    copies=st.sampled_from(["noise", "duplicate", "lemon"]),
)


def change(dtype: torch.dtype, spec: ModelSpec, chosen: list[str], more: int, copies: WidthInit) -> float:
    targets = {path: size for name in chosen for path, size in OPERATIONS[name](spec, more).items()}
    assert all(operator.preserves for operator in plan_growth(spec, spec.grown(targets)))
    model = perturbed(spec, dtype)
    return difference(model, grow(model, targets, copies))


@CASES
@settings(max_examples=25, deadline=None)
def test_growth_keeps_the_function_in_fp64(spec: ModelSpec, chosen: list[str], more: int, copies: WidthInit) -> None:
    assert change(torch.float64, spec, chosen, more, copies) < 1e-12


@CASES
@settings(max_examples=12, deadline=None, derandomize=True)  # rounding has a tail: 6.7e-6 was the largest of 100
def test_growth_keeps_the_function_in_fp32(spec: ModelSpec, chosen: list[str], more: int, copies: WidthInit) -> None:
    assert change(torch.float32, spec, chosen, more, copies) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@CASES
@settings(max_examples=300, deadline=None, derandomize=True)
def test_growth_keeps_the_function_on_many_specs(
    dtype: torch.dtype, bound: float, spec: ModelSpec, chosen: list[str], more: int, copies: WidthInit
) -> None:
    assert change(dtype, spec, chosen, more, copies) < bound


PAIRS = [(a, b) for i, a in enumerate(OPERATIONS) for b in list(OPERATIONS)[i:]]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a}, {b}" for a, b in PAIRS])
def test_every_pair_of_operators_keeps_the_function(first: str, second: str) -> None:
    """With heads of their own size, so that each operator has something to do."""
    free = {"image": {"head_dim": 5}, "text": {"head_dim": 3}}
    spec = TIED.model_copy(update={k: getattr(TIED, k).model_copy(update=v) for k, v in free.items()})
    spec = spec.model_copy(update={"modalities": {"audio": AUDIO}})
    if "text.width by a fraction" in (first, second):
        spec = spec.model_copy(update={"captioner": None})
    targets = OPERATIONS[first](spec, 1) | OPERATIONS[second](spec, 2)
    assert all(OPERATIONS[name](spec, 1) for name in (first, second))
    model = perturbed(spec)
    assert difference(model, grow(model, targets)) < 1e-12


def test_growing_twice_keeps_the_function_and_draws_anew() -> None:
    model = perturbed(TIED)
    once = grow(model, {"image.width": 24})
    twice = grow(once, {"image.width": 48, "text.width": 24})
    assert difference(model, twice) < 1e-12


@given(spec=specs())
@settings(max_examples=20, deadline=None)
def test_every_dimension_is_on_the_axis_it_is_said_to_be(spec: ModelSpec) -> None:
    sizes = {}
    for tower, part in spec.towers().items():
        sizes |= {f"{tower}.width": part.width, f"{tower}.heads": part.attention_width}
        sizes[f"{tower}.mlp_width"] = part.mlp_width
    with torch.device("meta"):
        model = Model(spec)
    for name, p in model.named_parameters():
        found = uses(name)
        assert [p.shape[use.dim] for use in found] == [sizes[use.axis] for use in found], name
        fixed = {"patches.weight", "projection.weight", "token_embedding.weight", "position_embedding", "frames.weight"}
        scalar = p.numel() == 1
        complete = len(found) == p.ndim or scalar or name.removeprefix(f"{part_of(name)}.") in fixed
        assert complete, name


def test_broken_rules_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above have power: rules that are easy to forget move an output far beyond their bounds."""
    model = perturbed(TIED)
    monkeypatch.setattr(axes, "_OUTPUT_NORM", "")
    assert difference(model, grow(model, {"text.width": 16})) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr("treering.models.growth.width.padding_variance", lambda old, new: 1.0)
    assert difference(model, grow(model, {"image.width": 18})) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr("treering.models.spec.padding_variance", lambda old, new: 1.0)
    assert difference(model, grow(model, {"image.width": 18})) > 1e-9  # the eps, which tells in fp64 only
    monkeypatch.undo()
    monkeypatch.setattr(HeadDim, "_scaled", lambda self, factor, roots, name="": self._repeat(0, 0))
    assert difference(model, grow(model, {"text.head_dim": 8})) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr(
        "treering.models.growth.width.uses",
        lambda name, spec: [u._replace(reads=u.reads and "projection" not in name) for u in uses(name, spec)],
    )
    assert difference(model, grow(model, {"text.width": 16})) > 1e-3


# Gradients and dynamics


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


def test_noise_is_a_function_of_seed_and_name() -> None:
    model = perturbed(TIED)
    name = "image.projection.weight"
    same, again, other = (dict(grow(model, {"image.width": 24}, seed=s).named_parameters())[name] for s in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_width_comes_before_depth() -> None:
    spec = TIED.grown({"text.depth": 2, "image.depth": 3, "image.width": 24, "embed_dim": 8, "text.context": 12})
    kinds = [operator.describe()["operator"] for operator in plan_growth(TIED, spec)]
    assert kinds == ["widen", "widen", "widen", "embed_dim", "context", "depth", "depth"]


# Joint space and positions


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


@pytest.mark.parametrize(("old", "new"), [(9, 10), (9, 40), (20, 21), (21, 77), (33, 64)])
def test_short_captions_do_not_see_a_longer_context(old: int, new: int) -> None:
    spec = TIED.model_copy(update={"text": TIED.text.model_copy(update={"context": old})})
    model = perturbed(spec)
    larger = grow(model, {"text.context": new})
    lengths = (3, min(old, 20), 2)
    before, after = outputs(model, lengths), outputs(larger, lengths)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not Context.preserves
    table, stretched = model.text.position_embedding, larger.text.position_embedding
    assert torch.allclose(table[-1], stretched[-1], atol=1e-6)
    if old > 22:
        assert not torch.equal(outputs(model, (old,))["text"], outputs(larger, (old,))["text"])


def test_a_stretched_ramp_is_a_slower_ramp() -> None:
    ramp = torch.arange(33.0, dtype=torch.float64)[:, None]
    longer = Context(33, 64).rule("text.position_embedding").apply("model", ramp)[:, 0]
    assert longer[:21].tolist() == list(range(21))
    assert torch.allclose(longer[20:].diff(), torch.full((43,), 12 / 43, dtype=torch.float64), atol=1e-5)


def test_a_larger_picture_has_positions_between_the_old() -> None:
    """A plane over the grid stays that plane away from the border; the picture's corner keeps the corner's value."""
    assert not Resolution.preserves
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    plane = torch.stack([rows.flatten(), columns.flatten()], 1).double()
    larger = Resolution(4, 8).rule("image.position_embedding").apply("model", plane).view(8, 8, 2)
    expected = (torch.arange(8.0, dtype=torch.float64) + 0.5) / 2 - 0.5
    assert torch.allclose(larger[:, 3, 0], expected.clamp(0, 3))
    assert torch.allclose(larger[5, :, 1], expected.clamp(0, 3))
    model = grow(perturbed(TIED), {"image.resolution": 16})
    assert all(part.isfinite().all() for part in outputs(model).values())
