"""Contrastive objectives: match pictures with captions, or samples of another modality with either, over the global
batch.

Each compares every image of this rank with the captions of all ranks; `pairwise` does so tile by tile. Two pairs with
the same caption or the same picture are not negatives of each other. Features are normalised and scored in fp32,
whatever precision the towers use.

Shape suffixes: b pairs of this rank, e channels of the joint space, g kinds of ids, p tokens of an image, t tokens of
all captions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from ...data.units import size_in_bytes
from ...models.output import ModelOutput
from ..world import World
from .base import Inputs, Objective
from .config import ObjectiveConfig
from .pairwise import late_softmax_losses, sigmoid_losses, softmax_losses
from .registry import register
from .scores import GATHER_BUDGET, Relations


class _PairwiseConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """The fields that the contrastive objectives have in common."""

    positives: Literal["own", "caption", "picture"] = Field(
        "own",
        description="own: only the pair itself, and pairs with the same caption or picture are excluded from the "
        "negatives; caption, picture: pairs with the same caption (or the same picture) are positives too",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="fraction of each target that is distributed over all candidates"
    )
    gather_budget: str = Field(
        "256MB",
        description="bytes of the other processes' texts that a process holds at once, and of their gradients: a "
        "batch with more is compared in several rounds, each with a collective there and one back",
    )

    @field_validator("gather_budget")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if size_in_bytes(value) is None:
            raise ValueError(f"{value!r} is not a valid size; write one such as 64MB or 1GB")
        return value

    @property
    def shared(self) -> dict[str, Any]:
        """The fields that every contrastive objective is built with."""
        budget = size_in_bytes(self.gather_budget)
        return {"positives": self.positives, "label_smoothing": self.label_smoothing, "gather_budget": budget}


class ContrastiveConfig(_PairwiseConfig, frozen=True, extra="forbid", strict=True):
    """Match pictures with captions over all pairs of the global batch."""

    kind: Literal["softmax", "sigmoid", "filip"] = Field(
        "softmax",
        description="softmax: InfoNCE in both directions; sigmoid: SigLIP, needs model.logit_bias; filip: InfoNCE of "
        "token-wise maximum similarity",
    )


class BetweenConfig(_PairwiseConfig, frozen=True, extra="forbid", strict=True):
    """Match samples of a modality tower with captions, pictures or samples of another modality (InfoNCE)."""

    between: tuple[str, str] = Field(
        strict=False,
        description="a modality tower and image, text or another modality tower, as in [audio, text]; uses the "
        "temperature of the first",
    )

    @field_validator("between")
    @classmethod
    def _begins_with_a_modality(cls, value: tuple[str, str]) -> tuple[str, str]:
        first, second = value
        if first == second:
            raise ValueError(f"between = [{first}, {second}] compares a tower with itself; name two different towers")
        if first in ("image", "text"):
            remedy = "use `contrastive` for that" if second in ("image", "text") else f"write [{second}, {first}]"
            raise ValueError(f"between = [{first}, {second}] must begin with a modality tower; {remedy}")
        return value


@dataclass
class _Pairwise(Objective):
    """The fields and steps that the contrastive objectives have in common."""

    needs = frozenset({"embeddings"})

    positives: Literal["own", "caption", "picture"] = "own"
    """the positives besides the pairs themselves: pairs with the same caption, or the same picture"""
    label_smoothing: float = 0.0
    """fraction of each target that is distributed over all candidates"""
    gather_budget: int = GATHER_BUDGET
    """bytes of other ranks' texts held at once"""

    @abstractmethod
    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        """The losses [b] whose mean over all ranks is the term."""

    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The sum of the losses of this rank's pairs, divided by the global batch size."""
        losses_b = self.losses(output, inputs, self._relations(inputs), world)
        return losses_b.sum() / (len(losses_b) * world.size)

    @torch.no_grad()
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The losses of this rank's pairs, [b]."""
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
            *_unit_features(output), output.scale.float(), relations, world, self.label_smoothing, self.gather_budget
        )
        return (image_losses_b + text_losses_b) / 2


class LateContrastive(_Pairwise):
    """FILIP: InfoNCE whose scores are token-wise maximum similarities (Yao et al., arXiv 2111.07783).

    The loss of `Contrastive` with the similarity mean_p max_l <a_ip, t_jl> in the softmax over the texts of an image,
    and mean_l max_p <a_ip, t_jl> in the softmax over the images of a text.
    """

    name = "contrastive"
    needs = frozenset({"tokens"})

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        assert output.image_tokens is not None
        assert output.text_tokens is not None
        image_bpe = F.normalize(output.image_tokens.float(), dim=-1)
        text_te = F.normalize(output.text_tokens.float(), dim=-1)
        lengths, scale = inputs.known_lengths, output.scale.float()
        image_losses_b, text_losses_b = late_softmax_losses(
            image_bpe, text_te, lengths, scale, relations, world, self.label_smoothing, self.gather_budget
        )
        return (image_losses_b + text_losses_b) / 2


class SigmoidContrastive(_Pairwise):
    """SigLIP: each pair is a binary classification, with a learned temperature and bias (Zhai et al., arXiv
    2303.15343).

    L = -1/B * sum_ij logsigmoid(z_ij (s<a_i, t_j> + bias)),  z_ij = 1 if i = j, else -1
    """

    name = "contrastive"
    needs = frozenset({"embeddings", "bias"})

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        assert output.bias is not None
        scale, bias = output.scale.float(), output.bias.float()
        return sigmoid_losses(
            *_unit_features(output), scale, bias, relations, world, self.label_smoothing, self.gather_budget
        )


@dataclass
class Between(_Pairwise):
    """InfoNCE in both directions between a modality tower and another tower, at the first tower's temperature."""

    towers: tuple[str, str] = ("", "")
    """a modality tower, and `image`, `text` or another modality tower"""

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
        losses = softmax_losses(
            one_be, other_be, one.scale.float(), relations, world, self.label_smoothing, self.gather_budget
        )
        return (losses[0] + losses[1]) / 2


@register("contrastive", ContrastiveConfig)
def _contrastive(config: ContrastiveConfig, seed: int) -> Objective:
    kinds: dict[str, Any] = {"softmax": Contrastive, "filip": LateContrastive, "sigmoid": SigmoidContrastive}
    built: Objective = kinds[config.kind](config.weight, **config.shared)
    return built


def _each_once(terms: tuple[BetweenConfig, ...]) -> tuple[BetweenConfig, ...]:
    seen: set[frozenset[str]] = set()
    for term in terms:
        if frozenset(term.between) in seen:
            raise ValueError(f"compares {' and '.join(term.between)} twice; keep one term and raise its weight")
        seen.add(frozenset(term.between))
    return terms


@register("modalities", BetweenConfig, several=_each_once)
def _between(config: BetweenConfig, seed: int) -> Objective:
    return Between(config.weight, towers=config.between, **config.shared)


def _unit_features(output: ModelOutput) -> tuple[Tensor, Tensor]:
    """Unit-norm fp32 features [b, e] of images and captions."""
    return F.normalize(output.image.pooled.float(), dim=-1), F.normalize(output.text.pooled.float(), dim=-1)
