"""The one growable transformer behind every tower: pre-LN blocks on a flat stream of tokens.

The idea is that blocks never see a batch. They work on a stream of shape [t, d], all tokens of all samples one after
another, and only attention asks a `Layout` which tokens belong together. So captions cost their true length, and image
and text towers, and the captioner, are the same code.

Shape suffixes: t tokens of the whole batch, d stream channels, h heads, c channels of one head, b samples, n tokens of
one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from . import varlen
from .mlp import Experts, Mlp
from .spec import TowerSpec


class Layout(Protocol):
    """Which tokens of a flat stream form a sample: the packed form of an attention mask."""

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and those before it."""
        ...

    def grid(self, x_thc: Tensor) -> Tensor:
        """Lay the flat [t, h, c] out as [b, h, n, c], padding at the end of each sample."""
        ...

    @property
    def seen_bn(self) -> Tensor | None:
        """bool [b, n]: keys that may be seen beside what the order allows; None: all."""
        ...

    def flat(self, x_bhnc: Tensor) -> Tensor:
        """The inverse of `grid`: drop the padding, back to [t, h, c]."""
        ...

    def seen_by(self, rows_b: Tensor) -> Tensor | None:
        """bool [b, n]: keys that these tokens, int64 [b], one of each sample, may see; None: all."""
        ...


@dataclass(frozen=True)
class Dense:
    """`samples` samples of `length` tokens each, all of which see one another: pictures."""

    samples: int
    length: int
    causal: bool = False
    seen_bn: Tensor | None = None

    def seen_by(self, rows_b: Tensor) -> None:
        """Which keys these tokens may see: all."""
        assert not self.causal

    def grid(self, x_thc: Tensor) -> Tensor:
        """[t, h, c] -> [b, h, n, c], without copying."""
        return x_thc.unflatten(0, (self.samples, self.length)).transpose(1, 2)

    def flat(self, x_bhnc: Tensor) -> Tensor:
        """[b, h, n, c] -> [t, h, c]."""
        return x_bhnc.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Packed:
    """Samples of different lengths, each token seeing itself and those before it: captions.

    Padding exists only inside attention, at the end of each row. Under a causal mask no real token can see it, so no
    padding mask is needed and the result is exact.
    """

    slots_t: Tensor
    """int64 [t]: place of every token in the flattened [b * longest] grid."""
    starts: Tensor
    """int32 [b + 1]: where each sample begins in the stream, and where the last one ends."""
    samples: int
    longest: int
    causal: bool = True
    seen_bn: Tensor | None = None

    @staticmethod
    def of(lengths_b: Tensor, total: int | None = None, longest: int | None = None) -> Packed:
        """From the number of tokens of each sample, int64 [b] on any device.

        Where their sum and their maximum are not given, the device is asked, and so waited for.
        """
        total = int(lengths_b.sum()) if total is None else total
        longest = int(lengths_b.max()) if longest is None else longest
        starts = F.pad(lengths_b.cumsum(0), (1, 0))
        samples = torch.arange(len(lengths_b), device=lengths_b.device)
        rows_t = torch.repeat_interleave(samples, lengths_b, output_size=total)
        within_t = torch.arange(total, device=lengths_b.device) - starts[rows_t]
        return Packed(rows_t * longest + within_t, starts.int(), len(lengths_b), longest)

    def seen_by(self, rows_b: Tensor) -> Tensor:
        """Which keys these tokens may see: those that stand no later."""
        places_n = torch.arange(self.longest, device=rows_b.device)
        seen_bn = places_n <= self.positions_t[rows_b, None]
        return seen_bn if self.seen_bn is None else seen_bn & self.seen_bn

    @property
    def positions_t(self) -> Tensor:
        """int64 [t]: place of every token in its own sample."""
        return self.slots_t % self.longest

    def grid(self, x_thc: Tensor) -> Tensor:
        """[t, h, c] -> [b, h, n, c] with zeros in the padding; without copying if there is none."""
        if len(x_thc) == self.samples * self.longest:
            return x_thc.unflatten(0, (self.samples, self.longest)).transpose(1, 2)
        laid: Tensor = _Laid.apply(x_thc, self.slots_t, self.samples * self.longest)
        return laid.unflatten(0, (self.samples, self.longest)).transpose(1, 2)

    def flat(self, x_bhnc: Tensor) -> Tensor:
        """[b, h, n, c] -> [t, h, c]."""
        x_thc = x_bhnc.transpose(1, 2).flatten(0, 1)
        if len(x_thc) == len(self.slots_t):
            return x_thc
        taken: Tensor = _Taken.apply(x_thc, self.slots_t)
        return taken


