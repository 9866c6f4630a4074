"""open_clip's weights: where they are, how they are read without running code, and how they need pictures preprocessed.

A source is written `open_clip:ARCHITECTURE/TAG` (published weights, through open_clip's own download),
`open_clip:ARCHITECTURE=FILE` or `open_clip:ARCHITECTURE/TAG=FILE` (a local file; the tag says how its pictures are
preprocessed), or `open_clip:local-dir:FOLDER` (a folder with an open_clip_config.json, as an export writes).
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec import CLIP_MEAN, CLIP_STD, ModelSpec
from .architectures import Config, InterchangeError, config_named, package_folder, spec_of
from .weights import from_open_clip

PREFIX = "open_clip:"
_FOLDER = "local-dir:"
_TOKENIZER_FIELDS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pool_type", "eos_id")
_TABLES = "_treering_open_clip"
"""module name under which open_clip's list of published weights is loaded"""
_RESIZE = {"shortest": "crop", "squash": "squash"}


@dataclass(frozen=True)
class Weights:
    """A model that was read from a source."""

    source: str
    name: str
    """of the architecture, or of the folder"""
    spec: ModelSpec
    tensors: dict[str, Tensor]
    """by Treering's names, fp32"""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """fields of its text_cfg that name a tokenizer other than CLIP's, for the export"""
    file: str = ""


def open_weights(source: str) -> Weights:
    """Read what `source` names. Raises InterchangeError."""
    rest = source.removeprefix(PREFIX)
    if rest.startswith(_FOLDER):
        return _open_folder(source, Path(rest.removeprefix(_FOLDER)))
    named, _, path = rest.partition("=")
    name, _, tag = named.partition("/")
    config = config_named(name)
    if not (tag or path):
        tags = ", ".join(list(published(name))[:6]) or "none is published"
        raise InterchangeError(
            f"{source} does not name weights; give {PREFIX}{name}/TAG with a tag ({tags}), or {PREFIX}{name}=FILE"
        )
    pictures = _preprocessing(name, tag, config)
    file = Path(path) if path else fetch(name, tag)
    return _weights(source, name, config, pictures, file)


def _open_folder(source: str, folder: Path) -> Weights:
    try:
        tree = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        config, pictures = tree["model_cfg"], tree.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InterchangeError(
            f"{folder} is not an open_clip folder: its open_clip_config.json cannot be read ({type(error).__name__})"
        ) from None
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return _weights(source, folder.name, config, pictures, folder / name)
    raise InterchangeError(f"{folder} holds neither open_clip_model.safetensors nor open_clip_pytorch_model.bin")


def _weights(source: str, name: str, config: Config, pictures: Mapping[str, Any], file: Path) -> Weights:
    spec = spec_of(config, **picture_settings(pictures))
    text = config["text_cfg"]
    tokenizer = {key: text[key] for key in _TOKENIZER_FIELDS if key in text} if text.get("hf_tokenizer_name") else {}
    return Weights(source, name, spec, from_open_clip(spec, read_state(file)), tokenizer, str(file))


def picture_settings(pictures: Mapping[str, Any]) -> dict[str, Any]:
    """What `spec_of` takes from a preprocess_cfg of open_clip. Raises InterchangeError for what is not supported."""
    interpolation, mode = pictures.get("interpolation", "bicubic"), pictures.get("resize_mode", "shortest")
    if interpolation not in ("bicubic", "bilinear") or mode not in _RESIZE:
        raise InterchangeError(
            f"these weights need pictures with interpolation = {interpolation!r} and resize_mode = {mode!r}, which are "
            f"not supported; weights with bicubic or bilinear and with shortest or squash are"
        )
    return {
        "mean": tuple(map(float, pictures.get("mean", CLIP_MEAN))),
        "std": tuple(map(float, pictures.get("std", CLIP_STD))),
        "resize": _RESIZE[mode],
        "interpolation": interpolation,
    }


def published(name: str) -> dict[str, dict[str, Any]]:
    """open_clip's published weights of an architecture by tag: their address and preprocessing."""
    return dict(_tables()._PRETRAINED.get(name, {}))


def _tables() -> ModuleType:
    """open_clip's list of published weights and its download, without the other imports of open_clip."""
    if _TABLES not in sys.modules:
        package = ModuleType(_TABLES)
        package.__path__ = [str(package_folder())]
        sys.modules[_TABLES] = package
    return importlib.import_module(f"{_TABLES}.pretrained")


def _preprocessing(name: str, tag: str, config: Config) -> dict[str, Any]:
    """How weights need pictures preprocessed: as the tag says, or, without one, as all tags of the architecture do."""
    known = published(name)
    if not tag:
        needed = [picture_settings(entry) for entry in known.values()]
        if any(each != needed[0] for each in needed) or (needed and needed[0] != picture_settings({})):
            raise InterchangeError(
                f"published weights of {name} do not all preprocess pictures as CLIP does; give their tag, as in "
                f"{PREFIX}{name}/{next(iter(known))}=FILE"
            )
        return {}
    clean = tag.lower().replace("-", "_")
    if clean not in known:
        raise InterchangeError(f"open_clip has no weights {tag!r} of {name}; it has {', '.join(known) or 'none'}")
    entry = known[clean]
    if bool(entry.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        kind = "QuickGELU" if entry.get("quick_gelu") else "GELU"
        raise InterchangeError(f"{name}/{tag} was trained with {kind}; use {PREFIX}{other}/{tag}")
    return entry


def fetch(name: str, tag: str) -> Path:
    """The file of published weights, by open_clip's own download. Raises InterchangeError without a network."""
    entry = published(name)[tag.lower().replace("-", "_")]
    try:
        # The hub's client retries for a minute even if its name cannot be resolved; its cache answers at once.
        file = _cached(entry) if _offline() else _tables().download_pretrained(entry)
        reason = "no network"
    except Exception as error:  # from urllib, huggingface_hub or their transports
        file, reason = "", type(error).__name__
    if not file:
        raise InterchangeError(
            f"{name}/{tag} could not be downloaded ({reason}); on a machine with a network, download "
            f"{entry.get('hf_hub') or entry.get('url')} and name the file: {PREFIX}{name}/{tag}=FILE"
        )
    return Path(file)


def _offline() -> bool:
    """Whether the hub's name cannot be resolved and no proxy is set that could resolve it."""
    if any(os.environ.get(word) for word in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")):
        return False
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return True
    return False


def _cached(entry: Mapping[str, Any]) -> str:
    """The file in the cache of the hub's client; empty if it has none."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, name = str(entry.get("hf_hub", "")).rpartition("/")
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    found = [try_to_load_from_cache(repository, name) for name in names] if repository else []
    return next((file for file in found if isinstance(file, str)), "")


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; no code in it is run. Raises InterchangeError."""
    if not file.is_file():
        raise InterchangeError(f"{file} does not exist; give the path of a file of weights")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            with warnings.catch_warnings():  # about pickle's protocols
                warnings.simplefilter("ignore")
                found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file causes
        said = ascii(str(error).split("\n", 1)[0])[1:-1][:120]
        raise InterchangeError(
            f"{file} does not hold weights alone ({said}), and nothing else is read; if you trust it, save its "
            f"state dict as .safetensors"
        ) from None
    found = found["state_dict"] if isinstance(found, dict) and isinstance(found.get("state_dict"), dict) else found
    if not isinstance(found, dict):
        raise InterchangeError(f"{file} does not hold a state dict")
    state = {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not state:
        raise InterchangeError(f"{file} does not hold tensors by name")
    return state
