"""Geometry of the embedding space: the distance between pictures and texts, and how evenly they fill the sphere.

Shape suffixes: n pictures, m captions, e channels. All rows are unit vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2048


def geometry(image_ne: Tensor, text_me: Tensor, owner_m: Tensor) -> dict[str, float]:
    """Four measures of the embeddings; caption j describes picture `owner_m[j]`.

    modality_gap: distance between the mean picture and the mean text (Liang et al., arXiv 2203.02053).
    alignment: mean squared distance of a pair, lower is better; uniformity_image, uniformity_text: the log of the mean
    Gaussian potential exp(-2 |x - y|^2) of two different rows, lower is better (Wang and Isola, arXiv 2005.10242).
    """
    image_ne, text_me = image_ne.double(), text_me.double()
    return {
        "modality_gap": (image_ne.mean(0) - text_me.mean(0)).norm().item(),
        "alignment": (image_ne[owner_m] - text_me).square().sum(1).mean().item(),
        "uniformity_image": _uniformity(image_ne),
        "uniformity_text": _uniformity(text_me),
    }


def _uniformity(row_re: Tensor) -> float:
    """Computed in chunks, so that memory is linear in the number of rows."""
    total = torch.zeros((), dtype=torch.float64)
    for some in row_re.split(_CHUNK):
        total += (-2 * (2 - 2 * some @ row_re.T)).exp().sum()
    count = len(row_re)
    return ((total - count) / (count * (count - 1))).log().item() if count > 1 else float("nan")