class _Laid(torch.autograd.Function):
    """Rows to their places among zeros. No place is taken twice, so the way back is to look there; torch, which cannot
    know, keeps the rows as well, and on the way back from `_Taken` adds one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return slopes[0].index_select(0, places), None, None


class _Taken(torch.autograd.Function):
    """The inverse of `_Laid`."""

    @staticmethod
    def forward(ctx: Any, laid: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.total = len(laid)
        return laid.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        laid = slopes[0].new_zeros(ctx.total, *slopes[0].shape[1:])
        (places,) = ctx.saved_tensors
        return laid.index_copy_(0, places, slopes[0]), None


class Attention(nn.Module):
    """Multi-head attention of a stream to itself, or to another stream of `memory_width` channels."""

    def __init__(self, spec: TowerSpec, memory_width: int | None = None) -> None:
        super().__init__()
        inner = spec.attention_width
        self.heads = spec.heads
        self.varlen = False
        """whether captions attend without padding, in half precision (`models.varlen`)"""
        self.query = nn.Linear(spec.width, inner)
        self.key = nn.Linear(memory_width or spec.width, inner)
        self.value = nn.Linear(memory_width or spec.width, inner)
        self.out = nn.Linear(inner, spec.width)

    def forward(
        self,
        x_td: Tensor,
        layout: Layout,
        memory_td: Tensor | None = None,
        memory: Layout | None = None,
        rows_b: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each sample, [t, d] -> [t, d]; `memory` is the other stream, if there is one.

        With `rows_b`, a token of each sample of a stream of its own, only these look, [t, d] -> [b, d].
        """
        if rows_b is not None:
            return self._rows(x_td, layout, rows_b)
        source_td, source = (x_td, layout) if memory_td is None or memory is None else (memory_td, memory)
        q_thc = self.query(x_td).unflatten(-1, (self.heads, -1))
        k_thc, v_thc = (project(source_td).unflatten(-1, (self.heads, -1)) for project in (self.key, self.value))
        causal = layout.causal and source is layout
        plain = causal and layout.seen_bn is None
        if self.varlen and isinstance(layout, Packed) and plain and q_thc.dtype.itemsize == 2:
            return self.out(varlen.causal(q_thc, k_thc, v_thc, layout.starts, layout.longest).flatten(1))
        q, k, v = layout.grid(q_thc), source.grid(k_thc), source.grid(v_thc)
        if source.seen_bn is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            seen = source.seen_bn[:, None, None]
            seen = seen & seen.new_ones(q.shape[2], k.shape[2]).tril() if causal else seen
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(layout.flat(mixed).flatten(1))

    def _rows(self, x_td: Tensor, layout: Layout, rows_b: Tensor) -> Tensor:
        """What the tokens `rows_b` take from those of their sample that they may see."""
        q_bh1c = self.query(x_td[rows_b]).unflatten(-1, (self.heads, 1, -1))
        k, v = (layout.grid(project(x_td).unflatten(-1, (self.heads, -1))) for project in (self.key, self.value))
        seen_bn = layout.seen_by(rows_b)
        mixed_bh1c = F.scaled_dot_product_attention(
            q_bh1c, k, v, attn_mask=None if seen_bn is None else seen_bn[:, None, None]
        )
        return self.out(mixed_bh1c.flatten(1))


