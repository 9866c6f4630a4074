"""Symmetric contrastive softmax over the global batch (Radford et al., arXiv 2103.00020).

    L = 1/2B * sum_i [ lse_j s<a_i, t_j> - s<a_i, t_i> ] + [ lse_j s<a_j, t_i> - s<a_i, t_i> ]

Each rank computes its own rows of both sums against the features of all ranks, so a rank holds b x B similarities.
Two pairs that share a caption or a picture are not negatives of each other: their similarity is left out of the sums.

Shape suffixes: b pairs of this rank, k pairs of the global batch, e channels of the joint space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.model import ModelOutput
from ..world import World
from .base import Inputs


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE in both directions with a learned temperature."""

    weight: float
    name: str = "contrastive"

    def share(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """This rank's rows of both directions over 2B."""
        # Similarities and their exponentials in fp32 whatever the towers computed in.
        image_be = F.normalize(output.image.pooled.float(), dim=-1)
        text_be = F.normalize(output.text.pooled.float(), dim=-1)
        image_ke, text_ke = world.gather(image_be), world.gather(text_be)
        same_bk = _same(inputs.caption_ids, world) | _same(inputs.image_ids, world)
        own_b = torch.arange(len(image_be), device=image_be.device) + world.rank * len(image_be)
        same_bk[torch.arange(len(own_b), device=own_b.device), own_b] = False
        scale = output.scale.float()
        rows = _cross_entropy(scale * image_be @ text_ke.T, same_bk, own_b)
        columns = _cross_entropy(scale * text_be @ image_ke.T, same_bk, own_b)
        return (rows + columns) / (2 * len(image_ke))


def _same(ids_b: Tensor, world: World) -> Tensor:
    """bool [b, k]: whose id equals whose."""
    ids_k = world.gather(ids_b)
    return ids_b[:, None] == ids_k[None, :]


def _cross_entropy(logits_bk: Tensor, left_out_bk: Tensor, target_b: Tensor) -> Tensor:
    """Summed over rows, with some columns left out of a row's normaliser."""
    return F.cross_entropy(logits_bk.masked_fill(left_out_bk, float("-inf")), target_b, reduction="sum")
