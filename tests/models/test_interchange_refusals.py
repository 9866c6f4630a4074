"""What cannot be imported from open_clip, or exported to it, is refused with the reason."""

from typing import Any

import pytest

from treering.models.interchange.architectures import (
    InterchangeError,
    config_named,
    config_of,
    reasons_against,
    spec_of,
)
from treering.models.spec import ModelSpec
from treering.tests.support.open_clip_models import small


def refusing(**changes: Any) -> dict[str, Any]:
    config = small("coca_ViT-B-32")
    for place, value in changes.items():
        part, _, key = place.partition("__")
        (config[part] if key else config)[key or part] = value
    return config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_cfg__qk_norm": True}, "vision_cfg.qk_norm is set"),
        ({"text_cfg__block_type": "custom"}, "text_cfg.block_type = 'custom'"),
        ({"vision_cfg__attentional_pool": "parallel"}, "'parallel' has two poolers"),
        ({"vision_cfg__pool_type": "avg"}, "pool_type = 'avg' is not supported"),
        ({"vision_cfg__pos_embed_type": "sin_cos_2d"}, "fixed positions are not supported"),
        ({"vision_cfg__image_size": [12, 16]}, "is not square"),
        ({"text_cfg__pad_id": 1}, "pad_id = 1: only 0"),
        ({"text_cfg__proj_type": "none"}, "only linear is supported"),
        ({"text_cfg__no_causal_mask": True}, "embed_cls without CoCa's causal mask"),
        ({"multimodal_cfg__width": 32}, "multimodal_cfg.width is 32, text_cfg.width 16"),
        ({"text_cfg__mlp_ratio": 2.0}, "its decoder always has 4"),
        ({"text_cfg__norm_kwargs": {"eps": 1e-6}}, "its decoder takes none"),
        ({"embed_dim": 24}, "image tokens of 24 channels for a decoder of 16"),
        ({"text_cfg__surprise": 1}, "text_cfg has surprise = 1, which is not supported"),
        ({"vision_cfg__act_kwargs": {"x": 1}}, "act_kwargs"),
    ],
)
def test_what_we_cannot_hold_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert any(reason in why for why in reasons_against(refusing(**changes)))
    with pytest.raises(InterchangeError, match="cannot be imported"):
        spec_of(refusing(**changes))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("vision_cfg__head_width", 0),
        ("vision_cfg__head_width", "x"),
        ("vision_cfg__layers", "x"),
        ("text_cfg__layers", -1),
        ("text_cfg__heads", 7),
        ("text_cfg", []),
        ("embed_dim", None),
        ("vision_cfg__mlp_ratio", float("nan")),
    ],
)
def test_a_config_of_odd_values_is_an_error(place: str, value: object) -> None:
    with pytest.raises(InterchangeError, match=r"this config (does not give a valid model|cannot be imported)"):
        spec_of(refusing(**{place: value}))


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        (
            "image",
            {"class_token": False, "pool": "mean"},
            "image.class_token = false: open_clip's image towers always",
        ),
        ("image", {"patch_bias": True}, "image.patch_bias = true"),
        ("image", {"experts": 4}, "image.experts = 4: open_clip has no mixture"),
        ("text", {"mlp": "swiglu"}, "text.mlp = swiglu"),
        ("text", {"heads": 4, "head_dim": 8}, "text.heads = 4 of 8 channels on text.width = 16"),
        ("text", {"mlp": "quick_gelu"}, "open_clip has one switch for both towers"),
        ("captioner", {"cross_attention": "inside"}, "open_clip's decoder attends to the picture after a whole block"),
        ("text", {"mlp_ratio": 2.0}, "open_clip's decoder always has 4"),
        ("text", {"norm_eps": 1e-6}, "open_clip's decoder has the defaults"),
        ("text", {"width": 32}, "image tokens of 16 channels for a decoder of text.width = 32"),
    ],
)
def test_what_open_clip_cannot_hold_stays(part: str, change: dict[str, Any], reason: str) -> None:
    tree = spec_of(small("coca_ViT-B-32")).model_dump()
    tree[part] |= change
    with pytest.raises(InterchangeError, match=reason):
        config_of(ModelSpec.model_validate(tree))


@pytest.mark.parametrize(
    ("part", "fields", "reason"),
    [
        ("shared", {"width": 8, "depth": 1, "heads": 1}, "open_clip has no shared blocks"),
        (
            "modalities",
            {"audio": {"width": 8, "depth": 1, "heads": 1, "features": 4}},
            r"modalities\.audio: open_clip has no towers of other modalities",
        ),
    ],
)
def test_parts_that_open_clip_does_not_have_stay(part: str, fields: dict[str, Any], reason: str) -> None:
    tree = spec_of(small("ViT-B-32") | {"vision_cfg": small("ViT-H-14-CLIPA")["vision_cfg"]}).model_dump()
    tree["image"]["norm_after_pool"] = False
    tree[part] = fields
    with pytest.raises(InterchangeError, match=reason):
        config_of(ModelSpec.model_validate(tree))


def test_unknown_and_refused_names() -> None:
    with pytest.raises(InterchangeError, match=r"no architecture 'ViT-B-33'; .* ViT-B-16"):
        config_named("ViT-B-33")
    with pytest.raises(InterchangeError, match="ViT-B-16-SigLIP cannot be imported: its image tower is timm's"):
        config_named("ViT-B-16-SigLIP")
