"""What an objective is, and what it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...models.model import ModelOutput
from ..world import World


@dataclass(frozen=True)
class Inputs:
    """One rank's part of a global batch on the device; b pairs, t packed tokens."""

    images: Tensor
    """uint8 [b, 3, resolution, resolution]"""
    tokens: Tensor
    """int64 [t]"""
    lengths: Tensor
    """int64 [b]"""
    caption_ids: Tensor
    """int64 [b]: equal for equal captions"""
    image_ids: Tensor
    """int64 [b]: equal for equal pictures"""


class Objective(Protocol):
    """A named term of the loss."""

    @property
    def name(self) -> str:
        """Its key in the recipe and the logs."""
        ...

    @property
    def weight(self) -> float:
        """The factor of its share in the loss."""
        ...

    def share(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """This rank's share of the term's mean over the global batch, a scalar; `table` is the token table [v, d]."""
        ...
