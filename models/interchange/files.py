"""open_clip's weights: where they are, how they are read without running code, and how they need pictures preprocessed.

A source is written `open_clip:ARCHITECTURE/TAG` (published weights, through open_clip's own download),
`open_clip:ARCHITECTURE=FILE` or `open_clip:ARCHITECTURE/TAG=FILE` (a local file; the tag says how its pictures are
preprocessed), or `open_clip:local-dir:FOLDER` (a folder with an open_clip_config.json, as an export writes).
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..spec import CLIP_MEAN, CLIP_STD, ModelSpec
from .architectures import config_named, spec_of
from .errors import InterchangeError
from .open_clip_files import PREFIX, Config, fetch, published
from .weights import from_open_clip
from .wrapped import flat, unwrapped

_FOLDER = "local-dir:"
_TOKENIZER_FIELDS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pool_type", "eos_id")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
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
    notes: tuple[str, ...] = ()
    """what the file holds beside the model"""


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
    file = _weights_in(file) if file.is_dir() else file
    return _weights(source, name, config, pictures, file)


def _open_folder(source: str, folder: Path) -> Weights:
    try:
        tree = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        config, pictures = tree["model_cfg"], tree.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InterchangeError(
            f"{folder} is not an open_clip folder: its open_clip_config.json cannot be read ({type(error).__name__}); "
            f"name the architecture of the weights, {PREFIX}ARCHITECTURE={folder}"
        ) from None
    return _weights(source, folder.name, config, pictures, _weights_in(folder))


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder: by open_clip's names, or the only one. Raises InterchangeError."""
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(files) == 1:
        return folder / files[0]
    there = f"{len(files)} files of weights ({', '.join(files[:4])}); leave one" if files else "no file of weights"
    raise InterchangeError(f"{folder} holds {there}; their names end in {', '.join(_SUFFIXES)}")


def _weights(source: str, name: str, config: Config, pictures: Mapping[str, Any], file: Path) -> Weights:
    spec = spec_of(config, **picture_settings(pictures))
    text = config["text_cfg"]
    tokenizer = {key: text[key] for key in _TOKENIZER_FIELDS if key in text} if text.get("hf_tokenizer_name") else {}
    found = unwrapped(read_state(file))
    return Weights(source, name, spec, from_open_clip(spec, found.tensors), tokenizer, str(file), found.notes)


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


def _check_unpacked_size(file: Path) -> None:
    """Raises ValueError if a torch file unpacks to more than it holds: torch does not compress, a bomb does."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            size = sum(part.file_size for part in parts.infolist())
        if size > file.stat().st_size:
            raise ValueError(f"a decompression bomb of {size:,} bytes")


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name, those in dictionaries too, with the names joined by dots.

    No code in the file is run. Raises InterchangeError.
    """
    if not file.is_file():
        raise InterchangeError(f"{file} does not exist; give the path of a file of weights")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(file)
        else:
            with warnings.catch_warnings():  # about pickle's protocols
                warnings.simplefilter("ignore")
                _check_unpacked_size(file)
                found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file causes
        said = ascii(str(error).split("\n", 1)[0])[1:-1][:120]
        raise InterchangeError(
            f"{file} does not hold weights alone ({said}), and nothing else is read; if you trust it, save its "
            f"state dict as .safetensors"
        ) from None
    if not isinstance(found, dict):
        raise InterchangeError(f"{file} does not hold a state dict; save `model.state_dict()`")
    state = flat(found)
    if not state:
        raise InterchangeError(f"{file} does not hold tensors by name; save `model.state_dict()`")
    return state
