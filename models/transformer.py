"""The one growable transformer behind every tower: pre-LN blocks on a flat stream of tokens.

Blocks never see a batch. They work on a stream of shape [t, d], all tokens of all samples one after another, and only
attention asks a `TokenLayout` which tokens belong together. So captions cost their true length, and image and text
towers and the captioner run the same code.

Shape suffixes: t tokens of the whole batch, d stream channels, h heads, c channels of one head, b samples, n tokens of
one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from . import varlen
from .mlp import Experts, Mlp, Routing
from .spec import TowerSpec


class TokenLayout(Protocol):
    """Which tokens of a flat stream form a sample, and which of them see each other."""

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and those before it."""
        ...

    @property
    def seen_bn(self) -> Tensor | None:
        """bool [b, n]: keys that may be seen, in addition to what `causal` allows; None: all."""
        ...

    def grid(self, x_thc: Tensor) -> Tensor:
        """Pad the flat [t, h, c] to [b, h, n, c], with the padding at the end of each sample."""
        ...

    def flat(self, x_bhnc: Tensor) -> Tensor:
        """The inverse of `grid`: drop the padding, back to [t, h, c]."""
        ...

    def seen_by(self, rows_b: Tensor) -> Tensor | None:
        """bool [b, n]: keys that the tokens `rows_b` may see, int64 [b], one per sample; None: all."""
        ...


@dataclass(frozen=True)
class DenseLayout:
    """`samples` samples of `length` tokens each; without `causal` all tokens of a sample see each other: pictures."""

    samples: int
    length: int
    causal: bool = False
    seen_bn: Tensor | None = None

    def seen_by(self, rows_b: Tensor) -> None:
        """All keys."""
        assert not self.causal

    def grid(self, x_thc: Tensor) -> Tensor:
        """[t, h, c] -> [b, h, n, c], without copying."""
        return x_thc.unflatten(0, (self.samples, self.length)).transpose(1, 2)

    def flat(self, x_bhnc: Tensor) -> Tensor:
        """[b, h, n, c] -> [t, h, c]."""
        return x_bhnc.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class PackedLayout:
    """Samples of different lengths, in which a token sees itself and those before it: captions.

    Padding exists only inside attention, at the end of each row. Under a causal mask no real token can see it, so no
    padding mask is needed and the result is exact.
    """

    cells_t: Tensor
    """int64 [t]: cell of every token in the flattened [b * longest] grid"""
    starts: Tensor
    """int32 [b + 1]: where each sample begins in the stream, and where the last one ends"""
    samples: int
    longest: int
    causal: bool = True
    seen_bn: Tensor | None = None

    @staticmethod
    def of(lengths_b: Tensor, total: int | None = None, longest: int | None = None) -> PackedLayout:
        """From the number of tokens of each sample, int64 [b] on any device.

        Their sum and maximum are read from the device if they are not given, which waits for it.
        """
        total = int(lengths_b.sum()) if total is None else total
        longest = int(lengths_b.max()) if longest is None else longest
        starts = F.pad(lengths_b.cumsum(0), (1, 0))
        samples = torch.arange(len(lengths_b), device=lengths_b.device)
        rows_t = torch.repeat_interleave(samples, lengths_b, output_size=total)
        within_t = torch.arange(total, device=lengths_b.device) - starts[rows_t]
        return PackedLayout(rows_t * longest + within_t, starts.int(), len(lengths_b), longest)

    def seen_by(self, rows_b: Tensor) -> Tensor:
        """The keys at or before these tokens."""
        positions_n = torch.arange(self.longest, device=rows_b.device)
        seen_bn = positions_n <= self.positions_t[rows_b, None]
        return seen_bn if self.seen_bn is None else seen_bn & self.seen_bn

    @property
    def positions_t(self) -> Tensor:
        """int64 [t]: position of every token in its own sample."""
        return self.cells_t % self.longest

    def grid(self, x_thc: Tensor) -> Tensor:
        """[t, h, c] -> [b, h, n, c] with zeros in the padding; without copying if there is none."""
        if len(x_thc) == self.samples * self.longest:
            return x_thc.unflatten(0, (self.samples, self.longest)).transpose(1, 2)
        grid: Tensor = _ToGrid.apply(x_thc, self.cells_t, self.samples * self.longest)
        return grid.unflatten(0, (self.samples, self.longest)).transpose(1, 2)

    def flat(self, x_bhnc: Tensor) -> Tensor:
        """[b, h, n, c] -> [t, h, c]."""
        x_thc = x_bhnc.transpose(1, 2).flatten(0, 1)
        if len(x_thc) == len(self.cells_t):
            return x_thc
        flat: Tensor = _FromGrid.apply(x_thc, self.cells_t)
        return flat


