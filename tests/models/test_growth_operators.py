"""The operators beside width and depth, and the lossy ones: what each keeps exactly, and what it says of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.flops import parameters
from treering.models.growth.depth import Depth, Drop
from treering.models.growth.operator import GrownState, Operator, grown, grown_rate
from treering.models.growth.patch import Patch
from treering.models.growth.plan import plan_growth
from treering.models.mlp import Mlp
from treering.models.model import Model, build
from treering.models.spec import ImageSpec, ModelSpec, SpecError, TextSpec
from treering.tests.support.grown_models import perturbed

SPEC = ModelSpec(
    embed_dim=6,
    image=ImageSpec(width=12, depth=2, heads=2, patch=4, resolution=8),
    text=TextSpec(width=8, depth=2, heads=2, context=9, mlp="swiglu"),
)
KINDS = ("model", "exp_avg", "exp_avg_sq")


def state_of(model: Model) -> dict[str, Tensor]:
    """Weights, and moments that are anything."""
    state = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        state |= {f"exp_avg/{name}": p.detach().sin(), f"exp_avg_sq/{name}": p.detach().cos().square()}
    return state


def filled(spec: ModelSpec, operators: list[Operator], state: dict[str, Tensor]) -> Model:
    read = grown(operators, lambda kind, name: state[f"{kind}/{name}"])
    model = build(spec, 99).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            for kind in KINDS:
                assert read(kind, name).shape == p.shape, (kind, name)
            assert (read("exp_avg_sq", name) >= 0).all(), name
            p.copy_(read("model", name))
    return model


def resized(model: Model, spec: ModelSpec, **options: Any) -> Model:
    state = state_of(model)
    read = lambda kind, name: state[f"{kind}/{name}"]  # noqa: E731
    return filled(spec, plan_growth(model.spec, spec, 3, read=read, **options), state)


def pictures(side: int) -> Tensor:
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: Model, images: Tensor | None = None) -> list[Tensor]:
    images = pictures(model.spec.image.resolution) if images is None else images
    tokens = torch.randint(0, 49408, (15,), generator=torch.Generator().manual_seed(2))
    output = model(images, tokens, torch.tensor([4, 9, 2]))
    found = [output.image.pooled, output.text.pooled]
    return found + ([output.caption @ model.text.token_embedding.weight.T] if output.caption is not None else [])


def apart(one: Model, other: Model) -> float:
    return max((a - b).abs().max().item() for a, b in zip(outputs(one), outputs(other), strict=False))


def test_an_average_of_weights_grows_as_the_weights_do() -> None:
    model = perturbed(SPEC)
    plan = plan_growth(
        SPEC, SPEC.grown({"image.width": 18, "text.depth": 3, "captioner.depth": 1, "image.experts": 2}), 3
    )
    state = {f"{kind}/{name}": p.detach() for name, p in model.named_parameters() for kind in ("model", "ema")}
    names = [name for name, _ in build(SPEC.grown({"captioner.depth": 1, "text.depth": 3}), 0).named_parameters()]
    names = [name for name in names if ".mlp." not in name or not name.startswith("image")]
    found = GrownState(plan, state, [f"{kind}/{name}" for kind in ("model", "ema") for name in names])
    assert all(torch.equal(found[f"model/{name}"], found[f"ema/{name}"]) for name in names)


# Depth by name


def test_stack_repeats_and_interleave_doubles() -> None:
    stack = Depth("image.depth", "image.transformer.blocks", 3, 6, "stack")
    doubled = Depth("image.depth", "image.transformer.blocks", 3, 6, "interleave")
    assert [stack.source(i)[0] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [doubled.source(i)[0] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert Depth("image.depth", "image.transformer.blocks", 3, 6).preserves


@pytest.mark.parametrize("layers", ["stack", "interleave"])
def test_live_copies_are_lossy_and_say_so(layers: str) -> None:
    model = perturbed(SPEC)
    spec = SPEC.grown({"image.depth": 4, "text.depth": 3})
    assert not any(operator.preserves for operator in plan_growth(SPEC, spec, depth_init=layers))
    assert apart(model, resized(model, spec, depth_init=layers)) > 1e-2
    assert apart(model, resized(model, spec)) == 0.0


# A captioner where there was none


def test_a_new_captioner_leaves_the_towers_bit_for_bit() -> None:
    model = perturbed(SPEC)
    spec = SPEC.grown({"captioner.depth": 3})
    captioning = resized(model, spec)
    tokens, lengths = torch.randint(0, 49408, (15,)), torch.tensor([4, 9, 2])
    assert torch.equal(model.embed_images(pictures(8)).pooled, captioning.embed_images(pictures(8)).pooled)
    assert torch.equal(model.embed_texts(tokens, lengths).pooled, captioning.embed_texts(tokens, lengths).pooled)
    # In training the last text block now works for all tokens, where it worked for the last ones: other rounding.
    assert apart(model, captioning) < 1e-12
    assert len(outputs(captioning)) == 3
    output = captioning(pictures(8), torch.arange(15), torch.tensor([4, 9, 2]))
    assert torch.allclose(output.caption, F.layer_norm(output.text.tokens, (8,)), atol=1e-12)
    (output.caption @ captioning.text.token_embedding.weight.T).sin().sum().backward()
    for block in captioning.captioner.transformer.blocks:
        assert block.cross.out.weight.grad.abs().max() > 0
        assert block.mlp.down.weight.grad.abs().max() > 0


def test_a_captioner_comes_with_any_other_growth() -> None:
    model = perturbed(SPEC)
    spec = SPEC.grown({"captioner.depth": 1, "text.width": 12, "text.depth": 4, "image.width": 24, "image.head_dim": 8})
    assert apart(model, resized(model, spec)) < 1e-12


# Shared blocks where there were none


def test_shared_blocks_enter_through_a_zero_gate() -> None:
    model = perturbed(SPEC.grown({"captioner.depth": 1}))
    spec = model.spec.grown({"shared.depth": 2, "shared.width": 16, "shared.heads": 2})
    sharing = resized(model, spec)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(sharing), strict=True))
    with torch.device("meta"):
        assert parameters(spec) == sum(p.numel() for p in Model(spec).parameters())
    output = sharing(pictures(8), torch.arange(15), torch.tensor([4, 9, 2]))
    (output.image.pooled.sin().sum() + output.text.pooled.sin().sum()).backward()
    assert sharing.shared.image_gate.grad.abs() > 0
    assert sharing.shared.text_gate.grad.abs() > 0
    with torch.no_grad():
        sharing.shared.image_gate.fill_(0.5)
    before, after = outputs(model), outputs(sharing)
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


# A modality tower where there was none

HEARING = {
    "modalities.audio.width": 12,
    "modalities.audio.depth": 2,
    "modalities.audio.heads": 3,
    "modalities.audio.features": 5,
    "modalities.audio.frames": 4,
}


def test_a_modality_tower_leaves_the_others_bit_for_bit() -> None:
    """It is a fresh model's own, in any company, and the optimizer knows nothing of it."""
    model = perturbed(SPEC.grown({"captioner.depth": 1}))
    spec = model.spec.grown(HEARING)
    hearing = resized(model, spec)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(hearing), strict=True))
    plan, state = plan_growth(model.spec, spec, 3), state_of(model)
    assert [operator.describe() for operator in plan] == [
        {"operator": "new_part", "field": "modalities.audio.depth", "from": 0, "to": 2, "seed": 3}
    ]
    names = [name for name, _ in hearing.named_parameters() if name.startswith("modalities.")]
    fresh, grown_state = build(spec, 3), GrownState(plan, state, [])
    for name in names:
        assert torch.equal(grown_state[f"model/{name}"], fresh.get_parameter(name).double()), name
        assert grown_rate(plan, {"logit_scale": 1.0}, name) == 1.0
        for kind in ("exp_avg", "exp_avg_sq"):
            assert not grown_state[f"{kind}/{name}"].any(), (kind, name)
    both = resized(model, spec.grown({"image.width": 18, "embed_dim": 9, "text.depth": 3}))
    assert torch.equal(both.modalities["audio"].frames.weight, hearing.modalities["audio"].frames.weight)
    assert apart(model, resized(both, both.spec.shrunk({"embed_dim": 6}))) < 1e-12
    other = dict(
        resized(model, model.spec.grown({k.replace("audio", "depth"): v for k, v in HEARING.items()}))
        .modalities["depth"]
        .named_parameters()
    )
    assert not torch.equal(other["frames.weight"], hearing.modalities["audio"].frames.weight)


