"""State dicts as people have them: a model's own tensors out of whatever training wrapped around it.

The one idea: a checkpoint is a tree of dictionaries. With its names joined by dots, a dictionary around the model and a
module around it are the same thing, a prefix. Wrappers that stand anywhere in a name are known by their words; a model
is found by a tensor that every one has, and what stands before that name is its prefix. What is beside the model is
left out if it is an average, another model or the state of training, and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InterchangeError

_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module")
)
"""what DDP, compile, FSDP, its activation checkpointing, fairscale and Lightning put into names"""
_DEEPEST = 16  # dictionaries in one another
_HUGGING_FACE = "vision_model.embeddings.patch_embedding.weight"
_ANCHORS = ("visual.conv1.weight", _HUGGING_FACE)
"""what each model has once"""
_AVERAGE = re.compile(r"(^|[._])(ema|swa|avg|averaged?|averages|shadow|polyak|momentum|teacher|target)\d*([._]|$)")
_TRAINING = re.compile(
    r"(^|\.)(optimi[sz]ers?|optim|\w*scheduler\w*|scaler|\w*callbacks|loops|\w*rng\w*|(\w*_)?(loss|criterion)(_fn)?"
    r"|n_averaged|num_updates|decay|epoch|(global_|num_)?steps?|iteration)\w*(\.|$)"
)
# What other files hold, by a name that only they have.
_OTHERS = {
    r"(^|\.)lora_[AB]\.|(^|\.)base_model\.model\.": "adapters (LoRA); merge them into the model and save that",
    r"(^|\.)_?flat_param": "FSDP's flat parameters; save a full state dict (FULL_STATE_DICT)",
    r"\.(qweight|qzeros|SCB|weight_scale|weight_format)$": "quantised weights; save them as floats",
    r"(^|\.)image\.patches\.weight$": "Treering's own weights; give the run or the commit itself, as in --from",
    r"(^|\.)visual\.trunk\.": "an image tower of timm's, which is not supported",
    r"(^|\.)visual\.layer1\.": "a ResNet, which is not supported",
    r"(^|\.)text\.transformer\.(encoder|embeddings)\.": "a text tower of Hugging Face's, which is not supported",
    r"(^|\.)vision_model\.head\.": "SigLIP by Hugging Face's names; give open_clip's file of it",
    r"(^|\.)exp_avg(_sq)?$": "the state of an optimizer; give the model's file",
}


class Unwrapped(NamedTuple):
    """A model's tensors by open_clip's names, and what else there was, in sentences."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def flat(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of nested dictionaries, their names joined by dots."""

    def walk(prefix: str, branch: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Tensor]]:
        for key, value in branch.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            elif isinstance(value, Mapping) and depth < _DEEPEST:
                yield from walk(f"{prefix}{key}.", value, depth + 1)

    return dict(walk("", tree, 1))


def unwrapped(state: Mapping[str, Tensor]) -> Unwrapped:
    """The one model in a state dict. Raises InterchangeError if there are several, or a name stands for two tensors."""
    found, given = _without_wrappers(state)
    prefix, others = _prefix(found)
    if prefix is None:
        return Unwrapped(found, ())
    anchor = next(name for anchor in _ANCHORS if (name := f"{prefix}{anchor}") in found)
    root = given[anchor].partition(".")[0]
    own: dict[str, Tensor] = {}
    beside: list[str] = []
    for name, tensor in found.items():
        outside = root in _WRAPPERS and given[name].partition(".")[0] != root
        if outside or not name.startswith(prefix) or (not prefix and _is_beside(name, others)):
            beside.append(name)
        else:
            own[name.removeprefix(prefix)] = tensor
    if _HUGGING_FACE in own:
        own = _from_hugging_face(own)
    return Unwrapped(own, tuple(_notes(prefix, others, beside)))


def known_as(names: Mapping[str, Tensor]) -> str | None:
    """What a file holds that is not a model of open_clip's, if its names say so."""
    return next((what for pattern, what in _OTHERS.items() if any(re.search(pattern, name) for name in names)), None)


def _without_wrappers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by names without the words of wrappers, and the name that each had."""
    found: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, tensor in state.items():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in found and not (tensor.shape == found[plain].shape and torch.equal(tensor, found[plain])):
            raise InterchangeError(f"the file holds {plain} twice, as {first[plain]} and {name}; keep one of them")
        found.setdefault(plain, tensor)
        first.setdefault(plain, name)
    return found, first


def _prefix(state: Mapping[str, Tensor]) -> tuple[str | None, list[str]]:
    """What stands before the names of the model (None: there is none), and before those of its averages and
    teachers."""
    ends = {name.removesuffix(anchor): None for name in state for anchor in _ANCHORS if name.endswith(anchor)}
    prefixes = [prefix for prefix in ends if not prefix or prefix.endswith(".")]
    plain = [prefix for prefix in prefixes if not _AVERAGE.search(prefix)]
    models = plain or prefixes
    if len(models) > 1:
        raise InterchangeError(
            f"the file holds {len(models)} models, under {', '.join(repr(each) for each in models[:4])}; keep one"
        )
    model = models[0] if models else None
    return model, [prefix for prefix in prefixes if prefix != model]


def _is_beside(name: str, others: list[str]) -> bool:
    """Whether a name without a prefix belongs to another model of the file, or to the state of training."""
    first = name.partition(".")[0]
    return name.startswith(tuple(others)) or bool(_AVERAGE.search(first) or _TRAINING.search(first))


def _notes(prefix: str, others: list[str], beside: list[str]) -> Iterator[str]:
    if _AVERAGE.search(prefix):
        yield f"these weights are under {prefix!r} in the file, and nothing else there is a model"
    for other in others:
        yield f"the file also holds a model under {other!r}, an average or a teacher, which is left out"
    rest = [n for n in beside if not n.startswith(tuple(others)) and not _TRAINING.search(n)]
    if rest:
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        yield f"left out, as it is not the model's: {', '.join(rest[:3])}{more}"


# Hugging Face's CLIP by the module that has each tensor in open_clip.
_RENAMED = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_MATRICES = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
"""multiplied from the other side in open_clip"""
_SPLIT = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$")


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tensors by open_clip's names from those of transformers' CLIPModel; unknown names stay."""
    found: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name in _MATRICES:
            found[_MATRICES[name]] = tensor.T
            continue
        plain = name
        for pattern, other in _RENAMED:
            plain = re.sub(pattern, other, plain)
        if split := _SPLIT.fullmatch(plain):
            fused.setdefault(f"{split[1]}.attn.in_proj_{split[3]}", {})[split[2]] = tensor
        else:
            found[plain] = tensor
    for name, three in fused.items():
        if len(three) == 3:
            found[name] = torch.cat([three[part] for part in "qkv"])
    return found
