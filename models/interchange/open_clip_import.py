"""Imports the package open_clip, also beside a CPU build of torch, where torchvision's compiled operators cannot load.

A wheel of torchvision from the Python index needs CUDA's libraries. Beside a CPU build of torch it is installed and
imports nothing: `operator torchvision::nms does not exist`. What open_clip takes from torchvision are plain transforms,
so it is enough that the operators have their names. Treering itself reads open_clip's files and needs neither.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .errors import InterchangeError

_OPERATORS = ("nms", "qnms")
"""compiled operators that torchvision's own modules refer to while they are imported"""


def import_open_clip() -> ModuleType:
    """The package open_clip, as `import open_clip` gives it where torchvision fits torch; seconds at the first call.

    Raises InterchangeError if it is not installed.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise InterchangeError("open_clip is not installed; run `pip install open_clip_torch`")
    _named_operators()
    return importlib.import_module("open_clip")


@functools.cache
def _named_operators() -> Any:
    """Name torchvision's operators if its library does not load; they are named as long as the answer lives."""
    found = importlib.util.find_spec("torchvision")
    for folder in (found and found.submodule_search_locations) or ():
        for library in Path(folder).glob("_C*.so"):
            try:
                return torch.ops.load_library(str(library))  # again is harmless
            except OSError:
                continue
    names = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return names
