"""From open_clip's model configs to specs and back, with the reasons if there is no equivalent.

Both directions collect all reasons before they refuse. A config is the content of a file of open_clip's
model_configs/*.json, as its `create_model` reads it (open_clip 3.3).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import ValidationError

from ..spec import CLIP_MEAN, CLIP_STD, ImageSpec, ModelSpec, TowerSpec
from ..wording import first_mistake
from .errors import InterchangeError
from .open_clip_files import Config, architectures

_END = 49407
"""the end-of-text token of CLIP's vocabulary, its largest id"""
# Switches of open_clip's blocks that have no equivalent here; they must be off.
_BLOCK_SWITCHES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# Fields that do not change what a trained model computes, or that are read below.
_TRUNK = {"layers", "width", "mlp_ratio", "ls_init_value", "act_kwargs", "norm_kwargs", "output_tokens", "pool_type"}
_TRUNK |= {"final_ln_after_pool", "block_type", *_BLOCK_SWITCHES}
_VISION = _TRUNK | {"head_width", "patch_size", "image_size", "patch_dropout", "attentional_pool", "no_ln_pre"}
_VISION |= {"attn_pooler_queries", "attn_pooler_heads", "pos_embed_type"}
_TEXT = _TRUNK | {"context_length", "vocab_size", "heads", "embed_cls", "pad_id", "eos_id", "no_causal_mask"}
_TEXT |= {"proj_bias", "proj_type", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
_DECODER = _TEXT | {"dim_head", "n_queries", "attn_pooler_heads"}
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "init_logit_scale"}
_TOP |= {"init_logit_bias", "nonscalar_logit_scale", "output_dict"}


@cache
def claimed() -> tuple[str, ...]:
    """The names of open_clip's architectures that have a spec."""
    return tuple(name for name, config in architectures().items() if not reasons_against(config))


@cache
def refused() -> dict[str, str]:
    """The names of the others, each with the reason."""
    return {name: "; ".join(why) for name, config in architectures().items() if (why := reasons_against(config))}


def config_named(name: str) -> Config:
    """The config of a claimed architecture. Raises InterchangeError with the reason for one that is not."""
    if name not in architectures():
        near = [other for other in claimed() if other.lower().startswith(name.lower()[:6])]
        raise InterchangeError(
            f"open_clip has no architecture {name!r}; names are as in its model_configs"
            + (f", for instance {', '.join(near[:4])}" if near else "")
            + "; for a model of your own give open_clip:local-dir:FOLDER, a folder with its open_clip_config.json"
        )
    if name in refused():
        raise InterchangeError(f"{name} cannot be imported: {refused()[name]}")
    return architectures()[name]


