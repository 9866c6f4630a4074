"""open_clip's configs and our specs: what of the one the other can say, and the reason where it cannot.

Both directions collect every reason before they refuse, so that a message names all that stands in the way. A config is
the dictionary of open_clip's model_configs/*.json, as its `create_model` understands it (open_clip 3.3).
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import ValidationError

from ..spec import CLIP_MEAN, CLIP_STD, ImageSpec, ModelSpec, TowerSpec
from .errors import InterchangeError
from .open_clip_files import Config, architectures

_END = 49407
"""the id that ends a text in CLIP's vocabulary, its largest"""
# Fields of their towers that change what is computed and that we have nothing for, unless they are as here.
_BLOCK_SWITCHES = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
# Fields that change nothing of what a trained model computes, or are read where they matter.
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
    """The names of open_clip's list that are ours as well."""
    return tuple(name for name, config in architectures().items() if not reasons_against(config))


@cache
def refused() -> dict[str, str]:
    """The other names of open_clip's list, each with the reason."""
    return {name: "; ".join(why) for name, config in architectures().items() if (why := reasons_against(config))}


def config_named(name: str) -> Config:
    """The config of a claimed architecture. Raises InterchangeError with the reason for one that is not."""
    if name not in architectures():
        near = [other for other in claimed() if other.lower().startswith(name.lower()[:6])]
        raise InterchangeError(
            f"open_clip has no architecture {name!r}; names are as in its model_configs"
            + (f", for instance {', '.join(near[:4])}" if near else "")
        )
    if name in refused():
        raise InterchangeError(f"{name} cannot be taken over: {refused()[name]}")
    return architectures()[name]


