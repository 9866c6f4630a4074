"""The MLP of a block, or a mixture of MLPs with a router.

A mixture sorts its tokens by expert, so that each expert works on adjacent rows. Only the device knows how many rows
each expert gets. With a kernel for products of such groups (`torch.nn.functional.grouped_mm`: bf16 on H100 and later)
the host need not wait for these numbers. As in `varlen`, the kernel is tried when a model is built.

Shape suffixes: t tokens, d stream channels, e experts, k experts of one token, r = t k rows sorted by expert, i and o
channels of a map's input and output.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .spec import TowerSpec

_TOLERANCE = 0.02
"""relative norm of the difference; rounding to bf16 gives 0.004"""


class Mlp(nn.Module):
    """Two linear maps with a GELU between them (exact or an approximation), or SwiGLU, with a third map as a gate.

    SwiGLU: Shazeer, arXiv 2002.05202.
    """

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.kind = spec.mlp
        self.gate = nn.Linear(spec.width, spec.mlp_width) if spec.mlp == "swiglu" else None
        self.up = nn.Linear(spec.width, spec.mlp_width)
        self.down = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x_td: Tensor) -> Tensor:
        """[t, d] -> [t, d]."""
        if self.gate is None:
            return self.down(_gelu(self.kind, self.up(x_td)))
        return self.down(F.silu(self.gate(x_td)) * self.up(x_td))


def _gelu(kind: str, x: Tensor) -> Tensor:
    """GELU or one of its approximations (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class Routing(NamedTuple):
    """Where a mixture of experts sent the tokens of one pass."""

    counts_e: Tensor
    """int64 [e]: tokens of each expert"""
    gates_e: Tensor
    """[e]: the gate of each expert, summed over the tokens"""

    def plus(self, other: Routing) -> Routing:
        """The routing of two passes through one mixture."""
        return Routing(self.counts_e + other.counts_e, self.gates_e + other.gates_e)


class _Dealt(torch.autograd.Function):
    """Each row `copies` times, in the order `order_r`, whose inverse is `back_r`.

    So the gradient is gathered, too; that of an index would be added row by row.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_r: Tensor, back_r: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back_r)
        ctx.copies = copies
        return rows.index_select(0, order_r if copies == 1 else order_r // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (back_r,) = ctx.saved_tensors
        rows = gradients[0].index_select(0, back_r)
        return (rows if ctx.copies == 1 else rows.unflatten(0, (-1, ctx.copies)).sum(1)), None, None, None


class Experts(nn.Module):
    """A mixture of MLPs: each token goes through the `experts_per_token` experts with the largest gates.

    Their outputs are averaged with these gates. Gates are a softmax over all experts, of which the chosen ones are
    rescaled to sum to one (Mixtral, arXiv 2401.04088), so that equal experts together compute what one of them does.
    """

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec, self.experts_per_token = spec, spec.experts_per_token
        self.router = nn.Linear(spec.width, spec.experts, bias=False)
        self.experts = nn.ModuleList(Mlp(spec) for _ in range(spec.experts))
        self.grouped = False
        """whether one kernel computes all experts, in 16 bits"""

    def forward(self, x_td: Tensor) -> tuple[Tensor, Routing]:
        """[t, d] -> [t, d], and where the tokens went."""
        scores_te = self.router(x_td).softmax(-1)
        gates_tk, chosen_tk = scores_te.topk(self.experts_per_token, dim=-1)
        gates_tk = gates_tk / gates_tk.sum(-1, keepdim=True)
        chosen = chosen_tk.flatten()
        counts_e = chosen.new_zeros(len(self.experts)).scatter_add(0, chosen, torch.ones_like(chosen))
        # Rows sorted by expert: one for each token and chosen expert. Sorting back restores [t, k].
        order_r = chosen.argsort(stable=True)
        back_r = order_r.argsort()
        rows_rd: Tensor = _Dealt.apply(x_td, order_r, back_r, self.experts_per_token)
        if self.grouped and x_td.dtype.itemsize == 2:
            made_rd = self._together(rows_rd, chosen[order_r], counts_e)
        else:
            made_rd = self._one_by_one(rows_rd, counts_e)
        sorted_rd: Tensor = _Dealt.apply(made_rd, back_r, order_r, 1)
        made_tkd = sorted_rd.unflatten(0, (-1, self.experts_per_token))
        return (made_tkd * gates_tk[..., None]).sum(1), Routing(counts_e, scores_te.sum(0))

    def _one_by_one(self, rows_rd: Tensor, counts_e: Tensor) -> Tensor:
        """Each expert on its rows; reading how many these are waits for the device."""
        pieces = rows_rd.split(counts_e.tolist())
        # An expert without tokens still runs, on no rows, so that every parameter has a gradient in every step.
        return torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces, strict=True)])

    def _together(self, rows_rd: Tensor, of_r: Tensor, counts_e: Tensor) -> Tensor:
        """All experts by one kernel; `of_r` is the expert of each row."""
        ends_e = counts_e.cumsum(0).int()

        def mapped(name: str, x_ri: Tensor) -> Tensor:
            maps: list[nn.Linear] = [getattr(expert, name) for expert in self.experts]
            weight_eio = torch.stack([each.weight for each in maps]).to(x_ri.dtype).mT
            bias_eo = torch.stack([each.bias for each in maps]).to(x_ri.dtype)
            return F.grouped_mm(x_ri, weight_eio, offs=ends_e) + F.embedding(of_r, bias_eo)

        first = self.experts[0]
        assert isinstance(first, Mlp)
        if first.gate is None:
            return mapped("down", _gelu(first.kind, mapped("up", rows_rd)))
        return mapped("down", F.silu(mapped("gate", rows_rd)) * mapped("up", rows_rd))


@cache
def grouped_refusal(spec: TowerSpec, device: torch.device) -> str | None:
    """Why one kernel must not compute all experts of a mixture on a device; None: it is correct."""
    generator = torch.Generator().manual_seed(0)
    mixture = Experts(spec)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spec.width**-0.5)
    mixture.to(device, torch.bfloat16)
    x_td, gradient_td = torch.randn((2, 50, spec.width), generator=generator).to(device, torch.bfloat16)

    def results(grouped: bool) -> list[Tensor]:
        mixture.grouped = grouped
        leaf_td = x_td.clone().requires_grad_()
        made_td, _ = mixture(leaf_td)
        weights = [parameter for name, parameter in mixture.named_parameters() if name.startswith("experts")]
        return [made_td.detach(), *torch.autograd.grad(made_td, [leaf_td, *weights], gradient_td)]

    try:
        found = results(True)
    except Exception as error:  # whatever a kernel fails with, one by one works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    off = max(
        float((a - b).float().norm() / (b.float().norm() + 1e-6)) for a, b in zip(found, results(False), strict=True)
    )
    return None if off < _TOLERANCE else f"it differs from the experts one by one by {off:.2g} of its norm"
