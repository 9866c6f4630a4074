"""Growth keeps the function: in fp64 to rounding, in fp32 within 1e-5, on random specs; and it maps the moments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.models.growth.depth import Depth
from treering.models.model import Model
from treering.models.output import ModelOutput
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.tests.support.grown_models import grow, perturbed


def make(image_depth: int, text_depth: int, caption_depth: int | None) -> ModelSpec:
    return ModelSpec(
        embed_dim=12,
        image=ImageSpec(width=16, depth=image_depth, heads=2, patch=4, resolution=8),
        text=TextSpec(width=16, depth=text_depth, heads=4, context=9),
        captioner=CaptionerSpec(depth=caption_depth) if caption_depth else None,
    )


def run(model: Model) -> ModelOutput:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 9, 2])
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return model(images, torch.randint(0, 49408, (15,), generator=generator), lengths)


def logits(output: ModelOutput, model: Model) -> list[torch.Tensor]:
    image = torch.nn.functional.normalize(output.image.pooled, dim=-1)
    text = torch.nn.functional.normalize(output.text.pooled, dim=-1)
    found = [output.scale * image @ text.T, output.image.pooled, output.text.pooled]
    return found + ([output.caption @ model.text.token_embedding.weight.T] if output.caption is not None else [])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(
    small=st.tuples(st.integers(1, 3), st.integers(1, 3), st.one_of(st.none(), st.integers(1, 2))),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)),
)
@settings(max_examples=25, deadline=None)
def test_depth_keeps_the_function(dtype: torch.dtype, bound: float, small: tuple, more: tuple) -> None:
    spec = make(*small)
    targets = {"image.depth": small[0] + more[0], "text.depth": small[1] + more[1]}
    if small[2]:
        targets["captioner.depth"] = small[2] + more[2]
    model = perturbed(spec, dtype)
    larger = grow(model, targets)
    with torch.no_grad():
        for before, after in zip(logits(run(model), model), logits(run(larger), larger), strict=True):
            assert (before - after).abs().max() < bound


def test_a_copied_block_without_zeroed_writes_would_not() -> None:
    """The test above has power: leaving any write of a new block in place moves the logits far beyond its bound."""
    model = perturbed(make(2, 1, None), torch.float64)
    larger = grow(model, {"image.depth": 3})
    index = next(i for i in range(3) if Depth("image.depth", "image.transformer.blocks", 2, 3).source(i)[1])
    with torch.no_grad():
        larger.image.transformer.blocks[index].mlp.down.bias[0] += 0.05  # one channel: the norm hides a shift of all
        assert (logits(run(model), model)[0] - logits(run(larger), larger)[0]).abs().max() > 1e-6


@given(old=st.integers(1, 12), more=st.integers(0, 24))
def test_every_old_block_survives_once_and_in_order(old: int, more: int) -> None:
    operator = Depth("image.depth", "image.transformer.blocks", old, old + more)
    sources = [operator.source(i) for i in range(old + more)]
    assert [source for source, is_copy in sources if not is_copy] == list(range(old))
    assert [source for source, _ in sources] == sorted(source for source, _ in sources)
    counts = [sum(source == s for source, _ in sources) for s in range(old)]
    assert max(counts) - min(counts) <= 1


def test_moments_follow_their_rules() -> None:
    operator = Depth("image.depth", "image.transformer.blocks", 1, 2)
    ones = torch.ones(2, 2)
    original = operator.rule("image.transformer.blocks.0.mlp.down.weight")
    copied = operator.rule("image.transformer.blocks.1.mlp.down.weight")
    inner = operator.rule("image.transformer.blocks.1.attention.query.weight")
    outside = operator.rule("text.transformer.blocks.0.mlp.down.weight")
    assert copied.source == original.source == "image.transformer.blocks.0.mlp.down.weight"
    table = {
        "original": [original.apply(kind, ones).sum().item() for kind in ("model", "exp_avg", "exp_avg_sq")],
        "copied": [copied.apply(kind, ones).sum().item() for kind in ("model", "exp_avg", "exp_avg_sq")],
        "inner": [inner.apply(kind, ones).sum().item() for kind in ("model", "exp_avg", "exp_avg_sq")],
        "outside": [outside.apply(kind, ones).sum().item() for kind in ("model", "exp_avg", "exp_avg_sq")],
    }
    assert table == {"original": [4, 4, 4], "copied": [0, 0, 4], "inner": [4, 0, 4], "outside": [4, 4, 4]}


def test_the_first_gradient_reaches_what_was_zeroed() -> None:
    """A new block is not dead: its output weights move at once, its inner ones after that."""
    model = perturbed(make(1, 1, 1), torch.float64)
    larger = grow(model, {"image.depth": 2, "text.depth": 2, "captioner.depth": 2})
    sum(part.sin().sum() for part in logits(run(larger), larger)).backward()
    for stack in (larger.image, larger.text, larger.captioner):
        block = stack.transformer.blocks[1]
        assert block.mlp.down.weight.grad.abs().max() > 0
        assert block.attention.out.weight.grad.abs().max() > 0
        assert block.mlp.up.weight.grad.abs().max() == 0