def reasons_against(config: Config) -> list[str]:
    """Why a config has no spec of ours; empty if it has one."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if vision.get("timm_model_name"):
        return [f"its image tower is timm's {vision['timm_model_name']}, built by that package, not by open_clip"]
    if text.get("hf_model_name"):
        return [f"its text tower is Hugging Face's {text['hf_model_name']}, built by transformers, not by open_clip"]
    if isinstance(vision.get("layers"), list | tuple):
        return ["its image tower is a ResNet, which has no blocks that could grow"]
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
        f"{where} has {key} = {value!r}, which is not known here" for key, value in fields.items() if key not in known
    ]


def _tower_reasons(where: str, fields: Config) -> list[str]:
    """What no transformer of ours has."""
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
            found.append(f"vision_cfg.{key} = {vision[key]!r} is no square")
    if vision.get("pos_embed_type", "learnable") != "learnable":
        found.append(
            f"vision_cfg.pos_embed_type = {vision['pos_embed_type']!r}: its positions are fixed, ours are learnt"
        )
    pool = vision.get("pool_type", "tok")
    if isinstance(vision.get("attentional_pool"), str):
        found.append(f"vision_cfg.attentional_pool = {vision['attentional_pool']!r} has two poolers")
    elif pool not in ("tok", "avg") or (pool == "avg" and vision.get("attentional_pool")):
        found.append(f"vision_cfg.pool_type = {pool!r} is not one of ours here")
    return found


def _text_reasons(config: Config, text: Config) -> list[str]:
    found = []
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos", "first", "last"):
        found.append(f"text_cfg.pool_type = {pool!r} is not one of ours")
    if pool == "eos" and not text.get("hf_tokenizer_name") and text.get("eos_id", 2) != _END:
        found.append(f"text_cfg.eos_id = {text.get('eos_id', 2)} does not end a text of CLIP's tokenizer")
    if text.get("proj_type", "linear") != "linear":
        found.append(f"text_cfg.proj_type = {text['proj_type']!r}: our towers end in a map to the joint space")
    if text.get("pad_id", 0) != 0:
        found.append(f"text_cfg.pad_id = {text['pad_id']}: texts are filled with 0 here")
    if "mt5" in (text.get("hf_tokenizer_name") or ""):
        found.append(f"its tokenizer {text['hf_tokenizer_name']} begins a text with no token, and ours always do")
    if text.get("embed_cls") and (text.get("no_causal_mask") or not config.get("custom_text")):
        found.append("text_cfg.embed_cls without CoCa's causal mask")
    return found


def _decoder_reasons(config: Config, vision: Config, text: Config) -> list[str]:
    """A decoder of another shape than its text tower: ours goes on with the text tower's stream and settings."""
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
        found.append("a decoder on a text tower that reads filled texts")
    if vision.get("final_ln_after_pool") and vision.get("pool_type", "tok") == "tok":
        found.append("a decoder that reads image tokens without the norm that the class token has")
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
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InterchangeError(f"this config makes no model: {place}: {first['msg']}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # fields of another type
        raise InterchangeError(f"this config makes no model ({type(error).__name__}: {error})") from None
    raise InterchangeError(f"this config cannot be taken over: {'; '.join(why)}")


def _tree(
    config: Config, mean: tuple[float, ...], std: tuple[float, ...], resize: str, interpolation: str
) -> dict[str, Any]:
    """The spec of a config that has one, as plain data."""
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
    caption = {"depth": decoder.get("layers", 12), "cross": "after", "tied": False} if decoder else None
    bias = config.get("init_logit_bias") is not None
    return {"embed_dim": config["embed_dim"], "image": image, "text": words, "caption": caption, "logit_bias": bias}


def _trunk(fields: Config, width: int, quick: bool) -> dict[str, Any]:
    """What both towers have."""
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


def config_of(spec: ModelSpec, words: Config | None = None) -> dict[str, Any]:
    """The config with which open_clip builds a model that computes what `spec` does; `words` are fields of text_cfg
    that name its tokenizer and its end of a text, left out for CLIP's.

    Raises InterchangeError with everything that open_clip cannot hold.
    """
    if why := reasons_to_stay(spec):
        raise InterchangeError(f"open_clip cannot hold this model: {'; '.join(why)}")
    image, text = spec.image, spec.text
    vision: dict[str, Any] = {"image_size": image.resolution, "patch_size": image.patch, **_their_trunk(image)}
    vision |= {"head_width": image.head_width} if image.head_width != 64 else {}
    vision |= {} if image.pre_norm else {"no_ln_pre": True}
    if image.pool == "mean":
        vision |= {"pool_type": "avg"} | ({"final_ln_after_pool": True} if image.norm_after_pool else {})
    if image.pool == "attention":
        vision |= {"attentional_pool": True, "attn_pooler_heads": image.pool_heads}
        vision |= {"attn_pooler_queries": image.queries} if image.queries != 256 else {}
    theirs = {"context_length": text.context, "vocab_size": text.vocabulary, **(words or {}), **_their_trunk(text)}
    theirs["heads"] = text.heads
    theirs |= {} if text.causal else {"no_causal_mask": True}
    theirs |= {"pool_type": text.pool} if text.pool in ("first", "last") else {}
    theirs |= {"embed_cls": True} if text.pool == "class" else {}
    theirs |= {"proj_bias": True} if text.projection_bias else {}
    config: dict[str, Any] = {"embed_dim": spec.embed_dim, "vision_cfg": vision, "text_cfg": theirs}
    config |= {"quick_gelu": True} if image.mlp == "quick_gelu" else {}
    config |= {"init_logit_bias": -10.0} if spec.logit_bias else {}
    if text.pool == "class" or spec.caption:
        config["custom_text"] = True
    if spec.caption:
        vision["output_tokens"] = theirs["output_tokens"] = True
        decoder = {key: theirs[key] for key in ("context_length", "vocab_size", "width", "heads")}
        gain = {"ls_init_value": text.layer_scale} if text.layer_scale is not None else {}
        config["multimodal_cfg"] = {**decoder, "layers": spec.caption.depth, **gain}
    return config


def _their_trunk(tower: TowerSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"width": tower.width, "layers": tower.depth}
    if tower.mlp_width != 4 * tower.width:
        ratio = tower.mlp_width / tower.width
        # They cut off where we round: half a unit more is the same number there.
        found["mlp_ratio"] = ratio if int(tower.width * ratio) == tower.mlp_width else ratio + 0.5 / tower.width
    found |= {"ls_init_value": tower.layer_scale} if tower.layer_scale is not None else {}
    found |= {"norm_kwargs": {"eps": tower.norm_eps}} if tower.norm_eps != 1e-5 else {}
    return found | ({"act_kwargs": {"approximate": "tanh"}} if tower.mlp == "gelu_tanh" else {})


def reasons_to_stay(spec: ModelSpec) -> list[str]:
    """What of a spec open_clip cannot hold, each as field, value and reason; empty if it can hold it."""
    found = [*_tower_limits("image", spec.image), *_tower_limits("text", spec.text)]
    found += _image_limits(spec.image)
    if spec.shared:
        found.append("shared blocks: its towers share nothing")
    if ("quick_gelu" in (spec.image.mlp, spec.text.mlp)) and spec.image.mlp != spec.text.mlp:
        found.append(f"image.mlp = {spec.image.mlp} and text.mlp = {spec.text.mlp}: its switch is for both towers")
    if spec.caption:
        found += _caption_limits(spec)
    return found


def _tower_limits(name: str, tower: TowerSpec) -> list[str]:
    found = []
    if tower.experts > 1:
        found.append(f"{name}.experts = {tower.experts}: its MLPs are dense")
    if tower.mlp == "swiglu":
        found.append(f"{name}.mlp = swiglu: its MLPs have no gate")
    if tower.attention_width != tower.width:
        found.append(
            f"{name}.heads = {tower.heads} of {tower.head_width} channels on {name}.width = {tower.width}: "
            f"the heads of its towers together are as wide as the stream"
        )
    return found


def _image_limits(image: ImageSpec) -> list[str]:
    found = []
    if not image.class_token:
        found.append("image.class_token = false: its image towers always have one, also where the mean is pooled")
    if image.patch_bias:
        found.append("image.patch_bias = true: its map from patches has no bias")
    return found


def _caption_limits(spec: ModelSpec) -> list[str]:
    assert spec.caption
    found, text = [], spec.text
    if spec.caption.cross != "after":
        found.append("caption.cross = inside: its decoder attends to the picture after a whole block")
    if spec.memory_width != text.width:
        found.append(
            f"image tokens of {spec.memory_width} channels for a decoder of text.width = {text.width}: one width"
        )
    if text.mlp_width != 4 * text.width:
        found.append(f"text.mlp_ratio = {text.mlp_ratio} with a captioner: its decoder always has 4")
    if text.norm_eps != 1e-5 or text.mlp == "gelu_tanh":
        found.append("text.norm_eps or text.mlp with a captioner: its decoder has the defaults")
    return found
