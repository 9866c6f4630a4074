"""The towers: from pictures, captions or other modalities to a stream of tokens, and from the stream to an embedding.

Shape suffixes: b samples, t tokens of the whole batch, d channels of the tower, e channels of the joint space,
p patches of a picture, k patches that are kept, f frames of a sample, n features of a frame.

Rows that several tokens share, such as positions, are looked up as in a table (`F.embedding`), and rows that one token
has with `index_select`: on a GPU the gradient of indexing with a tensor sorts and then adds row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .output import TowerOutput
from .spec import ImageSpec, ModalitySpec, TextSpec, TowerSpec
from .transformer import Attention, BlockOutput, DenseLayout, PackedLayout, TokenStream, Transformer, autocast_dtype

MIN_LOG_SCALE, MAX_LOG_SCALE = 0.0, math.log(100.0)
"""range of the logarithm of a temperature, as in CLIP's training: the factor on cosine similarities is from 1 to 100"""
SharedBlocks = Callable[[TokenStream], BlockOutput]
"""the blocks that both towers share, on the tokens of one: [t, d] -> [t, d]"""


def temperature(log_scale: Tensor) -> Tensor:
    """The factor on cosine similarities of a learned logarithm, [1] -> [1], from 1 to 100.

    The gradient passes at and beyond the ends as well, so that a logarithm there can return; `keep_in_range` puts it
    back after every step.
    """
    bounded = log_scale.detach().clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
    return (bounded + (log_scale - log_scale.detach())).exp()


@torch.no_grad()
def keep_in_range(log_scale: Tensor) -> None:
    """Put the logarithm of a temperature, or what a process holds of it, back into its range, in place."""
    log_scale.clamp_(MIN_LOG_SCALE, MAX_LOG_SCALE)


class AttentionPool(nn.Module):
    """CoCa's attention pooler as in open_clip: learned queries attend to all tokens, and a norm follows."""

    def __init__(self, spec: ImageSpec, embed_dim: int) -> None:
        super().__init__()
        self.query_embedding = nn.Parameter(torch.empty(spec.queries, embed_dim))
        self.query_norm = nn.LayerNorm(embed_dim, spec.norm_eps)
        self.memory_norm = nn.LayerNorm(spec.width, spec.norm_eps)
        self.attention = Attention(TowerSpec(width=embed_dim, depth=1, heads=spec.pool_heads), spec.width)
        self.norm = nn.LayerNorm(embed_dim, spec.norm_eps)

    def forward(self, x_td: Tensor, layout: DenseLayout) -> tuple[Tensor, DenseLayout]:
        """[t, d] -> [b * queries, e] and its layout."""
        queries = DenseLayout(layout.samples, len(self.query_embedding))
        query_te = self.query_norm(self.query_embedding).repeat(layout.samples, 1)
        memory = TokenStream(self.memory_norm(x_td), layout)
        return self.norm(self.attention(TokenStream(query_te, queries), memory)), queries


class ImageTower(nn.Module):
    """A vision transformer.

    The embedding is the mean of the patch tokens (Beyer et al., arXiv 2205.01580), unless `spec.pool` says otherwise.
    """

    def __init__(self, spec: ImageSpec, embed_dim: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.grid = spec.grid
        # Patches do not overlap, so the usual convolution is a linear map of unfolded patches, and faster as such.
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
        mean: Tensor,
        std: Tensor,
        patches_bk: Tensor | None = None,
        shared: SharedBlocks | None = None,
        pooled_only: bool = False,
    ) -> TowerOutput:
        """Embed pictures, uint8 [b, 3, resolution, resolution]; `shared` blocks run before pooling.

        Of pixels in 0..1 the `mean` of their channel, [3, 1], is subtracted, and they are divided by its `std`.
        `patches_bk`, int64 [b, k], are the patches of each picture that are kept (FLIP, Li et al., arXiv 2212.00794);
        None: all. With `pooled_only` the last block computes only the class token, if that is the embedding.
        """
        b, g, p = len(images), self.grid, self.patch
        # While they are bytes, pixels are cut into patches, of which some are taken.
        unfolded = images.view(b, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, 3, p * p)
        positions: Tensor = self.position_embedding
        if patches_bk is not None:
            unfolded = unfolded.gather(1, patches_bk[..., None, None].expand(-1, -1, *unfolded.shape[2:]))
            positions = F.embedding(patches_bk, positions)
        x_bpd = self.patches(_normalised(unfolded, mean, std).flatten(2)) + positions
        if self.class_embedding is not None:
            x_bpd = torch.cat([self.class_embedding.sum(0).to(x_bpd.dtype).expand(b, 1, -1), x_bpd], 1)
        x_bpd = x_bpd if self.pre_norm is None else self.pre_norm(x_bpd)
        layout = DenseLayout(b, x_bpd.shape[1])
        if pooled_only and self.reads_first and self.pool is None:
            rows_b = torch.arange(b, device=x_bpd.device) * layout.length
            x_bd, routing = self.transformer(TokenStream(x_bpd.flatten(0, 1), layout), rows_b=rows_b)
            return TowerOutput(self.project(x_bd), x_bd[:0], DenseLayout(b, layout.length - 1), routing=routing)
        x_td, routing = self.transformer(TokenStream(x_bpd.flatten(0, 1), layout))
        x_td, through = shared(TokenStream(x_td, layout)) if shared else BlockOutput(x_td)
        return self._pooled(x_td, layout)._replace(routing=routing, shared_routing=through)

    def _pooled(self, x_td: Tensor, layout: DenseLayout) -> TowerOutput:
        """The embedding, and the tokens without the one it is read from."""
        if self.pool is not None:
            x_td, layout = self.pool(x_td, layout)
        x_bnd = x_td.unflatten(0, (layout.samples, -1))
        if self.class_embedding is not None or self.pool is not None:
            first_bd, x_bnd = x_bnd[:, 0], x_bnd[:, 1:]
            x_td, layout = x_bnd.flatten(0, 1), DenseLayout(layout.samples, layout.length - 1)
        return TowerOutput(self.project(first_bd if self.reads_first else x_bnd.mean(1)), x_td, layout)

    def project(self, x_nd: Tensor) -> Tensor:
        """Tokens or pooled tokens in the joint space: [n, d] -> [n, e]."""
        joint_ne: Tensor = self.projection(x_nd if self.norm is None else self.norm(x_nd))
        return joint_ne