def reasons_against(config: Config) -> list[str]:
    """Why a config has no equivalent spec; empty if it has one."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if vision.get("timm_model_name"):
        return [f"its image tower is timm's {vision['timm_model_name']}, built by that package, not by open_clip"]
    if text.get("hf_model_name"):
        return [f"its text tower is Hugging Face's {text['hf_model_name']}, built by transformers, not by open_clip"]
    if isinstance(vision.get("layers"), list | tuple):
        return ["its image tower is a ResNet, not a transformer"]
    return [
        *_unknown("the config", config, _TOP),
        *_unknown("vision_cfg", vision, _VISION),
        *_unknown("text_cfg", text, _TEXT),
        *_tower_reasons("vision_cfg", vision),
        *_tower_reasons("text_cfg", text),
        *_vision_reasons(vision),
        *_text_reasons(config, text),
        *(_decoder_reasons(config, vision, text) if config.get("multimodal_cfg") else ()),
    ]


def _unknown(where: str, fields: Config, known: set[str]) -> list[str]:
    return [
        f"{where} has {key} = {value!r}, which is not supported" for key, value in fields.items() if key not in known
    ]


def _tower_reasons(where: str, fields: Config) -> list[str]:
    """Switches that `models.transformer` does not have."""
    found = [f"{where}.{key} is set" for key in _BLOCK_SWITCHES if fields.get(key)]
    if fields.get("block_type") not in (None, "default"):
        found.append(f"{where}.block_type = {fields['block_type']!r}")
    if (fields.get("act_kwargs") or {}) not in ({}, {"approximate": "tanh"}, {"approximate": "none"}):
        found.append(f"{where}.act_kwargs = {fields['act_kwargs']!r}")
    if set(fields.get("norm_kwargs") or {}) - {"eps"}:
        found.append(f"{where}.norm_kwargs = {fields['norm_kwargs']!r}")
    return found


def _vision_reasons(vision: Config) -> list[str]:
    found = []
    for key in ("image_size", "patch_size"):
        if not isinstance(vision.get(key, 224), int):
            found.append(f"vision_cfg.{key} = {vision[key]!r} is not square")
    if vision.get("pos_embed_type", "learnable") != "learnable":
        found.append(f"vision_cfg.pos_embed_type = {vision['pos_embed_type']!r}: fixed positions are not supported")
    pool = vision.get("pool_type", "tok")
    if isinstance(vision.get("attentional_pool"), str):
        found.append(f"vision_cfg.attentional_pool = {vision['attentional_pool']!r} has two poolers")
    elif pool not in ("tok", "avg") or (pool == "avg" and vision.get("attentional_pool")):
        found.append(f"vision_cfg.pool_type = {pool!r} is not supported")
    return found


def _text_reasons(config: Config, text: Config) -> list[str]:
    found = []
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "first", "last"):
        found.append(f"text_cfg.pool_type = {pool!r} is not supported")
    if pool == "eos" and not text.get("hf_tokenizer_name") and text.get("eos_id", 2) != _END:
        found.append(f"text_cfg.eos_id = {text.get('eos_id', 2)} is not the end-of-text token of CLIP's tokenizer")
    if text.get("proj_type", "linear") != "linear":
        found.append(f"text_cfg.proj_type = {text['proj_type']!r}: only linear is supported")
    if text.get("pad_id", 0) != 0:
        found.append(f"text_cfg.pad_id = {text['pad_id']}: only 0 is supported")
    if "mt5" in (text.get("hf_tokenizer_name") or ""):
        found.append(
            f"its tokenizer {text['hf_tokenizer_name']} begins texts without a start token, which is not supported"
        )
    if text.get("embed_cls") and (text.get("no_causal_mask") or not config.get("custom_text")):
        found.append("text_cfg.embed_cls without CoCa's causal mask")
    return found


def _decoder_reasons(config: Config, vision: Config, text: Config) -> list[str]:
    """A decoder that differs from its text tower: the captioner continues the text tower's stream with its settings."""
    decoder = config["multimodal_cfg"]
    found = _unknown("multimodal_cfg", decoder, _DECODER)
    defaults = {"width": (512, 512), "heads": (8, 8), "ls_init_value": (None, None)}
    for key, (own, other) in defaults.items():
        if decoder.get(key, own) != text.get(key, other):
            found.append(f"multimodal_cfg.{key} is {decoder.get(key, own)}, text_cfg.{key} {text.get(key, other)}")
    memory = config["embed_dim"] if vision.get("attentional_pool") else vision.get("width", 768)
    if memory != decoder.get("width", 512):
        found.append(f"image tokens of {memory} channels for a decoder of {decoder.get('width', 512)}")
    if text.get("mlp_ratio", 4.0) != 4.0:
        found.append(f"text_cfg.mlp_ratio = {text['mlp_ratio']}, and its decoder always has 4")
    if text.get("act_kwargs") or text.get("norm_kwargs"):
        found.append("text_cfg has act_kwargs or norm_kwargs, and its decoder takes none")
    if text.get("no_causal_mask") or text.get("pool_type") == "last":
        found.append("a decoder on a text tower that pads texts")
    if vision.get("final_ln_after_pool") and vision.get("pool_type", "tok") == "tok":
        found.append("a decoder that reads image tokens without the norm of the class token")
    return found


