"""Captioning: predict each token of the caption from the tokens before it and the picture (CoCa, arXiv 2205.01917).

The mean is over the predicted tokens of the global batch, so each token has the same weight whatever rank it is on.
With a vocabulary of 49,408 the logits would be the largest tensor by far; `linear_cross_entropy` computes them for one
chunk of tokens at a time and never stores them.

Shape suffixes: t tokens, p predicting tokens (all but the last of each caption), d channels, v vocabulary, c tokens of
a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ...models.output import Extras, ModelOutput
from ..sample_rng import uniform
from ..world import World
from .base import Inputs, Objective
from .config import ObjectiveConfig
from .registry import register

CHUNK_LOGITS = 1 << 23
"""logits in memory at once: 32 MiB in fp32"""


class CaptionConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """Next-token prediction of the caption from the picture (CoCa)."""

    weight: float = Field(2.0, ge=0, description="factor of the term in the loss")
    parallel_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="fraction of the captions whose tokens are all predicted at once, from the picture and masked "
        "inputs (CapPa)",
    )


@dataclass
class CaptionLoss(Objective):
    """Next-token cross-entropy of the captioner; some captions are predicted in parallel.

    A fraction `parallel_fraction` of the captions is predicted from the picture and masked inputs that carry only
    positions (CapPa, Tschannen et al., arXiv 2306.07915). CapPa's decoder also drops the causal mask; here a token
    attends to the masks before it.
    """

    name = "caption"
    needs = frozenset({"caption"})

    parallel_fraction: float = 0.0
    seed: int = 0

    def extras(self, inputs: Inputs) -> Extras:
        """Requests masking for some captions, chosen by the sample's index in the run: the same at any world size."""
        if not self.parallel_fraction:
            return Extras()
        assert inputs.numbers is not None
        return Extras(parallel_b=uniform(self.seed, "caption/parallel", inputs.numbers)[:, 0] < self.parallel_fraction)

    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The sum of this rank's token losses, divided by the number of predicted tokens in the global batch."""
        assert output.caption is not None
        places_p, targets_p, _ = _predictions(inputs)
        count = world.sum(torch.full((), float(len(targets_p)), device=targets_p.device))
        return linear_cross_entropy(output.caption[places_p], table, targets_p) / count

    @torch.no_grad()
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The sum of each caption's token losses, divided by the mean number of predicted tokens per caption."""
        assert output.caption is not None
        places_p, targets_p, rows_p = _predictions(inputs)
        states_pd, losses = output.caption[places_p].to(table.dtype), []
        for states_cd, targets_c in zip(states_pd.split(_chunk(table)), targets_p.split(_chunk(table)), strict=True):
            losses.append(F.cross_entropy(states_cd @ table.T, targets_c, reduction="none"))
        pairs = len(inputs.lengths)
        mean = world.sum(torch.full((), float(len(targets_p)), device=targets_p.device)) / (pairs * world.size)
        total_b = torch.zeros(pairs, dtype=table.dtype, device=table.device)
        return total_b.index_add_(0, rows_p, torch.cat(losses)) / mean


@register("caption", CaptionConfig)
def _caption(config: CaptionConfig, seed: int) -> Objective:
    return CaptionLoss(config.weight, config.parallel_fraction, seed)


def _predictions(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Position, target and caption index of every predicting token, int64 [p] each.

    Every token but the last of a caption predicts the token after it.
    """
    pairs, device = len(inputs.lengths), inputs.tokens.device
    predicted = len(inputs.tokens) - pairs
    samples = torch.arange(pairs, device=device)
    rows_p = torch.repeat_interleave(samples, inputs.lengths - 1, output_size=predicted)
    places_p = (
        torch.arange(predicted, device=device) + rows_p
    )  # every earlier caption has one token that predicts nothing
    return places_p, inputs.tokens[places_p + 1], rows_p


def _chunk(table_vd: Tensor) -> int:
    """Number of tokens whose logits are computed at once."""
    return max(1, CHUNK_LOGITS // len(table_vd))


def linear_cross_entropy(states_td: Tensor, table_vd: Tensor, targets_t: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(states @ table.T)[target], a scalar; the [t, v] logits are never stored.

    `states_td` is cast to the dtype of `table_vd`; targets are int64 [t].
    """
    total: Tensor = _LinearCrossEntropy.apply(states_td, table_vd, targets_t)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist: three matrix products instead of
    four."""

    @staticmethod
    def forward(ctx: Any, states_td: Tensor, table_vd: Tensor, targets_t: Tensor) -> Tensor:
        states_td, given_dtype = states_td.to(table_vd.dtype), states_td.dtype
        wanted = any(ctx.needs_input_grad)
        states_grad = torch.empty_like(states_td) if wanted else None
        table_grad = torch.zeros_like(table_vd) if wanted else None
        total = states_td.new_zeros(())
        size = _chunk(table_vd)
        for start in range(0, len(states_td), size):
            states_cd, targets_c = states_td[start : start + size], targets_t[start : start + size, None]
            logits_cv = states_cd @ table_vd.T
            lse_c = logits_cv.logsumexp(1, keepdim=True)
            total += (lse_c - logits_cv.gather(1, targets_c)).sum()
            if states_grad is not None and table_grad is not None:
                # d loss / d logits = softmax - one-hot, written over the logits to save a second [c, v] tensor.
                slope_cv = logits_cv.sub_(lse_c).exp_()
                slope_cv.scatter_add_(1, targets_c, slope_cv.new_full(targets_c.shape, -1.0))
                torch.mm(slope_cv, table_vd, out=states_grad[start : start + size])
                table_grad.addmm_(slope_cv.T, states_cd)
        if states_grad is not None:
            ctx.save_for_backward(states_grad.to(given_dtype), table_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        states_grad, table_grad = ctx.saved_tensors
        return states_grad * slopes[0].to(states_grad.dtype), table_grad * slopes[0], None
