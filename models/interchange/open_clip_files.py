"""Every access to the files of the open_clip package: the one module to look at when a new version comes. (Its
vocabulary is data's alone, data/samples/clip_tokenizer.py; a test reads both with the installed version.)

What is read are files beside its code: the configs of its architectures, and its table of published weights with its
download. The package itself is never imported: that takes seconds and brings torchvision. The table is a module of its
own that imports nothing of the rest, and is loaded under another name; its dictionary is private there, and there is no
public function that gives where weights are and how they want pictures without importing the package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InterchangeError

TESTED = ("2.32.0", "3.0.0", "3.2.0", "3.3.0")
"""versions of open_clip_torch whose files were read as is done here"""
PREFIX = "open_clip:"
Config = Mapping[str, Any]
_TABLES = "_treering_open_clip"
"""name under which the table of published weights is loaded"""


def version() -> str:
    """The installed version of open_clip_torch. Raises InterchangeError."""
    try:
        return importlib.metadata.version("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        raise InterchangeError("open_clip is not installed; run `pip install open_clip_torch`") from None


def package_folder() -> Path:
    """Where open_clip is installed; it is not imported. Raises InterchangeError."""
    found = importlib.util.find_spec("open_clip")
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / "model_configs").is_dir():
            return Path(folder)
    raise InterchangeError("open_clip is not installed; run `pip install open_clip_torch`")


@cache
def architectures() -> dict[str, Config]:
    """open_clip's list of configs by name. Raises InterchangeError."""
    files = sorted((package_folder() / "model_configs").glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def published(name: str) -> dict[str, dict[str, Any]]:
    """open_clip's published weights of an architecture by tag: their address and preprocessing."""
    return dict(_tables()._PRETRAINED.get(name, {}))


def _tables() -> ModuleType:
    """open_clip's list of published weights and its download, without the other imports of open_clip."""
    if _TABLES not in sys.modules:
        package = ModuleType(_TABLES)
        package.__path__ = [str(package_folder())]
        sys.modules[_TABLES] = package
    found = importlib.import_module(f"{_TABLES}.pretrained")
    if not hasattr(found, "_PRETRAINED") or not hasattr(found, "download_pretrained"):
        raise InterchangeError(
            f"open_clip_torch {version()} keeps its published weights elsewhere than {', '.join(TESTED)} do; install "
            f"one of these, or give a file: {PREFIX}ARCHITECTURE=FILE"
        )
    return found


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
