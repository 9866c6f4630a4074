"""Contrastive objectives: which picture belongs to which caption, over all pairs of the global batch; or another
modality to either.

All compare every image of this rank with the captions of all ranks; `pairwise` does so tile by tile. Two pairs that
share a caption or a picture are not negatives of each other. Features are normalised and scored in fp32 whatever the
towers computed in.

Shape suffixes: b pairs of this rank, e channels of the joint space, g kinds of ids, p tokens of an image, t tokens of
all captions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.output import ModelOutput
from ..world import World
from .base import Inputs, Objective
from .pairwise import late_softmax_losses, sigmoid_losses, softmax_losses
from .scores import Relations


@dataclass
class _Pairwise(Objective):
    """What the contrastive objectives share."""

    needs = frozenset({"embeddings"})

    positives: Literal["own", "caption", "picture"] = "own"
    """which pairs belong together beside the given ones: those of equal caption, or of equal picture"""
    softening: float = 0.0
    """share of each target that is spread over all candidates"""

    @abstractmethod
    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        """The losses [b] whose mean over all ranks is the term."""

    def share(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The losses of this rank's pairs over B."""
        losses_b = self.losses(output, inputs, self._relations(inputs), world)
        return losses_b.sum() / (len(losses_b) * world.size)

    @torch.no_grad()
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The losses of this rank's pairs."""
        return self.losses(output, inputs, self._relations(inputs), world)

    def _relations(self, inputs: Inputs) -> Relations:
        ids_bg = torch.stack([inputs.caption_ids, inputs.image_ids], dim=1)
        labels = {"own": None, "caption": inputs.caption_ids, "picture": inputs.image_ids}[self.positives]
        return Relations(ids_bg, ids_bg, labels, labels)


class Contrastive(_Pairwise):
    """InfoNCE in both directions with a learned temperature (Radford et al., arXiv 2103.00020).

    L = 1/2B * sum_i [ lse_j s<a_i, t_j> - s<a_i, t_i> ] + [ lse_j s<a_j, t_i> - s<a_i, t_i> ]
    """

    name = "contrastive"

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        image_losses_b, text_losses_b = softmax_losses(
            *_compared(output), output.scale.float(), relations, world, self.softening
        )
        return (image_losses_b + text_losses_b) / 2


class LateContrastive(_Pairwise):
    """FILIP: InfoNCE whose scores are token-wise maximum similarities (Yao et al., arXiv 2111.07783).

    The same sum with s_ij = mean_p max_l <a_ip, t_jl> among the texts of an image, mean_l max_p <a_ip, t_jl> among the
    images of a text.
    """

    name = "contrastive"
    needs = frozenset({"tokens"})

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        assert output.image_tokens is not None
        assert output.text_tokens is not None
        image_bpe = F.normalize(output.image_tokens.float(), dim=-1)
        text_te = F.normalize(output.text_tokens.float(), dim=-1)
        image_losses_b, text_losses_b = late_softmax_losses(
            image_bpe, text_te, inputs.known_lengths, output.scale.float(), relations, world, self.softening
        )
        return (image_losses_b + text_losses_b) / 2


class SigmoidContrastive(_Pairwise):
    """SigLIP: each pair is a yes-or-no question, with a learned temperature and bias (Zhai et al., arXiv 2303.15343).

    L = -1/B * sum_ij logsigmoid(z_ij (s<a_i, t_j> + bias)),  z_ij = 1 if i = j, else -1
    """

    name = "contrastive"
    needs = frozenset({"embeddings", "bias"})

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        assert output.bias is not None
        return sigmoid_losses(
            *_compared(output), output.scale.float(), output.bias.float(), relations, world, self.softening
        )


@dataclass
class Between(_Pairwise):
    """InfoNCE in both directions between another modality and another one, at the modality tower's temperature."""

    towers: tuple[str, str] = ("", "")
    """a modality, and `image`, `text` or another modality"""

    @property
    def name(self) -> str:
        return f"contrastive/{'-'.join(self.towers)}"

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(self.towers) - {"image", "text"}

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        towers = {"image": output.image, "text": output.text, **output.modalities}
        one, other = (towers[name] for name in self.towers)
        assert one.scale is not None
        one_be, other_be = (F.normalize(tower.pooled.float(), dim=-1) for tower in (one, other))
        losses = softmax_losses(one_be, other_be, one.scale.float(), relations, world, self.softening)
        return (losses[0] + losses[1]) / 2


def _compared(output: ModelOutput) -> tuple[Tensor, Tensor]:
    """Unit features [b, e] of images and captions."""
    return F.normalize(output.image.pooled.float(), dim=-1), F.normalize(output.text.pooled.float(), dim=-1)
