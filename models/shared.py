"""Blocks that both towers share: one transformer over either modality's tokens, behind a gate.

Each tower's tokens go through it before pooling, and its output is added to them, times a learned gate of the tower.
Gates start at zero, where the model is as it is without the blocks. The idea is GrowCLIP's (ICCV 2023), for more fusion
of the modalities; its design is not public, and this is a reconstruction.
"""

from __future__ import annotations

import torch
from torch import nn

from .spec import ModelSpec
from .transformer import BlockOutput, TokenStream, Transformer


class Shared(nn.Module):
    """The shared transformer, with maps from each tower's width to its own and back."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.shared
        width = spec.shared.width
        self.image_in, self.image_out = nn.Linear(spec.image.width, width), nn.Linear(width, spec.image.width)
        self.text_in, self.text_out = nn.Linear(spec.text.width, width), nn.Linear(width, spec.text.width)
        self.transformer = Transformer(spec.shared, spec.shared.depth)
        self.image_gate, self.text_gate = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def image(self, stream: TokenStream) -> BlockOutput:
        """Image tokens [t, d] -> [t, d]."""
        mixed_td, routing = self.transformer(stream._replace(x_td=self.image_in(stream.x_td)))
        return BlockOutput(stream.x_td + self.image_gate * self.image_out(mixed_td), routing)

    def text(self, stream: TokenStream) -> BlockOutput:
        """Text tokens [t, d] -> [t, d]."""
        mixed_td, routing = self.transformer(stream._replace(x_td=self.text_in(stream.x_td)))
        return BlockOutput(stream.x_td + self.text_gate * self.text_out(mixed_td), routing)
