"""Contrastive objectives: which picture belongs to which caption, over all pairs of the global batch.

Both compare every image of this rank with the captions of all ranks; `pairwise` does so tile by tile. Two pairs that
share a caption or a picture are not negatives of each other. Features are normalised and scored in fp32 whatever the
towers computed in.

Shape suffixes: b pairs of this rank, e channels of the joint space, g kinds of ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.model import ModelOutput
from ..world import World
from .base import Inputs
from .pairwise import sigmoid_losses, softmax_losses
from .scores import Relations


@dataclass(frozen=True)
class Contrastive:
    """InfoNCE in both directions with a learned temperature (Radford et al., arXiv 2103.00020).

    L = 1/2B * sum_i [ lse_j s<a_i, t_j> - s<a_i, t_i> ] + [ lse_j s<a_j, t_i> - s<a_i, t_i> ]
    """

    weight: float
    name: str = "contrastive"

    def share(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The losses of this rank's images and captions over 2B."""
        image_be, text_be, ids_bg = _compared(output, inputs)
        image_losses_b, text_losses_b = softmax_losses(
            image_be, text_be, output.scale.float(), Relations.of(ids_bg), world
        )
        return (image_losses_b + text_losses_b).sum() / (2 * len(image_be) * world.size)


@dataclass(frozen=True)
class SigmoidContrastive:
    """SigLIP: each pair is a yes-or-no question, with a learned temperature and bias (Zhai et al., arXiv 2303.15343).

    L = -1/B * sum_ij logsigmoid(z_ij (s<a_i, t_j> + bias)),  z_ij = 1 if i = j, else -1
    """

    weight: float
    name: str = "contrastive"

    def share(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The losses of this rank's images over B."""
        assert output.bias is not None
        image_be, text_be, ids_bg = _compared(output, inputs)
        losses_b = sigmoid_losses(
            image_be, text_be, output.scale.float(), output.bias.float(), Relations.of(ids_bg), world
        )
        return losses_b.sum() / (len(image_be) * world.size)


def _compared(output: ModelOutput, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features [b, e] of images and captions, and the ids [b, g] that tell who is nobody's negative."""
    image_be = F.normalize(output.image.pooled.float(), dim=-1)
    text_be = F.normalize(output.text.pooled.float(), dim=-1)
    return image_be, text_be, torch.stack([inputs.caption_ids, inputs.image_ids], dim=1)
