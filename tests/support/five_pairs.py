"""A model of a few numbers, five pairs for it, and the gradients of everything that it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from treering.models.model import Model
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=2, heads=2, patch=4, resolution=16),
    text=TextSpec(width=16, depth=2, heads=2, head_dim=6, context=9),
    captioner=CaptionerSpec(depth=1),
)
PLAIN = SPEC.model_copy(update={"captioner": None})


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures uint8 [5, 3, 16, 16], packed tokens int64 [27], and lengths int64 [5]."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 9, 5, 3, 7])
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator), tokens, lengths


def gradients(model: Model, output: Any) -> dict[str, np.ndarray]:
    """The gradient of every parameter, by name, for a weighted sum of all outputs."""
    parts = [output.image.pooled, output.text.pooled, *([] if output.caption is None else [output.caption])]
    sum((part * torch.linspace(-1, 2, part.numel()).view_as(part)).sum() for part in parts).backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