def kernel(spec: TowerSpec, length: int, causal: bool, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The kernel that torch picks for the attention of samples of `length` tokens: flash, efficient, cudnn or math."""
    shape = (1, spec.heads, length, spec.head_width)
    q, k, v = (torch.empty(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    found = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, causal))  # private, and the only one who knows
    return str(found.name).removesuffix("_ATTENTION").lower()


def _for_maps(x_td: Tensor) -> Tensor:
    """The stream as linear maps take it: under autocast each of them would make, and keep, a copy of its own."""
    kind = x_td.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x_td.to(torch.get_autocast_dtype(kind)) if cast else x_td


class Norm(nn.LayerNorm):
    """LayerNorm in fp32 or better, also where an engine has gathered its weights in bf16: as autocast has it on a GPU,
    and a CPU refuses to mix otherwise."""

    def forward(self, x_td: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        return F.layer_norm(x_td, self.normalized_shape, self.weight.to(kind), self.bias.to(kind), self.eps)


class Block(nn.Module):
    """A pre-LN block; with `memory_width` it also attends to another stream, between attention and MLP, or, `after`
    both, behind a norm of that stream and before an MLP of its own."""

    def __init__(self, spec: TowerSpec, memory_width: int | None = None, after: bool = False) -> None:
        super().__init__()
        self.after = after
        self.attention_norm = Norm(spec.width, spec.norm_eps)
        self.attention = Attention(spec)
        if memory_width is not None:
            self.cross_norm = Norm(spec.width, spec.norm_eps)
            self.cross = Attention(spec, memory_width)
        self.mlp_norm = Norm(spec.width, spec.norm_eps)
        self.mlp: Mlp | Experts = Experts(spec) if spec.experts > 1 else Mlp(spec)
        if after:
            assert memory_width is not None
            self.memory_norm = Norm(memory_width, spec.norm_eps)
            self.cross_mlp_norm, self.cross_mlp = Norm(spec.width, spec.norm_eps), Mlp(spec)
        names = ("attention_scale", "mlp_scale", *(("cross_scale",) if memory_width else ()))
        names = (*names, "cross_mlp_scale") if after else names
        for name in names if spec.layer_scale is not None else ():
            self.register_parameter(name, nn.Parameter(torch.empty(spec.width)))

    def gained(self, part: str, written_td: Tensor) -> Tensor:
        """What `part` of the block adds to the stream: what it wrote, times the part's gain if blocks have gains."""
        gain = getattr(self, f"{part}_scale", None)
        return written_td if gain is None else written_td * gain

    def forward(
        self,
        x_td: Tensor,
        layout: Layout,
        memory_td: Tensor | None = None,
        memory: Layout | None = None,
        rows_b: Tensor | None = None,
    ) -> Tensor:
        """[t, d] -> [t, d]; or, of a stream without another, only the tokens `rows_b`, [b, d]."""
        normed_td = _for_maps(self.attention_norm(x_td))
        if rows_b is not None:
            x_td = x_td[rows_b]
        x_td = x_td + self.gained("attention", self.attention(normed_td, layout, rows_b=rows_b))
        if memory_td is not None and not self.after:
            x_td = x_td + self.gained("cross", self.cross(self.cross_norm(x_td), layout, memory_td, memory))
        x_td = x_td + self.gained("mlp", self.mlp(_for_maps(self.mlp_norm(x_td))))
        if memory_td is None or not self.after:
            return x_td
        memory_td = _for_maps(self.memory_norm(memory_td))
        crossed_td = self.cross(self.cross_norm(x_td), layout, memory_td, memory)
        x_td = x_td + self.gained("cross", crossed_td)
        return x_td + self.gained("cross_mlp", self.cross_mlp(self.cross_mlp_norm(x_td)))


class Transformer(nn.Module):
    """`depth` blocks and a final norm, unless that stands elsewhere."""

    def __init__(
        self, spec: TowerSpec, depth: int, memory_width: int | None = None, after: bool = False, norm: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(spec, memory_width, after) for _ in range(depth))
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps) if norm else nn.Identity()
        self.again = 0
        """of how many of the first blocks the insides are made again in the backward pass instead of kept"""

    def forward(
        self,
        x_td: Tensor,
        layout: Layout,
        memory_td: Tensor | None = None,
        memory: Layout | None = None,
        rows_b: Tensor | None = None,
    ) -> Tensor:
        """[t, d] -> [t, d]; with `rows_b` the last block works for these tokens only, and they are returned, [b, d]."""
        for number, block in enumerate(self.blocks):
            wanted = rows_b if number == len(self.blocks) - 1 else None
            if number < self.again and torch.is_grad_enabled():
                x_td = checkpoint(  # nothing is drawn inside of blocks
                    block, x_td, layout, memory_td, memory, wanted, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_td = block(x_td, layout, memory_td, memory, wanted)
        return self.norm(x_td)
