"""Towers against an independent dense computation in fp64: plain loops over samples, torch's own attention formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.flops import forward_flops, parameters
from treering.models.growth.axes import uses
from treering.models.model import Model, build
from treering.models.output import Extras
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, TextSpec
from treering.models.towers import _normalised
from treering.models.transformer import Attention, PackedLayout, TransformerBlock
from treering.training.engines.optimizer import decays

SPEC = ModelSpec(
    embed_dim=24,
    image=ImageSpec(width=32, depth=2, heads=4, patch=4, resolution=16),
    text=TextSpec(width=16, depth=2, heads=2, head_dim=12, context=12),
    captioner=CaptionerSpec(depth=2),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return build(SPEC, seed=1).double()


def inputs(samples: int = 5) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 3, 16, 16), dtype=torch.uint8, generator=generator)
    captions = [torch.randint(0, 49408, (3 + 2 * i % 7,), generator=generator) for i in range(samples)]
    return images, captions


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pixels_are_normalised(model: Model, dtype: torch.dtype) -> None:
    """Every byte in every channel; under autocast what it would have rounded the numbers to, but for ties."""
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 5, 3, 256)
    mean, std = (one.flatten(1) for one in (model.image_mean, model.image_std))
    truth = (pixels.double() / 255 - mean) / std
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = _normalised(pixels, mean.to(kept), std.to(kept))
    assert found.dtype == dtype
    rounding = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 2**-8}[dtype]
    assert ((found.double() - truth).abs() <= rounding * truth.abs().clamp(min=0.1)).all()


def attend(layer: Attention, x: Tensor, memory: Tensor, causal: bool) -> Tensor:
    """One sample's attention, head by head."""
    q, k, v = layer.query(x), layer.key(memory), layer.value(memory)
    size = q.shape[1] // layer.heads
    heads = []
    for h in range(layer.heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        heads.append(scores.softmax(1) @ v[:, part])
    return layer.out(torch.cat(heads, 1))


def run_block(block: TransformerBlock, x: Tensor, causal: bool, memory: Tensor | None = None) -> Tensor:
    h = block.attention_norm(x)
    x = x + attend(block.attention, h, h, causal)
    if memory is not None:
        x = x + attend(block.cross, block.cross_norm(x), memory, causal=False)
    return x + block.mlp.down(F.gelu(block.mlp.up(block.mlp_norm(x))))


def dense(model: Model, image: Tensor, caption: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image embedding, text embedding and captioner states of one pair."""
    pixels = (image.double() / 255 - model.image_mean) / model.image_std
    kernel = model.image.patches.weight.view(-1, 3, 4, 4)
    x = (
        F.conv2d(pixels[None], kernel, model.image.patches.bias, stride=4)[0].flatten(1).T
        + model.image.position_embedding
    )
    for block in model.image.transformer.blocks:
        x = run_block(block, x, causal=False)
    x = model.image.transformer.norm(x)
    t = model.text.token_embedding.weight[caption] + model.text.position_embedding[: len(caption)]
    for block in model.text.transformer.blocks:
        t = run_block(block, t, causal=True)
    t = model.text.transformer.norm(t)
    c = t
    for block in model.captioner.transformer.blocks:
        c = run_block(block, c, causal=True, memory=x)
    return model.image.projection(x.mean(0)), model.text.projection(t[-1]), model.captioner.transformer.norm(c)


def test_packed_towers_equal_one_sample_at_a_time(model: Model) -> None:
    images, captions = inputs()
    output = model(images, torch.cat(captions), torch.tensor([len(c) for c in captions]))
    start = 0
    for i, caption in enumerate(captions):
        image, text, states = dense(model, images[i], caption)
        assert (output.image.pooled[i] - image).abs().max() < 1e-12
        assert (output.text.pooled[i] - text).abs().max() < 1e-12
        assert (output.caption[start : start + len(caption)] - states).abs().max() < 1e-12
        start += len(caption)


def test_packed_gradients_equal_one_sample_at_a_time(model: Model) -> None:
    images, captions = inputs(3)
    output = model(images, torch.cat(captions), torch.tensor([len(c) for c in captions]))
    total = output.caption.sin().sum() + output.text.pooled.sin().sum() + output.image.pooled.sin().sum()
    packed = torch.autograd.grad(total, [p for n, p in model.named_parameters() if n != "logit_scale"])
    alone = sum(part.sin().sum() for i, c in enumerate(captions) for part in dense(model, images[i], c))
    expected = torch.autograd.grad(alone, [p for n, p in model.named_parameters() if n != "logit_scale"])
    for ours, theirs in zip(packed, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-10 * (1 + theirs.abs().max())


HEARING = SPEC.model_copy(
    update={
        "modalities": {
            "type": ModalitySpec(width=12, depth=2, heads=3, features=5, frames=4),  # the name of a module's method
            "an_embedding": ModalitySpec(width=8, depth=1, heads=2, features=6),
        }
    }
)


def test_modality_towers_equal_one_sample_at_a_time() -> None:
    """Frames and vectors; only the towers that have samples run, and the others compute what they did."""
    model = build(HEARING, 1).double()
    images, captions = inputs()
    tokens, lengths = torch.cat(captions), torch.tensor([len(c) for c in captions])
    samples = {"type": torch.randn(5, 4, 5).double(), "an_embedding": torch.randn(5, 6).double()}
    output = model(images, tokens, lengths, Extras(modalities=samples))
    for name, rows in samples.items():
        tower = model.modalities[name]
        for i, row in enumerate(rows):
            x = row.view(-1, row.shape[-1]) @ tower.frames.weight.T + tower.frames.bias + tower.position_embedding
            for block in tower.transformer.blocks:
                x = run_block(block, x, causal=False)
            pooled = tower.transformer.norm(x).mean(0) @ tower.projection.weight.T
            assert (output.modalities[name].pooled[i] - pooled).abs().max() < 1e-12
        assert output.modalities[name].scale.item() == pytest.approx(1 / 0.07)
        assert output.modalities[name].tokens.shape == (5 * (4 if name == "type" else 1), tower.frames.out_features)
    plain = model(images, tokens, lengths)
    assert plain.modalities == {}
    assert torch.equal(plain.text.pooled, output.text.pooled)
    assert torch.equal(plain.image.pooled, output.image.pooled)


def test_experts_of_a_tower_that_does_not_run_route_nothing() -> None:
    mixed = HEARING.modalities["type"].model_copy(update={"experts": 3})
    model = build(SPEC.model_copy(update={"modalities": {"type": mixed}}), 1)
    images, captions = inputs(2)
    arguments = images, torch.cat(captions), torch.tensor([len(c) for c in captions])
    assert model(*arguments).routing == ()
    running = Extras(modalities={"type": torch.randn(2, 4, 5)})
    assert [int(counts.sum()) for counts, _ in model(*arguments, running).routing] == [2 * 4 * 2] * mixed.depth
    assert model(*arguments).routing == ()


def test_a_name_does_not_make_a_tower_another() -> None:
    """Initialisation, decay and axes know tensors by their names; a tower's own name is none of their business."""
    stated = {"plain": ModalitySpec(width=64, depth=1, heads=2, features=48, frames=40)}
    for name in ("token_embedding", "cross", "heads", "norm", "captioner", "frames", "gate", "logit_scale"):
        spec = SPEC.model_copy(update={"modalities": stated | {name: stated["plain"]}})
        model = build(spec, 0)
        for (path, p), (other, q) in zip(
            model.modalities["plain"].named_parameters(), model.modalities[name].named_parameters(), strict=True
        ):
            paths = f"modalities.plain.{path}", f"modalities.{name}.{other}"
            assert decays(paths[0], p) == decays(paths[1], q)
            assert p.std(correction=0).item() == pytest.approx(q.std(correction=0).item(), rel=0.1), path
            ours = [use._replace(axis=use.axis.replace("plain", name)) for use in uses(paths[0])]
            assert ours == uses(paths[1])


def test_layout_round_trip() -> None:
    layout = PackedLayout.of(torch.tensor([2, 5, 1]))
    x = torch.randn(8, 3, 4)
    assert torch.equal(layout.flat(layout.grid(x)), x)
    assert layout.positions_t.tolist() == [0, 1, 0, 1, 2, 3, 4, 0]


def test_build_is_a_function_of_spec_and_seed() -> None:
    one, two, other = (dict(build(SPEC, seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["image.patches.weight"], other["image.patches.weight"])
    deeper = dict(build(SPEC.grown({"image.depth": 3}), 3).named_parameters())
    assert torch.equal(one["text.token_embedding.weight"], deeper["text.token_embedding.weight"])


def test_logit_scale_is_bounded_and_has_a_dimension(model: Model) -> None:
    assert model.logit_scale.shape == (1,)
    fresh = build(SPEC, 0)
    assert fresh.scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        fresh.logit_scale.fill_(9.0)
    assert fresh.scale().item() == pytest.approx(100.0)


CLASSED = HEARING.model_copy(
    update={"captioner": None, "image": SPEC.image.model_copy(update={"class_token": True, "pool": "class"})}
)


def test_what_is_read_at_one_token_needs_no_other_in_its_last_block() -> None:
    """Embeddings and every gradient are those of the towers that compute all tokens; and it is less work."""
    images, captions = inputs()
    batch = images, torch.cat(captions), torch.tensor([len(caption) for caption in captions])
    weights = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def results(extras: Extras) -> list[Tensor]:
        model = build(CLASSED, seed=1).double()
        output = model(*batch, extras)
        ((output.image.pooled + output.text.pooled) * weights).sum().backward()
        named = dict(model.named_parameters()).items()
        return [output.image.pooled, output.text.pooled, *(p.grad for name, p in named if p.grad is not None)]

    pruned, whole = results(Extras()), results(Extras(tokens=True))
    assert len(pruned) == len(whole)
    for one, other in zip(pruned, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert len(build(CLASSED, 1)(*batch).image.tokens) == 0
    assert forward_flops(CLASSED, 9.0) < forward_flops(CLASSED, 9.0, tokens=True)


@pytest.mark.parametrize("tokens", [False, True], ids=["embeddings", "tokens"])
@pytest.mark.parametrize("spec", [HEARING, HEARING.model_copy(update={"captioner": None}), CLASSED])
def test_flops_against_torchs_counter(spec: ModelSpec, tokens: bool) -> None:
    """torch counts every matrix product it runs; ours come from the spec. Captions of one length: nothing is padded."""
    from torch.utils.flop_counter import FlopCounterMode

    fresh, samples, length = build(spec, 0), 6, 9
    images = torch.zeros(samples, 3, 16, 16, dtype=torch.uint8)
    ids = torch.zeros(samples * length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        modalities = {"type": torch.zeros(samples, 4, 5), "an_embedding": torch.zeros(samples, 6)}
        fresh(images, ids, torch.full((samples,), length), Extras(tokens=tokens, modalities=modalities))
    head = 2 * (length - 1) * spec.text.width * spec.text.vocabulary if spec.captioner else 0
    ours = samples * (forward_flops(spec, length, tokens=tokens) - head)
    # torch counts the half of causal attention that the mask throws away; we do not. A last block that works for the
    # last token only throws nothing away.
    pruned = spec.captioner is None and not tokens
    blocks = spec.text.depth - pruned + (spec.captioner.depth if spec.captioner else 0)
    masked = samples * blocks * 4 * length * (length - (length + 1) / 2) * spec.text.attention_width
    assert ours + masked == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize(
    "spec", [SPEC, SPEC.model_copy(update={"captioner": None}), SPEC.grown({"text.depth": 5}), HEARING]
)
def test_parameters_are_counted_exactly(spec: ModelSpec) -> None:
    with torch.device("meta"):
        assert parameters(spec) == sum(p.numel() for p in Model(spec).parameters())
