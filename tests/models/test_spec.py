"""Specs check themselves, with the remedy in the message."""

import pytest
from pydantic import ValidationError

from treering.models.growth.plan import changes, plan_growth
from treering.models.spec import ImageSpec, ModelSpec, SpecError, TextSpec

SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=32, depth=2, heads=4, patch=4, resolution=16),
    text=TextSpec(width=16, depth=3, heads=2),
)


def test_heads_must_divide_width_unless_head_dim_is_given() -> None:
    with pytest.raises(ValidationError, match="heads = 5 does not divide width = 32; set heads: 4"):
        ImageSpec(width=32, depth=2, heads=5, patch=4, resolution=16)
    assert ImageSpec(width=32, depth=2, heads=5, head_dim=8, patch=4, resolution=16).attention_width == 40


def test_patch_must_divide_resolution() -> None:
    with pytest.raises(ValidationError, match="set resolution: 15 or 18"):
        ImageSpec(width=32, depth=2, heads=4, patch=3, resolution=16)


def test_growth_targets() -> None:
    grown = SPEC.grown({"image.depth": 5})
    assert grown.image.depth == 5
    assert grown.text == SPEC.text
    assert changes(SPEC, grown) == {"image.depth": (2, 5)}
    assert plan_growth(SPEC, SPEC) == []


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"image.depth": 1}, "smaller than the model's 2; set image.depth: 2 or more"),
        ({"image.dpeth": 4}, "the model has no such size; it has embed_dim, image.width"),
        ({"audio.depth": 4}, "no such size"),
        ({"caption.depth": 4}, "no such size"),
        ({"image.depth.x": 4}, "no such size"),
        ({"image.heads": 5}, "does not divide width"),
    ],
)
def test_impossible_targets_are_refused(targets: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SPEC.grown(targets)


def test_sizes_without_an_operator_are_refused() -> None:
    with pytest.raises(
        SpecError, match=r"image.width = 64: it cannot grow from 32 yet; what can: image.depth, text.depth"
    ):
        plan_growth(SPEC, SPEC.grown({"image.width": 64}))
