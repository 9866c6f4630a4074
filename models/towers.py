"""The towers: how pictures, captions and other modalities become a stream, and a stream becomes one embedding.

Shape suffixes: b samples, t tokens of the whole batch, d channels of the tower, e channels of the joint space,
p patches of a picture, f frames of a sample, n features of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .spec import ImageSpec, ModalitySpec, TextSpec, TowerSpec
from .transformer import Attention, Dense, Layout, Packed, Transformer

MAX_LOG_SCALE = math.log(100.0)
Shares = Callable[[Tensor, Layout], Tensor]
"""what both towers share, on the tokens of one"""


class TowerOutput(NamedTuple):
    """What every tower returns."""

    pooled: Tensor
    """[b, e]: one embedding a sample, not normalised."""
    tokens: Tensor
    """[t, d]: the stream after the final norm, unless the spec puts that behind the pooling; of pictures the patches,
    or all but the first of the pooler's queries; [0, d] where only the embedding was asked for."""
    mask: Layout
    """which tokens form a sample"""
    scale: Tensor | None = None
    """[1]: multiplies cosine similarities of a modality tower; None: the model's does"""


class AttentionPool(nn.Module):
    """CoCa's attention pooler as open_clip has it: learned queries look at all tokens, and a norm follows."""

    def __init__(self, spec: ImageSpec, embed_dim: int) -> None:
        super().__init__()
        self.query_embedding = nn.Parameter(torch.empty(spec.queries, embed_dim))
        self.query_norm = nn.LayerNorm(embed_dim, spec.norm_eps)
        self.memory_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.attention = Attention(TowerSpec(width=embed_dim, depth=1, heads=spec.pool_heads), spec.width)
        self.norm = nn.LayerNorm(embed_dim, spec.norm_eps)

    def forward(self, x_td: Tensor, layout: Dense) -> tuple[Tensor, Dense]:
        """[t, d] -> [b * queries, e] and its layout."""
        queries = Dense(layout.samples, len(self.query_embedding))
        query_te = self.query_norm(self.query_embedding).repeat(layout.samples, 1)
        return self.norm(self.attention(query_te, queries, self.memory_norm(x_td), layout)), queries


class ImageTower(nn.Module):
    """A vision transformer; the embedding is the mean of the patch tokens (Beyer et al., arXiv 2205.01580), or what
    `spec.pool` says."""

    def __init__(self, spec: ImageSpec, embed_dim: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.grid = spec.grid
        # Patches do not overlap, so the usual convolution is a linear map on unfolded patches, and faster as one.
        self.patches = nn.Linear(3 * spec.patch**2, spec.width, bias=spec.patch_bias)
        self.position_embedding = nn.Parameter(torch.empty(spec.grid**2, spec.width))
        # Two rows that are summed: the class token and its position.
        self.class_embedding = nn.Parameter(torch.empty(2, spec.width)) if spec.class_token else None
        self.pre_norm = nn.LayerNorm(spec.width, spec.norm_eps) if spec.pre_norm else None
        late = spec.norm_after_pool or spec.pool == "attention"
        self.transformer = Transformer(spec, spec.depth, norm=not late)
        self.pool = AttentionPool(spec, embed_dim) if spec.pool == "attention" else None
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps) if spec.norm_after_pool else None
        self.reads_first = spec.pool != "mean"
        self.projection = nn.Linear(embed_dim if self.pool else spec.width, embed_dim, bias=False)

    def forward(
        self,
        images: Tensor,
        patches_bk: Tensor | None = None,
        shared: Shares | None = None,
        pooled_only: bool = False,
    ) -> TowerOutput:
        """Embed pictures, float [b, 3, resolution, resolution], already normalised; through `shared` before pooling.

        `patches_bk` are the patches of each that are looked at, all by default (FLIP, Li et al., arXiv 2212.00794).
        If only the embedding is asked for, the last block computes only what it is read from: a class token.
        """
        b, g, p = len(images), self.grid, self.patch
        unfolded = images.view(b, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, 3 * p * p)
        positions: Tensor = self.position_embedding
        if patches_bk is not None:
            unfolded = unfolded.gather(1, patches_bk[..., None].expand(-1, -1, unfolded.shape[2]))
            positions = positions[patches_bk]
        x_bpd = self.patches(unfolded) + positions
        if self.class_embedding is not None:
            x_bpd = torch.cat([self.class_embedding.sum(0).to(x_bpd.dtype).expand(b, 1, -1), x_bpd], 1)
        x_bpd = x_bpd if self.pre_norm is None else self.pre_norm(x_bpd)
        layout = Dense(b, x_bpd.shape[1])
        if pooled_only and self.reads_first and self.pool is None:
            rows_b = torch.arange(b, device=x_bpd.device) * layout.length
            x_bd = self.transformer(x_bpd.flatten(0, 1), layout, rows_b=rows_b)
            return TowerOutput(self.project(x_bd), x_bd[:0], Dense(b, layout.length - 1))
        x_td = self.transformer(x_bpd.flatten(0, 1), layout)
        x_td = shared(x_td, layout) if shared else x_td
        return self._pooled(x_td, layout)

    def _pooled(self, x_td: Tensor, layout: Dense) -> TowerOutput:
        """The embedding, and the tokens that are left for others."""
        if self.pool is not None:
            x_td, layout = self.pool(x_td, layout)
        x_bnd = x_td.unflatten(0, (layout.samples, -1))
        if self.class_embedding is not None or self.pool is not None:
            first_bd, x_bnd = x_bnd[:, 0], x_bnd[:, 1:]
            x_td, layout = x_bnd.flatten(0, 1), Dense(layout.samples, layout.length - 1)
        return TowerOutput(self.project(first_bd if self.reads_first else x_bnd.mean(1)), x_td, layout)

    def project(self, x_nd: Tensor) -> Tensor:
        """Tokens, or what was pooled of them, in the joint space: [n, d] -> [n, e]."""
        joint_ne: Tensor = self.projection(x_nd if self.norm is None else self.norm(x_nd))
        return joint_ne


