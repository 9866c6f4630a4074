"""Treering pretrains image-text models that grow while they train.

The repository root is this package. Imports run one way: launch -> training -> models, data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .training.load import Loaded as Loaded
    from .training.load import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, and the class `Loaded` of what it gives: late, because they bring torch, which takes seconds."""
    if name in ("load", "Loaded"):
        from .training import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