class _ToGrid(torch.autograd.Function):
    """Rows to their cells in a grid of zeros.

    Indices are unique, so the gradient is a gather. `index_copy`'s own backward would also save the rows, and that of
    `index_select` (for `_FromGrid`) would add row by row, as it must allow for repeated indices.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, total: int) -> Tensor:
        ctx.save_for_backward(cells)
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, cells, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (cells,) = ctx.saved_tensors
        return gradients[0].index_select(0, cells), None, None


class _FromGrid(torch.autograd.Function):
    """Rows from their cells in a grid: the inverse of `_ToGrid`, and its gradient is a scatter."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.total = len(grid)
        return grid.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        grid = gradients[0].new_zeros(ctx.total, *gradients[0].shape[1:])
        return grid.index_copy_(0, cells, gradients[0]), None


class TokenStream(NamedTuple):
    """The tokens of a batch on their way through blocks."""

    x_td: Tensor
    layout: TokenLayout


class BlockOutput(NamedTuple):
    """What one or several blocks return."""

    x_td: Tensor
    routing: tuple[Routing, ...] = ()
    """of every mixture of experts that the tokens went through"""


class Attention(nn.Module):
    """Multi-head attention of a stream to itself, or to another stream of `memory_width` channels."""

    def __init__(self, spec: TowerSpec, memory_width: int | None = None) -> None:
        super().__init__()
        inner = spec.attention_width
        self.heads = spec.heads
        self.varlen = False
        """whether captions attend without padding, in 16 bits (`models.varlen`)"""
        self.fused = False
        """whether maps of one stream are one matrix product; needs their weights whole and at hand"""
        self.query = nn.Linear(spec.width, inner)
        self.key = nn.Linear(memory_width or spec.width, inner)
        self.value = nn.Linear(memory_width or spec.width, inner)
        self.out = nn.Linear(inner, spec.width)

    def forward(self, stream: TokenStream, memory: TokenStream | None = None, rows_b: Tensor | None = None) -> Tensor:
        """Mix the tokens of each sample, [t, d] -> [t, d]; keys and values come from `memory`, if there is one.

        With `rows_b`, int64 [b], one token of each sample of a stream without memory, only these are computed: [b, d].
        """
        if rows_b is not None:
            return self._rows(stream, rows_b)
        layout, source = stream.layout, memory or stream
        if memory is None:
            q_thc, k_thc, v_thc = self._mapped(stream.x_td, self.query, self.key, self.value)
        else:
            (q_thc,) = self._mapped(stream.x_td, self.query)
            k_thc, v_thc = self._mapped(source.x_td, self.key, self.value)
        # Across streams there is no order: every token sees the whole memory.
        causal = layout.causal and memory is None
        plain = causal and layout.seen_bn is None
        if self.varlen and isinstance(layout, PackedLayout) and plain and q_thc.dtype.itemsize == 2:
            return self.out(varlen.causal(q_thc, k_thc, v_thc, layout.starts, layout.longest).flatten(1))
        q, k, v = layout.grid(q_thc), source.layout.grid(k_thc), source.layout.grid(v_thc)
        if source.layout.seen_bn is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            seen = source.layout.seen_bn[:, None, None]
            seen = seen & seen.new_ones(q.shape[2], k.shape[2]).tril() if causal else seen
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(layout.flat(mixed).flatten(1))

    def _mapped(self, x_td: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
        """Tokens mapped to all heads by each of some maps, [t, h, c]."""
        if not self.fused or len(maps) == 1:
            return tuple(each(x_td).unflatten(-1, (self.heads, -1)) for each in maps)
        weight, bias = (torch.cat([getattr(each, name) for each in maps]) for name in ("weight", "bias"))
        return F.linear(x_td, weight, bias).unflatten(-1, (len(maps), self.heads, -1)).unbind(-3)

    def _rows(self, stream: TokenStream, rows_b: Tensor) -> Tensor:
        """One query per sample; all tokens of the sample are keys and values."""
        x_td, layout = stream
        q_bh1c = self.query(x_td.index_select(0, rows_b)).unflatten(-1, (self.heads, 1, -1))
        k, v = map(layout.grid, self._mapped(x_td, self.key, self.value))
        seen_bn = layout.seen_by(rows_b)
        mixed_bh1c = F.scaled_dot_product_attention(
            q_bh1c, k, v, attn_mask=None if seen_bn is None else seen_bn[:, None, None]
        )
        return self.out(mixed_bh1c.flatten(1))


def kernel(spec: TowerSpec, length: int, causal: bool, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The kernel that torch picks for attention in samples of `length` tokens: flash, efficient, cudnn or math."""
    shape = (1, spec.heads, length, spec.head_width)
    q, k, v = (torch.empty(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    found = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, causal))  # private, but torch has no public way
    return str(found.name).removesuffix("_ATTENTION").lower()


def in_autocast(x_td: Tensor) -> Tensor:
    """The stream in autocast's dtype: cast once, where each linear map would make and keep a copy of its own."""
    dtype = autocast_dtype(x_td)
    return x_td if dtype is None else x_td.to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on a tensor's device, where it is on."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else None


class Norm(nn.LayerNorm):
    """LayerNorm in at least fp32, also if an engine has gathered its weights in bf16.

    That is what autocast does on a GPU; on a CPU torch refuses to mix the dtypes otherwise.
    """

    def forward(self, x_td: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        return F.layer_norm(x_td, self.normalized_shape, self.weight.to(kind), self.bias.to(kind), self.eps)


class TransformerBlock(nn.Module):
    """A pre-LN block.

    With `memory_width` it also attends to another stream: between attention and MLP or, with `after`, after both,
    behind a norm of that stream and before a second MLP.
    """

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

    def scaled(self, part: str, written_td: Tensor) -> Tensor:
        """What `part` of the block adds to the stream: its output, times its layer scale if the block has one."""
        gain = getattr(self, f"{part}_scale", None)
        return written_td if gain is None else written_td * gain

    def mixed(self, x_td: Tensor) -> BlockOutput:
        """What the MLP or the mixture of MLPs makes of tokens [t, d]."""
        if isinstance(self.mlp, Experts):
            made_td, routing = self.mlp(x_td)
            return BlockOutput(made_td, (routing,))
        return BlockOutput(self.mlp(x_td))

    def forward(
        self, stream: TokenStream, memory: TokenStream | None = None, rows_b: Tensor | None = None
    ) -> BlockOutput:
        """[t, d] -> [t, d]; with `rows_b`, and without memory, only these tokens: [b, d]."""
        x_td, layout = stream
        normed_td = in_autocast(self.attention_norm(x_td))
        if rows_b is not None:
            x_td = x_td.index_select(0, rows_b)
        x_td = x_td + self.scaled("attention", self.attention(TokenStream(normed_td, layout), rows_b=rows_b))
        if memory is not None and not self.after:
            x_td = x_td + self.scaled("cross", self.cross(TokenStream(self.cross_norm(x_td), layout), memory))
        made_td, routing = self.mixed(in_autocast(self.mlp_norm(x_td)))
        x_td = x_td + self.scaled("mlp", made_td)
        if memory is None or not self.after:
            return BlockOutput(x_td, routing)
        memory = memory._replace(x_td=in_autocast(self.memory_norm(memory.x_td)))
        x_td = x_td + self.scaled("cross", self.cross(TokenStream(self.cross_norm(x_td), layout), memory))
        return BlockOutput(x_td + self.scaled("cross_mlp", self.cross_mlp(self.cross_mlp_norm(x_td))), routing)


class Transformer(nn.Module):
    """`depth` blocks and, with `norm`, a final norm."""

    def __init__(
        self, spec: TowerSpec, depth: int, memory_width: int | None = None, after: bool = False, norm: bool = True
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(spec, memory_width, after) for _ in range(depth))
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps) if norm else nn.Identity()
        self.norms_memory = after
        self.checkpointed_blocks = 0
        """number of leading blocks that use activation checkpointing"""

    def forward(
        self, stream: TokenStream, memory: TokenStream | None = None, rows_b: Tensor | None = None
    ) -> BlockOutput:
        """[t, d] -> [t, d]; with `rows_b` the last block computes only these tokens, and they are returned, [b, d]."""
        x_td, layout = stream
        routing: tuple[Routing, ...] = ()
        if memory is not None and not self.norms_memory:  # all blocks read the same copy
            memory = memory._replace(x_td=in_autocast(memory.x_td))
        for number, block in enumerate(self.blocks):
            wanted_b = rows_b if number == len(self.blocks) - 1 else None
            stream = TokenStream(x_td, layout)
            if number < self.checkpointed_blocks and torch.is_grad_enabled():
                x_td, own = _checkpointed(block, stream, memory, wanted_b)
            else:
                x_td, own = block(stream, memory, wanted_b)
            routing += own
        return BlockOutput(self.norm(x_td), routing)


def _checkpointed(
    block: nn.Module, stream: TokenStream, memory: TokenStream | None, rows_b: Tensor | None
) -> BlockOutput:
    """A block that keeps its inputs alone and is recomputed in the backward pass."""

    def run(x_td: Tensor, memory_td: Tensor | None) -> BlockOutput:
        other = None if memory is None or memory_td is None else TokenStream(memory_td, memory.layout)
        result: BlockOutput = block(TokenStream(x_td, stream.layout), other, rows_b)
        return result

    # Autograd keeps tensors that are arguments themselves, so hooks on saved tensors see them. Blocks draw no random
    # numbers, so the state of the generators need not be restored.
    inputs = stream.x_td, memory and memory.x_td
    kept: BlockOutput = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return kept