class TextTower(nn.Module):
    """A causal transformer on packed tokens; the embedding is read at the end-of-text token, as in CLIP, or where
    `spec.pool` says."""

    def __init__(self, spec: TextSpec, embed_dim: int) -> None:
        super().__init__()
        self.pool, self.causal, self.padded, self.context = spec.pool, spec.causal, spec.padded, spec.context
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Parameter(torch.empty(spec.context, spec.width))
        # Two rows that are summed: the class token and its position, which is behind the context.
        classed = spec.pool == "class"
        self.class_embedding = nn.Parameter(torch.empty(2, spec.width)) if classed else None
        self.transformer = Transformer(spec, spec.depth, norm=not classed)
        self.norm = nn.LayerNorm(spec.width, spec.norm_eps) if classed else None
        self.projection = nn.Linear(spec.width, embed_dim, bias=spec.projection_bias)

    def forward(
        self,
        tokens_t: Tensor,
        lengths_b: Tensor,
        pooled_only: bool = False,
        shared: Shares | None = None,
        longest: int | None = None,
    ) -> TowerOutput:
        """Embed captions, packed one after another: int64 [t] ids and int64 [b] lengths with sum t, `longest` at most.

        If only the embedding is asked for, the last block computes only what it is read from; not with `shared`
        blocks, to which all tokens go.
        """
        assert not (pooled_only and shared)
        if self.padded:
            return self._padded(tokens_t, lengths_b, longest)
        if self.class_embedding is not None:
            return self._classed(tokens_t, lengths_b, pooled_only, longest)
        layout = Packed.of(lengths_b, len(tokens_t), longest)
        x_td = self.token_embedding(tokens_t) + self.position_embedding[layout.positions_t]
        last_b = lengths_b.cumsum(0) - (lengths_b if self.pool == "first" else 1)
        if pooled_only:
            x_bd = self.transformer(x_td, layout, rows_b=last_b)
            return TowerOutput(self.project(x_bd), x_bd[:0], layout)
        x_td = self.transformer(x_td, layout)
        x_td = shared(x_td, layout) if shared else x_td
        return TowerOutput(self.project(x_td[last_b]), x_td, layout)

    def _padded(self, tokens_t: Tensor, lengths_b: Tensor, longest: int | None) -> TowerOutput:
        """Texts that are filled to the context with token 0, which takes part like any other."""
        b, n, own = len(lengths_b), self.context, Packed.of(lengths_b, len(tokens_t), longest)
        places_t = own.slots_t // own.longest * n + own.positions_t
        ids = tokens_t.new_zeros(b * n).index_copy(0, places_t, tokens_t)
        x_bnd = self.token_embedding(ids).unflatten(0, (b, n)) + self.position_embedding
        x_td = self.transformer(x_bnd.flatten(0, 1), Dense(b, n, self.causal))
        ends_b = torch.arange(b, device=x_td.device) * n
        within_b = {"first": 0, "last": n - 1}.get(self.pool, lengths_b - 1)
        return TowerOutput(self.project(x_td[ends_b + within_b]), x_td[places_t], own)

    def _classed(self, tokens_t: Tensor, lengths_b: Tensor, pooled_only: bool, longest: int | None) -> TowerOutput:
        """Texts followed by CoCa's class token, exactly as open_clip trained it on texts filled with token 0.

        Its mask is one place late (there `correct_cls_mask` is false): a key is hidden if the token *before* it is 0.
        So of the filling the class token sees the first, and itself only behind a text that needs none. Here every
        text gets one token of filling, so that nobody has to ask how many there are; a text that needs none hides it.
        """
        own = Packed.of(lengths_b, len(tokens_t), longest)
        layout = Packed.of(lengths_b + 2, len(tokens_t) + 2 * len(lengths_b), own.longest + 2)
        last_b = (lengths_b + 2).cumsum(0) - 1
        places_t = (last_b - 1 - lengths_b)[own.slots_t // own.longest] + own.positions_t
        ids = tokens_t.new_zeros(len(layout.slots_t)).index_copy(0, places_t, tokens_t)
        positions_t = layout.positions_t
        x_td = self.token_embedding(ids) + self.position_embedding[positions_t.clamp(max=self.context - 1)]
        assert self.class_embedding is not None
        x_td = x_td.index_copy(0, last_b, self.class_embedding.sum(0).to(x_td.dtype).expand(len(last_b), -1))
        seen_t = (ids.roll(1) != 0) | (positions_t == 0)
        full_b, ended_b = lengths_b == self.context, seen_t[last_b - 1]
        seen_t = seen_t.index_copy(0, last_b - 1, ended_b & ~full_b).index_copy(0, last_b, ended_b & full_b)
        layout = replace(layout, seen_bn=layout.grid(seen_t.view(-1, 1, 1))[:, 0, :, 0])
        if pooled_only:
            x_bd = self.transformer(x_td, layout, rows_b=last_b)
            return TowerOutput(self.project(x_bd), x_bd[:0], own)
        x_td = self.transformer(x_td, layout)
        return TowerOutput(self.project(x_td[last_b]), x_td[places_t], own)

    def project(self, x_nd: Tensor) -> Tensor:
        """Tokens, or what was pooled of them, in the joint space: [n, d] -> [n, e]."""
        joint_ne: Tensor = self.projection(x_nd if self.norm is None else self.norm(x_nd))
        return joint_ne

    def masked(
        self, text: TowerOutput, lengths_b: Tensor, masked_b: Tensor, shared: Shares | None = None
    ) -> TowerOutput:
        """`text` with the streams of some captions, bool [b], made from masked inputs: positions without tokens.

        They are the same for all captions, so one of the longest serves all of them.
        """
        layout = text.mask
        assert isinstance(layout, Packed)
        longest = torch.full((1,), layout.longest, device=lengths_b.device)
        masks = Packed.of(longest, layout.longest, layout.longest)
        masks_nd = self.transformer(self.position_embedding[: layout.longest], masks)
        masks_nd = shared(masks_nd, masks) if shared else masks_nd
        masked_t = torch.repeat_interleave(masked_b, lengths_b, output_size=len(text.tokens))
        return text._replace(tokens=torch.where(masked_t[:, None], masks_nd[layout.positions_t], text.tokens))


class ModalityTower(nn.Module):
    """A transformer over the frames of another modality; the embedding is the mean of the frame tokens.

    The temperature of its similarities is its own (as in ImageBind, arXiv 2305.05665), so that a tower that has yet to
    learn does not move that of pictures and captions.
    """

    def __init__(self, spec: ModalitySpec, embed_dim: int) -> None:
        super().__init__()
        self.shape = (spec.frames, spec.features)
        self.frames = nn.Linear(spec.features, spec.width)
        self.position_embedding = nn.Parameter(torch.empty(spec.frames, spec.width))
        self.transformer = Transformer(spec, spec.depth)
        self.projection = nn.Linear(spec.width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, samples: Tensor) -> TowerOutput:
        """Embed samples, float [b, f, n], or vectors [b, n] where a sample is one frame."""
        b = len(samples)
        x_bfd = self.frames(samples.view(b, *self.shape)) + self.position_embedding
        layout = Dense(b, x_bfd.shape[1])
        x_td = self.transformer(x_bfd.flatten(0, 1), layout)
        scale = self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
        return TowerOutput(self.projection(x_td.unflatten(0, (b, -1)).mean(1)), x_td, layout, scale)


class ModalityTowers(nn.Module):
    """The towers of other modalities by name, any name: also one that a module has a method of, as `type`."""

    def __init__(self, specs: Mapping[str, ModalitySpec], embed_dim: int) -> None:
        super().__init__()
        self._modules.update({name: ModalityTower(spec, embed_dim) for name, spec in specs.items()})

    def __getitem__(self, name: str) -> ModalityTower:
        tower = self._modules[name]
        assert isinstance(tower, ModalityTower)
        return tower
