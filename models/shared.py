"""Blocks that both towers share: one transformer over either modality's tokens, entered through a gate.

Each tower's tokens go through it on their way to the projection; what comes out is added to them, times a learned gate
of the tower. At a gate of zero, where it starts, a model is what it is without. The idea is GrowCLIP's (ICCV 2023), for
more fusion of the modalities; how it shares is not public, and this is a reconstruction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .spec import ModelSpec
from .transformer import Layout, Transformer


class Shared(nn.Module):
    """The shared transformer, with maps from each tower's width and back."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.shared
        width = spec.shared.width
        self.image_in, self.image_out = nn.Linear(spec.image.width, width), nn.Linear(width, spec.image.width)
        self.text_in, self.text_out = nn.Linear(spec.text.width, width), nn.Linear(width, spec.text.width)
        self.transformer = Transformer(spec.shared, spec.shared.depth)
        self.image_gate, self.text_gate = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def image(self, x_td: Tensor, layout: Layout) -> Tensor:
        """Picture tokens [t, d] -> [t, d]."""
        return x_td + self.image_gate * self.image_out(self.transformer(self.image_in(x_td), layout))

    def text(self, x_td: Tensor, layout: Layout) -> Tensor:
        """Caption tokens [t, d] -> [t, d]."""
        return x_td + self.text_gate * self.text_out(self.transformer(self.text_in(x_td), layout))