def test_operators_name_the_sizes_of_a_tower_whatever_it_is_called() -> None:
    """Depths, widths and heads of towers that are called like sizes and parts."""
    for name in ("heads", "depth", "caption", "width"):
        sizes = {key.replace("audio", name): value for key, value in HEARING.items()}
        model = perturbed(SPEC.grown(sizes))
        more = {f"modalities.{name}.{size}": value for size, value in {"head_dim": 6, "depth": 3, "width": 18}.items()}
        spec = model.spec.grown(more)
        fields = {operator.describe()["field"] for operator in plan_growth(model.spec, spec)}
        assert fields == {f"modalities.{name}.{size}" for size in ("width", "mlp_width", "head_dim", "depth")}
        larger = resized(model, spec)
        frames = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        assert torch.allclose(model.modalities[name](frames).pooled, larger.modalities[name](frames).pooled, atol=1e-12)


def test_a_modality_tower_shrinks() -> None:
    """As any other: what plain copies and empty blocks added goes without a trace."""
    model = perturbed(SPEC.grown(HEARING | {"modalities.audio.experts": 2}))
    large = model.spec.grown({"modalities.audio.width": 24, "modalities.audio.depth": 3})
    state = state_of(model)
    read = lambda kind, name: state[f"{kind}/{name}"]  # noqa: E731
    there = plan_growth(model.spec, large, 3, "duplicate")
    deep = filled(large, there, state)
    held = state_of(deep)
    back = plan_growth(large, model.spec, drop_blocks="smallest", read=lambda kind, name: held[f"{kind}/{name}"])
    small = filled(model.spec, [*there, *back], state)
    for name, p in small.named_parameters():
        assert torch.allclose(p, read("model", name), rtol=1e-12), name
    assert [operator.describe()["operator"] for operator in back] == ["truncate", "truncate", "truncate", "drop"]
    assert back[-1].describe()["field"] == "modalities.audio.depth"