def _normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixels / 255 - mean) / std; under autocast one pass reads bytes and writes numbers in its dtype."""
    dtype = autocast_dtype(std)
    if dtype is None:
        return pixels.to(std.dtype).div_(255).sub_(mean).div_(std)
    made = torch.empty(pixels.shape, dtype=dtype, device=std.device)
    return torch.addcmul(-mean / std, pixels, 1 / (255 * std), out=made)


class TextTower(nn.Module):
    """A transformer on packed tokens.

    The embedding is read at the end-of-text token, as in CLIP, unless `spec.pool` says otherwise.
    """

    def __init__(self, spec: TextSpec, embed_dim: int) -> None:
        super().__init__()
        self.pool, self.causal, self.padded, self.context = spec.pool, spec.causal, spec.padded, spec.context
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Parameter(torch.empty(spec.context, spec.width))
        # Two rows that are summed: the class token and its position, which comes after the context.
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
        shared: SharedBlocks | None = None,
        longest: int | None = None,
    ) -> TowerOutput:
        """Embed captions, packed one after another: int64 [t] ids and int64 [b] lengths with sum t, `longest` at most.

        With `pooled_only` the last block computes only the token that the embedding is read from; that excludes
        `shared` blocks, which need all tokens.
        """
        assert not (pooled_only and shared)
        if self.padded:
            return self._forward_padded(tokens_t, lengths_b, longest)
        if self.class_embedding is not None:
            return self._forward_with_class_token(tokens_t, lengths_b, pooled_only, longest)
        layout = PackedLayout.of(lengths_b, len(tokens_t), longest)
        x_td = self.token_embedding(tokens_t) + F.embedding(layout.positions_t, self.position_embedding)
        last_b = lengths_b.cumsum(0) - (lengths_b if self.pool == "first" else 1)
        if pooled_only:
            x_bd, routing = self.transformer(TokenStream(x_td, layout), rows_b=last_b)
            return TowerOutput(self.project(x_bd), x_bd[:0], layout, routing=routing)
        x_td, routing = self.transformer(TokenStream(x_td, layout))
        x_td, through = shared(TokenStream(x_td, layout)) if shared else BlockOutput(x_td)
        return TowerOutput(
            self.project(x_td.index_select(0, last_b)), x_td, layout, routing=routing, shared_routing=through
        )

    def _forward_padded(self, tokens_t: Tensor, lengths_b: Tensor, longest: int | None) -> TowerOutput:
        """Texts padded to the context with token 0, which attention treats like any other token."""
        b, n, own = len(lengths_b), self.context, PackedLayout.of(lengths_b, len(tokens_t), longest)
        # Cells of the real tokens in the grid of whole contexts.
        cells_t = own.cells_t // own.longest * n + own.positions_t
        ids = tokens_t.new_zeros(b * n).index_copy(0, cells_t, tokens_t)
        x_bnd = self.token_embedding(ids).unflatten(0, (b, n)) + self.position_embedding
        x_td, routing = self.transformer(TokenStream(x_bnd.flatten(0, 1), DenseLayout(b, n, self.causal)))
        starts_b = torch.arange(b, device=x_td.device) * n
        within_b = {"first": 0, "last": n - 1}.get(self.pool, lengths_b - 1)
        return TowerOutput(
            self.project(x_td.index_select(0, starts_b + within_b)), x_td.index_select(0, cells_t), own, routing=routing
        )

    def _forward_with_class_token(
        self, tokens_t: Tensor, lengths_b: Tensor, pooled_only: bool, longest: int | None
    ) -> TowerOutput:
        """Texts followed by CoCa's class token, exactly as open_clip trained it on texts padded with token 0.

        open_clip's mask is one place late (its `correct_cls_mask` is false): a key is hidden if the token *before* it
        is 0. So the class token sees the first token of padding, and itself only behind a text that fills the context.
        Here every text gets exactly one token of padding, so that shapes do not depend on how many fill the context;
        a text that does hides it.
        """
        own = PackedLayout.of(lengths_b, len(tokens_t), longest)
        layout = PackedLayout.of(lengths_b + 2, len(tokens_t) + 2 * len(lengths_b), own.longest + 2)
        last_b = (lengths_b + 2).cumsum(0) - 1
        # Where the real tokens go in the stream that has two more tokens per text: padding, then the class token.
        places_t = (last_b - 1 - lengths_b)[own.cells_t // own.longest] + own.positions_t
        ids = tokens_t.new_zeros(len(layout.cells_t)).index_copy(0, places_t, tokens_t)
        positions_t = layout.positions_t
        places = positions_t.clamp(max=self.context - 1)
        x_td = self.token_embedding(ids) + F.embedding(places, self.position_embedding)
        assert self.class_embedding is not None
        x_td = x_td.index_copy(0, last_b, self.class_embedding.sum(0).to(x_td.dtype).expand(len(last_b), -1))
        # A key is seen if the token before it is not 0; the first of a text always is.
        seen_t = (ids.roll(1) != 0) | (positions_t == 0)
        full_b, ended_b = lengths_b == self.context, seen_t[last_b - 1]
        # Padding is seen behind a text that is not full, the class token itself behind one that is.
        seen_t = seen_t.index_copy(0, last_b - 1, ended_b & ~full_b).index_copy(0, last_b, ended_b & full_b)
        layout = replace(layout, seen_bn=layout.grid(seen_t.view(-1, 1, 1))[:, 0, :, 0])
        if pooled_only:
            x_bd, routing = self.transformer(TokenStream(x_td, layout), rows_b=last_b)
            return TowerOutput(self.project(x_bd), x_bd[:0], own, routing=routing)
        x_td, routing = self.transformer(TokenStream(x_td, layout))
        return TowerOutput(
            self.project(x_td.index_select(0, last_b)), x_td.index_select(0, places_t), own, routing=routing
        )

    def project(self, x_nd: Tensor) -> Tensor:
        """Tokens or pooled tokens in the joint space: [n, d] -> [n, e]."""
        joint_ne: Tensor = self.projection(x_nd if self.norm is None else self.norm(x_nd))
        return joint_ne

    def masked(
        self, text: TowerOutput, lengths_b: Tensor, masked_b: Tensor, shared: SharedBlocks | None = None
    ) -> TowerOutput:
        """`text` with the streams of some captions, bool [b], replaced by those of masked inputs: positions alone.

        Masked inputs are the same for all captions, so one stream of the longest length serves all of them. Its
        routing is left out, as it has no tokens of captions.
        """
        layout = text.layout
        assert isinstance(layout, PackedLayout)
        longest = torch.full((1,), layout.longest, device=lengths_b.device)
        masks = PackedLayout.of(longest, layout.longest, layout.longest)
        masks_nd, _ = self.transformer(TokenStream(self.position_embedding[: layout.longest], masks))
        masks_nd, _ = shared(TokenStream(masks_nd, masks)) if shared else BlockOutput(masks_nd)
        masked_t = torch.repeat_interleave(masked_b, lengths_b, output_size=len(text.tokens))
        masks_td = F.embedding(layout.positions_t, masks_nd)
        return text._replace(tokens=torch.where(masked_t[:, None], masks_td, text.tokens))


class ModalityTower(nn.Module):
    """A transformer over the frames of another modality; the embedding is the mean of the frame tokens.

    It has a temperature of its own (as in ImageBind, arXiv 2305.05665), so that an untrained tower does not change that
    of pictures and captions.
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
        """Embed samples, float [b, f, n], or vectors [b, n] if a sample is one frame."""
        b = len(samples)
        x_bfd = self.frames(samples.view(b, *self.shape)) + self.position_embedding
        layout = DenseLayout(b, x_bfd.shape[1])
        x_td, routing = self.transformer(TokenStream(x_bfd.flatten(0, 1), layout))
        scale = temperature(self.logit_scale)
        return TowerOutput(self.projection(x_td.unflatten(0, (b, -1)).mean(1)), x_td, layout, scale, routing)


class ModalityTowers(nn.Module):
    """The towers of other modalities by name; also by that of a method of modules, such as `type`."""

    def __init__(self, specs: Mapping[str, ModalitySpec], embed_dim: int) -> None:
        super().__init__()
        self._modules.update({name: ModalityTower(spec, embed_dim) for name, spec in specs.items()})

    def __getitem__(self, name: str) -> ModalityTower:
        tower = self._modules[name]
        assert isinstance(tower, ModalityTower)
        return tower