def spec_of(
    config: Config,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    resize: str = "crop",
    interpolation: str = "bicubic",
) -> ModelSpec:
    """The spec that computes what a config of open_clip does, on pictures normalised by `mean` and `std`.

    Raises InterchangeError with all reasons if there is none.
    """
    try:
        why = reasons_against(config)
        if not why:
            return ModelSpec.model_validate(_tree(config, mean, std, resize, interpolation))
    except ValidationError as error:
        raise InterchangeError(f"this config does not give a valid model: {first_mistake(error)}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # fields of a wrong type
        raise InterchangeError(f"this config does not give a valid model ({type(error).__name__}: {error})") from None
    raise InterchangeError(f"this config cannot be imported: {'; '.join(why)}")


def _tree(
    config: Config, mean: tuple[float, ...], std: tuple[float, ...], resize: str, interpolation: str
) -> dict[str, Any]:
    """The spec of a config, as plain data."""
    quick = bool(config.get("quick_gelu"))
    vision, text = config["vision_cfg"], config["text_cfg"]
    width = vision.get("width", 768)
    pooler = bool(vision.get("attentional_pool"))
    average = vision.get("pool_type", "tok") == "avg"
    image = _trunk(vision, width, quick) | {
        "heads": width // vision.get("head_width", 64),
        "patch": vision.get("patch_size", 16),
        "resolution": vision.get("image_size", 224),
        "patch_bias": False,
        "class_token": True,
        "pre_norm": not vision.get("no_ln_pre"),
        "pool": "attention" if pooler else "mean" if average else "class",
        "norm_after_pool": average and bool(vision.get("final_ln_after_pool")),
        "mean": mean,
        "std": std,
        "resize": resize,
        "interpolation": interpolation,
    }
    if pooler:
        image |= {"queries": vision.get("attn_pooler_queries", 256), "pool_heads": vision.get("attn_pooler_heads", 8)}
    pool = {"argmax": "end", "eos": "end"}.get(text.get("pool_type", "argmax"), text.get("pool_type", "argmax"))
    words = _trunk(text, text.get("width", 512), quick) | {
        "heads": text.get("heads", 8),
        "context": text.get("context_length", 77),
        "vocabulary": text.get("vocab_size", 49408),
        "causal": not text.get("no_causal_mask"),
        "pool": "class" if text.get("embed_cls") else pool,
        "projection_bias": bool(text.get("proj_bias")),
    }
    decoder = config.get("multimodal_cfg")
    blocks = (
        {"depth": decoder.get("layers", 12), "cross_attention": "after", "tied_embeddings": False} if decoder else {}
    )
    bias = config.get("init_logit_bias") is not None
    return {
        "embed_dim": config["embed_dim"],
        "image": image,
        "text": words,
        "captioner": blocks or None,
        "logit_bias": bias,
    }


def _trunk(fields: Config, width: int, quick: bool) -> dict[str, Any]:
    """Fields that both towers have."""
    hidden = int(width * fields.get("mlp_ratio", 4.0))
    tanh = (fields.get("act_kwargs") or {}).get("approximate") == "tanh"
    return {
        "width": width,
        "depth": fields.get("layers", 12),
        "mlp_ratio": hidden / width,
        "mlp": "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu",
        "layer_scale": fields.get("ls_init_value"),
        "norm_eps": (fields.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def config_of(spec: ModelSpec, tokenizer: Config | None = None) -> dict[str, Any]:
    """The config with which open_clip builds a model that computes what `spec` does.

    `tokenizer` are the fields of text_cfg that name a tokenizer and its end-of-text token; None: CLIP's. Raises
    InterchangeError with everything that has no equivalent in open_clip.
    """
    if why := reasons_against_export(spec):
        raise InterchangeError(f"this model cannot be exported to open_clip: {'; '.join(why)}")
    image, text = spec.image, spec.text
    vision: dict[str, Any] = {"image_size": image.resolution, "patch_size": image.patch, **_their_trunk(image)}
    vision |= {"head_width": image.head_width} if image.head_width != 64 else {}
    vision |= {} if image.pre_norm else {"no_ln_pre": True}
    if image.pool == "mean":
        vision |= {"pool_type": "avg"} | ({"final_ln_after_pool": True} if image.norm_after_pool else {})
    if image.pool == "attention":
        vision |= {"attentional_pool": True, "attn_pooler_heads": image.pool_heads}
        vision |= {"attn_pooler_queries": image.queries} if image.queries != 256 else {}
    theirs = {"context_length": text.context, "vocab_size": text.vocabulary, **(tokenizer or {}), **_their_trunk(text)}
    theirs["heads"] = text.heads
    theirs |= {} if text.causal else {"no_causal_mask": True}
    theirs |= {"pool_type": text.pool} if text.pool in ("first", "last") else {}
    theirs |= {"embed_cls": True} if text.pool == "class" else {}
    theirs |= {"proj_bias": True} if text.projection_bias else {}
    config: dict[str, Any] = {"embed_dim": spec.embed_dim, "vision_cfg": vision, "text_cfg": theirs}
    config |= {"quick_gelu": True} if image.mlp == "quick_gelu" else {}
    config |= {"init_logit_bias": -10.0} if spec.logit_bias else {}
    if text.pool == "class" or spec.captioner:
        config["custom_text"] = True
    if spec.captioner:
        vision["output_tokens"] = theirs["output_tokens"] = True
        decoder = {key: theirs[key] for key in ("context_length", "vocab_size", "width", "heads")}
        gain = {"ls_init_value": text.layer_scale} if text.layer_scale is not None else {}
        config["multimodal_cfg"] = {**decoder, "layers": spec.captioner.depth, **gain}
    return config


def _their_trunk(tower: TowerSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"width": tower.width, "layers": tower.depth}
    if tower.mlp_width != 4 * tower.width:
        ratio = tower.mlp_width / tower.width
        # open_clip truncates where `mlp_width` rounds: half a unit more gives the same number there.
        found["mlp_ratio"] = ratio if int(tower.width * ratio) == tower.mlp_width else ratio + 0.5 / tower.width
    found |= {"ls_init_value": tower.layer_scale} if tower.layer_scale is not None else {}
    found |= {"norm_kwargs": {"eps": tower.norm_eps}} if tower.norm_eps != 1e-5 else {}
    return found | ({"act_kwargs": {"approximate": "tanh"}} if tower.mlp == "gelu_tanh" else {})


def reasons_against_export(spec: ModelSpec) -> list[str]:
    """What of a spec has no equivalent in open_clip, each with field, value and reason; empty if everything has."""
    found = [*_tower_limits("image", spec.image), *_tower_limits("text", spec.text)]
    found += _image_limits(spec.image)
    if spec.shared:
        found.append("shared: open_clip has no shared blocks")
    found += [f"modalities.{name}: open_clip has no towers of other modalities" for name in spec.modalities]
    if ("quick_gelu" in (spec.image.mlp, spec.text.mlp)) and spec.image.mlp != spec.text.mlp:
        found.append(
            f"image.mlp = {spec.image.mlp} and text.mlp = {spec.text.mlp}: open_clip has one switch for both towers"
        )
    if spec.captioner:
        found += _caption_limits(spec)
    return found


def _tower_limits(name: str, tower: TowerSpec) -> list[str]:
    found = []
    if tower.experts > 1:
        found.append(f"{name}.experts = {tower.experts}: open_clip has no mixture of experts")
    if tower.mlp == "swiglu":
        found.append(f"{name}.mlp = swiglu: open_clip has no gated MLP")
    if tower.attention_width != tower.width:
        found.append(
            f"{name}.heads = {tower.heads} of {tower.head_width} channels on {name}.width = {tower.width}: "
            f"in open_clip all heads together are as wide as the stream"
        )
    return found


def _image_limits(image: ImageSpec) -> list[str]:
    found = []
    if not image.class_token:
        found.append("image.class_token = false: open_clip's image towers always have a class token")
    if image.patch_bias:
        found.append("image.patch_bias = true: open_clip's patch embedding has no bias")
    return found


def _caption_limits(spec: ModelSpec) -> list[str]:
    assert spec.captioner
    found, text = [], spec.text
    if spec.captioner.cross_attention != "after":
        found.append(
            "captioner.cross_attention = inside: open_clip's decoder attends to the picture after a whole block"
        )
    if spec.memory_width != text.width:
        found.append(
            f"image tokens of {spec.memory_width} channels for a decoder of text.width = {text.width}: "
            f"in open_clip both widths are equal"
        )
    if text.mlp_width != 4 * text.width:
        found.append(f"text.mlp_ratio = {text.mlp_ratio} with a captioner: open_clip's decoder always has 4")
    if text.norm_eps != 1e-5 or text.mlp == "gelu_tanh":
        found.append("text.norm_eps or text.mlp with a captioner: open_clip's decoder has the defaults")
    return found
