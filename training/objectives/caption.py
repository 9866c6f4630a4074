"""Captioning: predict each token of the caption from the tokens before it and the picture (CoCa, arXiv 2205.01917).

The mean is over the predicted tokens of the global batch, so each token has the same weight whatever rank it is on.
With a vocabulary of 49,408 the logits would be the largest tensor by far; `linear_cross_entropy` computes them for one
chunk of tokens at a time and never stores them. Where the model computes in bf16, so do its matrix products; what they
sum, and everything else, is fp32.

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
"""logits in memory at once on a CPU: 32 MiB in fp32"""
GPU_CHUNK_LOGITS = 1 << 27
"""and on a GPU, where each chunk costs a dozen calls: 512 MiB"""


def chunk_logits(device_type: str) -> int:
    """Logits in memory at once on a device."""
    return CHUNK_LOGITS if device_type == "cpu" else GPU_CHUNK_LOGITS


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
        return linear_cross_entropy(output.caption.index_select(0, places_p), table, targets_p) / count

    @torch.no_grad()
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The sum of each caption's token losses, divided by the mean number of predicted tokens per caption."""
        assert output.caption is not None
        places_p, targets_p, rows_p = _predictions(inputs)
        products, pairs, losses = _Products(output.caption.dtype, table), len(inputs.lengths), []
        states_pd = products.operand(output.caption[places_p])
        for states_cd, targets_c in zip(states_pd.split(_chunk(table)), targets_p.split(_chunk(table)), strict=True):
            losses.append(F.cross_entropy(products.of(states_cd, products.table_vd.T), targets_c, reduction="none"))
        mean = world.sum(torch.full((), float(len(targets_p)), device=targets_p.device)) / (pairs * world.size)
        total_b = torch.zeros(pairs, dtype=products.sums, device=table.device)
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
    return max(1, chunk_logits(table_vd.device.type) // len(table_vd))


class _Products:
    """Matrix products of operands in `kind`, summed in at least fp32."""

    def __init__(self, kind: torch.dtype, table_vd: Tensor) -> None:
        self.sums = torch.promote_types(table_vd.dtype, torch.float32)
        self.kind = self.sums if kind.itemsize == 4 else kind
        self.table_vd = self.operand(table_vd)

    def operand(self, x: Tensor) -> Tensor:
        """An operand, rounded to `kind`; on a CPU, which has no such products, in the dtype of the sums again."""
        rounded = x.to(self.kind)
        return rounded.to(self.sums) if x.device.type == "cpu" else rounded

    def of(self, one: Tensor, other: Tensor) -> Tensor:
        """The product of two operands, of which nothing else is rounded."""
        return one @ other if one.dtype == self.sums else torch.mm(one, other, out_dtype=self.sums)


def linear_cross_entropy(states_td: Tensor, table_vd: Tensor, targets_t: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(states @ table.T)[target], a scalar; the [t, v] logits are never stored.

    Matrix products are in the dtype of the states, if that has 16 bits, and sums in that of the table; targets are
    int64 [t].
    """
    total: Tensor = _LinearCrossEntropy.apply(states_td, table_vd, targets_t)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist: three matrix products instead of
    four."""

    @staticmethod
    def forward(ctx: Any, states_td: Tensor, table_vd: Tensor, targets_t: Tensor) -> Tensor:
        products, given_dtype = _Products(states_td.dtype, table_vd), states_td.dtype
        states_td, wanted = products.operand(states_td), any(ctx.needs_input_grad)
        states_grad = torch.empty_like(states_td) if wanted else None
        table_grad = torch.zeros_like(table_vd, dtype=products.sums) if wanted else None
        total = table_vd.new_zeros((), dtype=products.sums)
        size = _chunk(table_vd)
        for start in range(0, len(states_td), size):
            states_cd, targets_c = states_td[start : start + size], targets_t[start : start + size, None]
            log_cv = products.of(states_cd, products.table_vd.T).log_softmax(1)
            target_c = log_cv.gather(1, targets_c)
            total -= target_c.sum()
            if states_grad is not None and table_grad is not None:
                # d loss / d logits = softmax - one-hot. Its entry at the target may be small: it is not a difference.
                slope_cv = products.operand(log_cv.exp_())
                slope_cv.scatter_(1, targets_c, products.operand(target_c.expm1_()))
                torch.mm(slope_cv, products.table_vd, out=states_grad[start : start + size])
                table_grad += products.of(slope_cv.T, states_cd)
        if states_grad is not None and table_grad is not None:
            ctx.save_for_backward(states_grad.to(given_dtype), table_grad.to(table_vd.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        states_grad, table_grad = ctx.saved_tensors
        return states_grad * slopes[0].to(states_grad.dtype), table_grad * slopes[0].to(table_grad.dtype), None