# Patches and words


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 6), (4, 2), (8, 6)])
def test_a_resized_patch_is_the_best_that_there_is(old: int, new: int) -> None:
    """Against least squares over every patch there can be; a larger one is exact on enlarged patches."""
    operator = Patch(old, new)
    kernel = torch.randn(5, 3 * old**2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = operator.rule("image.patches.weight").apply("model", kernel)
    patches = torch.randn(200, 3, old, old, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    enlarged = F.interpolate(patches, size=(new, new), mode="bilinear", antialias=new < old).flatten(1)
    wanted = patches.flatten(1) @ kernel.T
    if new > old:
        assert (enlarged @ ours.T - wanted).abs().max() < 1e-10
    else:
        best = torch.linalg.lstsq(operator._matrix().T, kernel.view(15, -1).T).solution.T.reshape(5, -1)
        assert (ours - best).abs().max() < 1e-10
    assert not operator.preserves
    assert operator.rule("image.patches.bias").apply("model", kernel) is kernel


def test_patch_growth_makes_a_model_that_runs() -> None:
    model = perturbed(SPEC)
    finer = resized(model, SPEC.grown({"image.patch": 2}))
    assert apart(model, finer) > 0
    same = SPEC.grown({"image.patch": 8, "image.resolution": 16})
    assert [type(operator) for operator in plan_growth(SPEC, same)] == [Patch]
    assert outputs(resized(model, same))[0].isfinite().all()


def test_new_words_are_the_mean_of_their_parts() -> None:
    model = perturbed(SPEC.grown({"captioner.depth": 1}))
    spec = model.spec.grown({"text.vocabulary": 49410})
    table = model.text.token_embedding.weight
    larger = resized(model, spec, token_init=((5, 7), (9,))).text.token_embedding.weight
    assert torch.equal(larger[:49408], table)
    assert torch.allclose(larger[49408:], torch.stack([(table[5] + table[7]) / 2, table[9]]))
    means = resized(model, spec).text.token_embedding.weight[49408:]
    assert torch.allclose(means, table.mean(0).expand(2, -1))
    with pytest.raises(SpecError, match="token_init has 1 entries for 2 new rows"):
        plan_growth(model.spec, spec, token_init=((5,),))
    with pytest.raises(SpecError, match="not below 49408"):
        plan_growth(model.spec, spec, token_init=((5,), (49409,)))


# Shrinking


@pytest.mark.parametrize(
    "targets",
    [{"image.width": 24, "text.width": 16}, {"image.mlp_ratio": 8.0, "text.mlp_ratio": 12.0}, {"embed_dim": 9}],
    ids=str,
)
def test_shrinking_undoes_growth_by_plain_copies(targets: dict[str, Any]) -> None:
    """Weights, moments and rates; truncation keeps the first copies and gives them what all had."""
    model = perturbed(SPEC)
    state, large = state_of(model), SPEC.grown(targets)
    there, back = plan_growth(SPEC, large, 3, "duplicate"), plan_growth(large, SPEC)
    assert not any(operator.preserves for operator in back)
    paths = list(state)
    found = GrownState([*there, *back], state, paths)
    assert list(found) == paths
    for path in paths:
        assert torch.allclose(found[path], state[path], rtol=1e-12), path
        assert grown_rate([*there, *back], {}, path.partition("/")[2]) == pytest.approx(1.0)


def test_blocks_that_write_least_go_first() -> None:
    """Zeroed copies write nothing: dropping the smallest undoes the growth, dropping the last does not."""
    model = perturbed(SPEC)
    deep = resized(model, SPEC.grown({"image.depth": 5, "text.depth": 3}))
    assert apart(model, resized(deep, SPEC, drop_blocks="smallest")) == 0.0
    assert apart(model, resized(deep, SPEC, drop_blocks="last")) > 1e-3
    operator = Drop("image.depth", "image.transformer.blocks", 5, (0, 2))
    assert operator.rule("image.transformer.blocks.1.mlp.up.bias").source == "image.transformer.blocks.2.mlp.up.bias"
    assert operator.describe()["dropped"] == [1, 3, 4]


def test_everything_that_shrinks_makes_a_model_that_runs() -> None:
    spec = SPEC.grown({"image.resolution": 16, "text.context": 30, "captioner.depth": 2, "image.heads": 2})
    model = perturbed(spec)
    targets = {"image.resolution": 8, "text.context": 12, "captioner.depth": 1, "text.mlp_ratio": 2.0, "image.width": 6}
    small = resized(model, spec.shrunk(targets))
    assert torch.equal(small.text.position_embedding, model.text.position_embedding[:12])
    assert all(part.isfinite().all() for part in outputs(small))


# The rest


def test_a_gated_mlp_is_swiglu() -> None:
    mlp = Mlp(SPEC.text).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    gate = x @ mlp.gate.weight.T + mlp.gate.bias
    expected = (gate * torch.sigmoid(gate) * (x @ mlp.up.weight.T + mlp.up.bias)) @ mlp.down.weight.T + mlp.down.bias
    assert torch.allclose(mlp(x), expected, atol=1e-12)
    for spec in (SPEC, SPEC.grown({"captioner.depth": 2})):
        with torch.device("meta"):
            assert parameters(spec) == sum(p.numel() for p in Model(spec).parameters())


def test_inheriting_with_momentum_blends() -> None:
    model = perturbed(SPEC)
    spec = SPEC.grown({"image.depth": 3})
    whole, none, half = (resized(model, spec, inherit=m) for m in (1.0, 0.0, 0.5))
    assert apart(whole, resized(model, spec)) == 0.0
    assert not plan_growth(SPEC, spec, inherit=0.5)[-1].preserves
    for name, p in half.named_parameters():
        ends = (dict(whole.named_parameters())[name] + dict(none.named_parameters())[name]) / 2
        assert torch.allclose(p, ends, atol=1e-12), name
    assert torch.equal(none.logit_scale, model.logit_scale)
    assert not torch.equal(none.image.projection.weight, model.image.projection.weight)


def test_fresh_values_are_not_those_that_the_run_began_with() -> None:
    """Nor those of another growth to the same sizes."""
    first = build(SPEC, 3).double()
    wide = SPEC.grown({"image.depth": 3})
    drawn = [resized(first, spec, inherit=0.0) for spec in (wide, SPEC.grown({"image.depth": 4}))]
    beginnings = {name: p for name, p in first.named_parameters() if p.ndim >= 2}
    for name, start in beginnings.items():
        for model in drawn:
            now = dict(model.named_parameters())[name]
            assert abs(torch.corrcoef(torch.stack([start.detach().flatten(), now.detach().flatten()]))[0, 1]) < 0.5, (
                name
            )
        one, other = (dict(model.named_parameters())[name] for model in drawn)
        assert not torch.equal(one, other)
        assert now.std().item() == pytest.approx(start.std().item(), rel=0.5)


def averaged(model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and an average that is another in every number."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights, {name: 2 * p + 1 for name, p in weights.items()}


def inheriting(model: Model, spec: ModelSpec, **options: Any) -> tuple[Any, Any, Any]:
    """Readers of the grown model: with new parts from the average, without, and of the average by itself."""
    weights, average = averaged(model)
    read = lambda kind, name: (average if kind == "ema" else weights)[name]  # noqa: E731
    mixed, plain = (grown(plan_growth(model.spec, spec, 3, **how, **options), read) for how in ({"inherit": "ema"}, {}))
    return (lambda n: mixed("model", n)), (lambda n: plain("model", n)), (lambda n: plain("ema", n))


def test_new_blocks_inherit_the_average_and_the_function_stays() -> None:
    model = perturbed(SPEC)
    spec = SPEC.grown({"image.depth": 3, "captioner.depth": 1})
    mixed, plain, average = inheriting(model, spec)
    assert all(operator.preserves for operator in plan_growth(SPEC, spec, inherit="ema"))
    deep = build(spec, 9).double()
    changed = set()
    with torch.no_grad():
        for name, p in deep.named_parameters():
            p.copy_(mixed(name))
            new = name.startswith(("image.transformer.blocks.1.", "captioner."))
            assert torch.equal(p, (average if new else plain)(name)), name
            changed |= {name} if not torch.equal(p, plain(name)) else set()
    assert apart(model, deep) < 1e-12
    assert "image.transformer.blocks.1.mlp.up.weight" in changed
    assert "image.transformer.blocks.1.mlp.down.weight" not in changed  # it starts at zero either way


def test_new_channels_inherit_the_average_quadrant_by_quadrant() -> None:
    model = perturbed(SPEC)
    spec = SPEC.grown({"image.width": 24, "text.head_dim": 6, "text.mlp_ratio": 5.0})
    mixed, *_ = inheriting(model, spec, width_init="duplicate")
    assert not plan_growth(SPEC, spec, inherit="ema")[-1].preserves
    weights, average = averaged(model)
    name = "image.patches.weight"
    assert torch.equal(mixed(name), torch.cat([weights[name], average[name]]))
    name = "image.projection.weight"
    assert torch.allclose(mixed(name), torch.cat([weights[name], average[name]], 1) / 2)
    name = "image.transformer.blocks.0.attention.out.weight"
    old, new = weights[name] / 2, average[name] / 2
    assert torch.allclose(mixed(name), torch.cat([torch.cat([old, new], 1), torch.cat([new, new], 1)]))
    name = "text.transformer.blocks.0.attention.value.bias"  # two heads of 4 channels become heads of 6
    old, new = weights[name], average[name]
    assert torch.equal(mixed(name), torch.cat([old[:4], new[:2], old[4:], new[4:6]]))
    name = "text.transformer.blocks.0.mlp.up.bias"
    assert torch.equal(mixed(name), torch.cat([weights[name], average[name][:8]]))
    for name in ("text.token_embedding.weight", "text.transformer.norm.weight", "logit_scale"):
        assert torch.equal(mixed(name), weights[name])


def test_a_wider_modality_inherits_the_average_in_its_new_channels_alone() -> None:
    model = perturbed(SPEC.grown(HEARING))
    mixed, plain, average = inheriting(model, model.spec.grown({"modalities.audio.width": 24}))
    name = "modalities.audio.position_embedding"
    assert torch.equal(mixed(name)[:, :12], plain(name)[:, :12])
    assert torch.equal(mixed(name)[:, 12:], average(name)[:, 12:])
    assert not torch.equal(average(name), plain(name))


def test_no_part_can_be_removed() -> None:
    with pytest.raises(SpecError, match=r"shrink: modalities\.audio is missing, and no part can be removed"):
        plan_growth(SPEC.grown(HEARING), SPEC)
