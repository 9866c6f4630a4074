"""Specs check themselves, with the remedy in the message."""

import pytest
from pydantic import ValidationError

from treering.models.growth.plan import changes, plan_growth
from treering.models.spec import ImageSpec, ModalitySpec, ModelSpec, SpecError, TextSpec

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
        ({"image.dpeth": 4}, "the model has no such size, the nearest is image.depth; it has embed_dim, image.width"),
        ({"audio.depth": 4}, "no such size"),
        ({"modalities.audio.depht": 4}, "no such size, the nearest is modalities.audio.depth;"),
        ({"modalities.au-dio.depth": 4}, "no such size"),
        ({"modalities.text.depth": 4}, "no such size"),
        ({"modalities.audio.norm_eps": 1}, "no such size"),
        ({"modalities.audio.depth": 4}, r"does not give a valid model: modalities\.audio\.width is missing; add it"),
        ({"caption.width": 4}, "no such size"),
        ({"image.norm_eps": 1}, "no such size"),
        ({"image.depth.x": 4}, "no such size"),
        ({"image.heads": 5}, "does not divide width"),
    ],
)
def test_impossible_targets_are_refused(targets: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SPEC.grown(targets)


def test_heads_follow_the_width_and_keep_their_channels() -> None:
    grown = SPEC.grown({"image.width": 96})
    assert (grown.image.heads, grown.image.attention_width) == (3 * SPEC.image.heads, 96)
    assert SPEC.grown({"image.width": 96, "image.heads": grown.image.heads}) == grown


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"image.width": 70}, r"image.width = 70 is not a whole number of heads of 8 .* set image.width: 72, or set"),
        ({"image.width": 90}, r"image.width = 90 is not a whole number of heads of 8 .* set image.width: 88, or set"),
        ({"image.patch": 8}, r"image.patch = 8 leaves 2 patches a side of 4; set image.resolution: 32 with it"),
        (
            {"image.heads": 8},
            r"image.heads = 8 at image.width = 32 makes heads of 4 channels, and a head keeps its 8; "
            r"set image.heads: 4",
        ),
    ],
)
def test_growth_that_no_operator_makes_is_refused(targets: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        plan_growth(SPEC, SPEC.grown(targets))


def test_a_captioner_keeps_the_text_tower_to_whole_factors() -> None:
    captioning = SPEC.grown({"captioner.depth": 1})
    with pytest.raises(SpecError, match=r"24 is not a multiple of 16, and with a captioner .* text.width: 32"):
        captioning.grown({"text.width": 24})
    assert captioning.grown({"image.width": 48}).image.norm_eps == pytest.approx(1e-5 * 32 / 48)
    assert SPEC.grown({"text.width": 24, "captioner.depth": 1}).text.norm_eps == pytest.approx(1e-5 * 16 / 24)
    assert captioning.grown({"text.width": 32}).text.norm_eps == 1e-5


def test_shrinking_has_a_word_of_its_own() -> None:
    smaller = SPEC.shrunk({"text.depth": 2, "image.width": 16})
    assert (smaller.text.depth, smaller.image.width, smaller.image.heads) == (2, 16, 2)
    with pytest.raises(SpecError, match=r"shrink: text.depth = 4 is larger than the model's 3; .* write it under grow"):
        SPEC.shrunk({"text.depth": 4})
    with pytest.raises(SpecError, match=r"grow: text.depth = 2 is smaller .* write it under shrink"):
        SPEC.grown({"text.depth": 2})
    with pytest.raises(SpecError, match=r"shrink: captioner.depth = 1: the model has no such size"):
        SPEC.shrunk({"captioner.depth": 1})
    wide = SPEC.grown({"image.head_dim": 16})
    with pytest.raises(SpecError, match=r"makes heads of 8 channels, and a head keeps its 16"):
        changes(wide, wide.shrunk({"image.head_dim": 8}))


AUDIO = {
    "modalities.audio.width": 12,
    "modalities.audio.depth": 1,
    "modalities.audio.heads": 3,
    "modalities.audio.features": 5,
}


def test_a_modality_tower_is_grown_into_being() -> None:
    heard = SPEC.grown(AUDIO)
    assert heard.modalities == {"audio": ModalitySpec(width=12, depth=1, heads=3, features=5)}
    assert heard.image == SPEC.image
    assert changes(SPEC, heard)["modalities.audio.width"] == (0, 12)
    larger = heard.grown({"modalities.audio.width": 20, "modalities.audio.depth": 4})
    assert (larger.modalities["audio"].heads, larger.modalities["audio"].depth) == (5, 4)
    assert larger.modalities["audio"].norm_eps == pytest.approx(1e-5 * 12 / 20)
    assert larger.shrunk({"modalities.audio.depth": 1}).modalities["audio"].depth == 1
    with pytest.raises(SpecError, match=r"modalities\.audio\.width = 14 is not a whole number of heads of 4"):
        heard.grown({"modalities.audio.width": 14})
    with pytest.raises(SpecError, match=r"shrink: modalities.audio.depth = 1: the model has no such size"):
        SPEC.shrunk({"modalities.audio.depth": 1})


@pytest.mark.parametrize("size", ["frames", "features"])
def test_a_modality_tower_keeps_the_shape_of_its_samples(size: str) -> None:
    heard = SPEC.grown(AUDIO)
    with pytest.raises(SpecError, match=r"does not fit the samples of its data column.* leave them at 1 and 5"):
        plan_growth(heard, heard.grown({f"modalities.audio.{size}": 9}))


@pytest.mark.parametrize("name", ["", "a/b", "Audio", "a.b", "audio\n", "x" * 40])
def test_names_of_towers_are_checked(name: str) -> None:
    tower = ModalitySpec(width=8, depth=1, heads=2, features=3)
    with pytest.raises(ValidationError, match="is not a valid name; use that of a data column"):
        ModelSpec(embed_dim=8, image=SPEC.image, text=SPEC.text, modalities={name: tower})
    with pytest.raises(ValidationError, match="the model already has a tower called image"):
        ModelSpec(embed_dim=8, image=SPEC.image, text=SPEC.text, modalities={"image": tower})
