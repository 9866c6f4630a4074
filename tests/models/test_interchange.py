"""Interchange against open_clip's own models: logits, caption logits and bits, for every architecture that is claimed.

Copies of the configs with small sizes keep every switch; the slow test runs the full sizes that fit in 8 GB.
"""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from treering.models.decoding import Decoder
from treering.models.flops import parameters
from treering.models.growth.axes import uses
from treering.models.growth.operator import grown
from treering.models.growth.plan import plan_growth
from treering.models.interchange.architectures import (
    InterchangeError,
    architectures,
    claimed,
    config_named,
    config_of,
    refused,
    spec_of,
)
from treering.models.interchange.weights import from_open_clip, to_open_clip
from treering.models.model import Model, build
from treering.models.spec import ModelSpec, SpecError
from treering.tests.support.open_clip_models import CONTEXT, VOCABULARY, small, their_model

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COCA = [name for name in claimed() if name.startswith("coca")]


def our_model(spec: ModelSpec, tensors: dict[str, torch.Tensor]) -> Model:
    model = build(spec, 1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model


def inputs(spec: ModelSpec, end: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Pictures, and texts: a short one, one with token 0 inside, one that is one token short, one that is full."""
    generator = torch.Generator().manual_seed(3)
    side, n = spec.image.resolution, spec.text.context
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=generator)
    inner = [torch.randint(3, 80, (size,), generator=generator).tolist() for size in (2, 4, n - 3, n - 2)]
    inner[1][2] = 0
    return images, [[80, *ids, end] for ids in inner]


@torch.no_grad()
def their_logits(model: torch.nn.Module, spec: ModelSpec, images: torch.Tensor, texts: list[list[int]]) -> list:
    pixels = (images / 255 - torch.tensor(spec.image.mean).view(3, 1, 1)) / torch.tensor(spec.image.std).view(3, 1, 1)
    ids = torch.tensor([text + [0] * (spec.text.context - len(text)) for text in texts])
    image, text = (F.normalize(x, dim=-1) for x in (model.encode_image(pixels), model.encode_text(ids)))
    found = [model.logit_scale.exp() * image @ text.T]
    if model.logit_bias is not None:
        found[0] += model.logit_bias
    if spec.captioner:
        logits = model(pixels, ids, output_labels=False)["logits"]
        found += [logits[i, : len(text)] for i, text in enumerate(texts)]
    return found


@torch.no_grad()
def our_logits(model: Model, images: torch.Tensor, texts: list[list[int]]) -> list:
    tokens, lengths = torch.tensor([i for text in texts for i in text]), torch.tensor([len(text) for text in texts])
    output = model(images, tokens, lengths)
    image, text = (F.normalize(x.pooled, dim=-1) for x in (output.image, output.text))
    found = [output.scale * image @ text.T + (0 if output.bias is None else output.bias)]
    if output.caption is not None:
        found += list((output.caption @ model.output_table.T).split(lengths.tolist()))
    return found


def worst(one: list, other: list) -> float:
    assert [x.shape for x in one] == [x.shape for x in other]
    return max((x - y).abs().max().item() for x, y in zip(one, other, strict=True))


def end_of(config: dict[str, Any]) -> int:
    text = config["text_cfg"]
    return text["eos_id"] if text.get("pool_type") == "eos" else text["vocab_size"] - 1


def grow(model: Model, targets: dict[str, int]) -> Model:
    old = dict(model.named_parameters())
    spec = model.spec.grown(targets)
    read = grown(plan_growth(model.spec, spec), lambda kind, name: old[name].detach())
    with torch.device("meta"):
        names = [name for name, _ in Model(spec).named_parameters()]
    return our_model(spec, {name: read("model", name) for name in names})


def test_the_claim() -> None:
    assert len(claimed()) == 46
    assert set(claimed()) | set(refused()) == set(architectures())
    assert not set(claimed()) & set(refused())
    reasons = {
        name: why for name, why in refused().items() if not name.startswith(("RN", "EVA", "ViTamin", "convnext"))
    }
    assert "timm's vit_base_patch16_siglip_224" in reasons["ViT-B-16-SigLIP"]
    assert "Hugging Face's roberta-base" in reasons["roberta-ViT-B-32"]
    assert "ResNet" in refused()["RN50"]


@pytest.mark.parametrize("name", claimed())
def test_there_and_back(open_clip: ModuleType, name: str) -> None:
    """Equal logits; the same bits after a way there and back; a config whose spec is the same."""
    config = small(name)
    theirs, spec = their_model(open_clip, config), spec_of(config, MEAN, STD)
    state = theirs.state_dict()
    tensors = from_open_clip(spec, state)
    ours, (images, texts) = our_model(spec, tensors), inputs(spec, end_of(config))
    assert worst(their_logits(theirs, spec, images, texts), our_logits(ours, images, texts)) < 1e-5
    back = to_open_clip(spec, tensors)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    named = ("hf_tokenizer_name", "pool_type", "eos_id") if end_of(config) < VOCABULARY - 1 else ()
    words = {key: config["text_cfg"][key] for key in named}
    again = config_of(spec, words)
    assert spec_of(again, MEAN, STD) == spec
    their_model(open_clip, again).load_state_dict(back)  # strict
    assert parameters(spec) == sum(p.numel() for p in ours.parameters())


# One of each structure: plain, quick, layer scale, mean pooling of filled texts, both CoCas.
STRUCTURES = ["ViT-B-32", "ViT-L-14-quickgelu", "ViT-M-16-alt", "ViT-H-14-CLIPA", "coca_ViT-B-32", "coca_base"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_grown_and_handed_back(open_clip: ModuleType, name: str) -> None:
    """An imported model, wider and deeper, has the same logits, and so has what open_clip builds from its export."""
    config = small(name)
    theirs, spec = their_model(open_clip, config), spec_of(config, MEAN, STD)
    ours, (images, texts) = our_model(spec, from_open_clip(spec, theirs.state_dict())), inputs(spec, end_of(config))
    targets = {"image.width": 2 * spec.image.width, "image.depth": 3, "text.depth": 5, "image.mlp_ratio": 5.0}
    if not spec.captioner:
        targets |= {"text.width": 3 * spec.text.width}
    elif spec.image.pool == "attention":
        targets |= {"captioner.depth": 3}
    else:  # the decoder reads image tokens as wide as its own stream
        targets |= {"text.width": 2 * spec.text.width, "captioner.depth": 3}
    larger = grow(ours, targets)
    expected = their_logits(theirs, spec, images, texts)
    assert worst(expected, our_logits(larger, images, texts)) < 1e-5
    handed = their_model(open_clip, config_of(larger.spec))
    handed.load_state_dict(to_open_clip(larger.spec, dict(larger.named_parameters())))
    assert worst(expected, their_logits(handed, spec, images, texts)) < 1e-5


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_tensor_knows_its_axes(name: str) -> None:
    spec = spec_of(small(name))
    sizes = {"image.width": spec.image.width, "image.heads": spec.image.attention_width, "text.width": spec.text.width}
    sizes |= {"text.heads": spec.text.attention_width, "image.mlp_width": spec.image.mlp_width}
    sizes["text.mlp_width"] = spec.text.mlp_width
    for parameter, tensor in build(spec, 0).named_parameters():
        found = uses(parameter, spec)
        assert [tensor.shape[use.dim] for use in found] == [sizes[use.axis] for use in found], parameter


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        (
            "ViT-B-32",
            {"image.width": 24},
            "with image.pre_norm only whole factors keep the function; set image.width: 32",
        ),
        ("ViT-M-16-alt", {"image.width": 24}, "with image.layer_scale only whole factors"),
        ("coca_ViT-B-32", {"image.width": 24}, "only whole factors keep the function"),
        ("coca_ViT-B-32", {"embed_dim": 32}, "the width of the attention pooler"),
        ("coca_ViT-B-32", {"image.queries": 9}, "no such size"),
        ("ViT-H-14-CLIPA", {"text.context": 12}, "pads every text to the context"),
        ("ViT-H-14-CLIPA", {"captioner.depth": 2}, "captioner needs a causal text tower"),
    ],
)
def test_growth_that_would_not_keep_the_function_is_refused(name: str, targets: dict[str, int], reason: str) -> None:
    spec = spec_of(small(name))
    with pytest.raises(SpecError, match=reason):
        plan_growth(spec, spec.grown(targets))


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32"])
def test_other_operators_on_an_imported_model(open_clip: ModuleType, name: str) -> None:
    """More heads, wider heads, a longer context, more tokens, a larger joint space; the old logits stay."""
    config = small(name)
    spec = spec_of(config)
    ours = our_model(spec, from_open_clip(spec, their_model(open_clip, config).state_dict()))
    images, texts = inputs(spec, end_of(config))
    texts = [text for text in texts if len(text) < CONTEXT]  # a full one is followed by no filling
    images = images[: len(texts)]
    targets = {"image.head_dim": 16, "text.heads": 3, "text.head_dim": 8, "text.vocabulary": VOCABULARY + 5}
    targets |= {} if spec.captioner else {"embed_dim": 20, "image.experts": 3}
    larger = grow(ours, targets)
    found = [each[..., :VOCABULARY] if i else each for i, each in enumerate(our_logits(larger, images, texts))]
    assert worst(our_logits(ours, images, texts), found) < 1e-5
    if spec.captioner:  # positions are interpolated beyond the first ones; the class token's stays
        longer = grow(ours, {"text.context": 20})
        assert torch.equal(longer.text.class_embedding, ours.text.class_embedding)


def test_growth_to_a_width_that_is_no_multiple_exports_its_eps(open_clip: ModuleType) -> None:
    config = small("ViT-B-32")
    theirs, spec = their_model(open_clip, config), spec_of(config)
    ours, (images, texts) = our_model(spec, from_open_clip(spec, theirs.state_dict())), inputs(spec, VOCABULARY - 1)
    larger = grow(ours, {"text.width": 24})
    exported = config_of(larger.spec)
    assert exported["text_cfg"]["norm_kwargs"] == {"eps": pytest.approx(1e-5 * 16 / 24)}
    handed = their_model(open_clip, exported)
    handed.load_state_dict(to_open_clip(larger.spec, dict(larger.named_parameters())))
    expected = their_logits(theirs, spec, images, texts)
    assert worst(expected, their_logits(handed, spec, images, texts)) < 1e-5


@pytest.mark.parametrize("name", [n for n in STRUCTURES if not n.startswith("coca")][:2])
def test_an_imported_dual_encoder_gets_a_captioner(open_clip: ModuleType, name: str) -> None:
    config = small(name)
    spec = spec_of(config)
    ours = our_model(spec, from_open_clip(spec, their_model(open_clip, config).state_dict()))
    images, texts = inputs(spec, end_of(config))
    captioning = grow(ours, {"captioner.depth": 2})
    assert worst(our_logits(ours, images, texts), our_logits(captioning, images, texts)[:1]) < 1e-5


@pytest.mark.parametrize("name", COCA)
def test_written_captions_follow_the_same_logits(open_clip: ModuleType, name: str) -> None:
    """Token by token with kept keys and values, against open_clip's whole forward pass; token 0 among them."""
    config = small(name)
    theirs, spec = their_model(open_clip, config), spec_of(config)
    ours = our_model(spec, from_open_clip(spec, theirs.state_dict()))
    images, texts = inputs(spec, VOCABULARY - 1)
    expected = their_logits(theirs, spec, images, texts)[1:]
    with torch.no_grad():
        for number, text in enumerate(texts):
            decoder = Decoder(ours, ours.embed_images(images[number : number + 1]), len(text))
            rows = torch.cat([decoder.next(torch.tensor([token])) for token in text])
            assert (rows - expected[number]).abs().max() < 1e-5


SIGMOID = {"init_logit_bias": -10.0}
SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
SIGLIP_TEXT |= {"act_kwargs": {"approximate": "tanh"}}
FIRST = {"no_causal_mask": True, "pool_type": "first"}
CHANGED = [
    (SIGMOID, {}, {}),
    (SIGMOID, {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}, SIGLIP_TEXT),
    ({}, {"pool_type": "avg"}, FIRST),
    ({}, {"pool_type": "avg", "no_ln_pre": True}, {"no_causal_mask": True}),
    ({}, {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 3}, {"pool_type": "last"}),
    ({}, {"ls_init_value": 0.3}, {"ls_init_value": 0.2, "mlp_ratio": 2.5}),
    ({"custom_text": True}, {"final_ln_after_pool": True}, {"embed_cls": True}),
]


@pytest.mark.parametrize(("top", "vision", "text"), CHANGED)
def test_switches_that_no_config_of_the_list_sets_together(
    open_clip: ModuleType, top: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]
) -> None:
    """SigLIP's text tower, its bias and its GELU; other poolings."""
    config = small("ViT-B-32") | top
    config["vision_cfg"] |= vision
    config["text_cfg"] |= text
    theirs, spec = their_model(open_clip, config), spec_of(config)
    ours, (images, texts) = our_model(spec, from_open_clip(spec, theirs.state_dict())), inputs(spec, VOCABULARY - 1)
    expected = their_logits(theirs, spec, images, texts)
    assert worst(expected, our_logits(ours, images, texts)) < 1e-5
    handed = their_model(open_clip, config_of(spec))
    handed.load_state_dict(to_open_clip(spec, dict(ours.named_parameters())))
    assert worst(expected, their_logits(handed, spec, images, texts)) < 1e-5
    if spec.text.pool != "class" or spec.image.pool != "class":
        return
    larger = grow(ours, {"text.width": 32, "image.width": 32, "text.depth": 3})
    assert worst(expected, our_logits(larger, images, texts)) < 1e-5


def test_checkpoints_in_other_clothes(open_clip: ModuleType) -> None:
    """Half precision, `module.` before every name, the text tower in a module or not, buffers beside the weights."""
    for name in ("ViT-B-32", "coca_ViT-B-32"):
        config = small(name)
        spec, state = spec_of(config), their_model(open_clip, config).state_dict()
        plain = from_open_clip(spec, state)
        dressed = {f"module.{key}": tensor for key, tensor in state.items()} | {"module.attn_mask": torch.ones(2)}
        assert all(torch.equal(t, plain[n]) for n, t in from_open_clip(spec, dressed).items())
        top = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection", "cls_emb")
        moved = {f"text.{key}" if key.startswith(top) else key.removeprefix("text."): t for key, t in state.items()}
        assert all(torch.equal(t, plain[n]) for n, t in from_open_clip(spec, moved).items())
        halves = from_open_clip(spec, {key: tensor.half() for key, tensor in state.items()})
        assert all(t.dtype == torch.float32 and torch.equal(t, plain[n].half().float()) for n, t in halves.items())


def test_weights_of_another_architecture_are_refused(open_clip: ModuleType) -> None:
    spec, state = spec_of(small("ViT-B-32")), their_model(open_clip, small("ViT-B-32")).state_dict()
    with pytest.raises(InterchangeError, match=r"lacks visual\.ln_pre\.weight, visual\.ln_pre\.bias"):
        from_open_clip(spec, {key: t for key, t in state.items() if "ln_pre" not in key})
    with pytest.raises(InterchangeError, match=r"also has extra"):
        from_open_clip(spec, state | {"extra": torch.ones(1)})
    with pytest.raises(InterchangeError, match=r"visual\.proj \[16, 12\] has another shape"):
        from_open_clip(spec, state | {"visual.proj": torch.ones(16, 12)})
    deeper = small("ViT-B-32")
    deeper["text_cfg"]["layers"] = 3
    with pytest.raises(InterchangeError, match=r"has transformer\.resblocks\.2\..* and 8 more"):
        from_open_clip(spec, their_model(open_clip, deeper).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", claimed())
def test_full_size(open_clip: ModuleType, name: str) -> None:
    """The architecture itself, two models of it in memory: those that fit in 8 GB."""
    config = dict(config_named(name))
    spec = spec_of(config)
    if 3 * 4 * parameters(spec) > 8 << 30:
        pytest.skip(f"{parameters(spec):,} parameters")
    theirs = their_model(open_clip, config)
    ours = our_model(spec, from_open_clip(spec, theirs.state_dict()))
    end = config["text_cfg"].get("eos_id", 2) if config["text_cfg"].get("pool_type") == "eos" else 49407
    images, texts = inputs(spec, min(end, spec.text.vocabulary - 1))
    assert worst(their_logits(theirs, spec, images[:2], texts[:2]), our_logits(ours, images[:2], texts[:2])) < 1e-5


def test_a_config_costs_no_more_than_its_file_holds(open_clip: ModuleType) -> None:
    """A million blocks are refused before anything is made for each of them."""
    config, state = small("ViT-B-32"), their_model(open_clip, small("ViT-B-32")).state_dict()
    config["vision_cfg"]["layers"] = 1_000_000
    with pytest.raises(InterchangeError, match=r"it has 1,000,00\d blocks, and the file \d+ tensors"):
        from_open_clip(spec_of(config), state)
