"""Treering pretrains image-text models that grow while they train.

The repository root is this package. Imports run one way: launch -> training -> models, data.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launch.run import train as train
    from .models.interchange.open_clip_import import import_open_clip as import_open_clip
    from .training.load import Loaded as Loaded
    from .training.load import load as load

__version__ = "0.2.0"


_MODULES = {
    "train": ".launch.run",
    "load": ".training.load",
    "Loaded": ".training.load",
    "import_open_clip": ".models.interchange.open_clip_import",
}
"""late, because they bring torch, which takes seconds"""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
