"""Attention of packed captions without padding: FlashAttention's kernel for samples of different lengths.

It exists on CUDA alone, in 16 bits, for some head sizes. There is no table of where it is correct. Instead it is tried
when a model is built: on a few short captions it has to agree with plain attention in fp32, forward and backward.
Otherwise captions attend in the padded grid of `transformer.PackedLayout`.

Shape suffixes: t tokens of all samples, h heads, c channels of one head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(query_thc, key_thc, value_thc, starts, longest) -> [t, h, c]"""

_LENGTHS = (1, 7, 40, 3)
_TOLERANCE = 0.02
"""relative norm of the difference; rounding to bf16 gives 0.004, a missing mask 0.5 and more"""


def causal(query_thc: Tensor, key_thc: Tensor, value_thc: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Each token attends to itself and to those before it in its sample, [t, h, c] -> [t, h, c]; differentiable.

    `starts` is int32 [b + 1]: where each sample begins, and where the last one ends. No sample is longer than
    `longest`. CUDA, fp16 or bf16.
    """
    from torch.nn.attention.varlen import varlen_attn

    setting = _causal_setting(varlen_attn)
    mixed: Any = varlen_attn(query_thc, key_thc, value_thc, starts, starts, longest, longest, **setting)
    return mixed


def _causal_setting(attention: Callable[..., Any]) -> dict[str, Any]:
    """What makes `varlen_attn` causal: a window, or before torch 2.11 a flag."""
    return {"window_size": (-1, 0)} if "window_size" in signature(attention).parameters else {"is_causal": True}


def refusal(heads: int, channels: int, device: torch.device, attend: Attend = causal) -> str | None:
    """Why `attend` must not be used for bf16 heads of this size on a device; None: it is correct."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, sum(_LENGTHS), heads, channels)
    *inputs, gradient_thc = torch.randn(shape, generator=generator).to(device, torch.bfloat16).unbind(0)
    starts = torch.tensor([0, *_LENGTHS]).cumsum(0).to(device, torch.int32)

    def results(mix: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        mixed_thc = mix(leaves)
        return [mixed_thc.detach(), *torch.autograd.grad(mixed_thc, leaves, gradient_thc.to(dtype))]

    try:
        found = results(lambda qkv: attend(qkv[0], qkv[1], qkv[2], starts, max(_LENGTHS)), torch.bfloat16)
    except Exception as error:  # whatever a kernel fails with, the padded grid works
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    truth = results(_one_by_one, torch.float32)
    off = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
    return None if off < _TOLERANCE else f"it differs from plain attention by {off:.2g} of its norm"


def _one_by_one(qkv: list[Tensor]) -> Tensor:
    """The reference: plain attention, sample by sample."""
    parts = zip(*(x.transpose(0, 1).split(_LENGTHS, 1) for x in qkv), strict=True)
    mixed = [F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0] for q, k, v in parts]
    return torch.cat(mixed, 1).transpose(0, 1)


@cache
def kernel_refusal(heads: int, channels: int, device: torch.device) -> str | None:
    """`refusal` of the kernel, computed once per process."""
    return refusal(heads, channels, device)
