"""The towers: how pictures, captions and further modalities become a stream, and a stream becomes one embedding.

Shape suffixes: b samples, t tokens of the whole batch, d channels of the tower, e channels of the joint space,
p patches of a picture, f frames of a sample, n features of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .spec import ImageSpec, SequenceSpec, TextSpec
from .transformer import Dense, Layout, Packed, Transformer

MAX_LOG_SCALE = math.log(100.0)
Shares = Callable[[Tensor, Layout], Tensor]
"""what both towers share, on the tokens of one"""


class TowerOutput(NamedTuple):
    """What every tower returns."""

    pooled: Tensor
    """[b, e]: one embedding a sample, not normalised."""
    tokens: Tensor
    """[t, d]: the stream after the final norm; [0, d] where only the embedding was asked for."""
    mask: Layout
    """which tokens form a sample"""
    scale: Tensor | None = None
    """[1]: multiplies cosine similarities of a further tower; None: the model's does"""


class ImageTower(nn.Module):
    """A vision transformer; the embedding is the mean of the patch tokens (Beyer et al., arXiv 2205.01580)."""

    def __init__(self, spec: ImageSpec, embed_dim: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.grid = spec.grid
        # Patches do not overlap, so the usual convolution is a linear map on unfolded patches, and faster as one.
        self.patches = nn.Linear(3 * spec.patch**2, spec.width)
        self.position_embedding = nn.Parameter(torch.empty(spec.grid**2, spec.width))
        self.transformer = Transformer(spec, spec.depth)
        self.projection = nn.Linear(spec.width, embed_dim, bias=False)

    def forward(self, images: Tensor, patches_bk: Tensor | None = None, shared: Shares | None = None) -> TowerOutput:
        """Embed pictures, float [b, 3, resolution, resolution], already normalised; through `shared` before pooling.

        `patches_bk` are the patches of each that are looked at, all by default (FLIP, Li et al., arXiv 2212.00794).
        """
        b, g, p = len(images), self.grid, self.patch
        unfolded = images.view(b, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(b, g * g, 3 * p * p)
        positions: Tensor = self.position_embedding
        if patches_bk is not None:
            unfolded = unfolded.gather(1, patches_bk[..., None].expand(-1, -1, unfolded.shape[2]))
            positions = positions[patches_bk]
        x_bpd = self.patches(unfolded) + positions
        layout = Dense(b, x_bpd.shape[1])
        x_td = self.transformer(x_bpd.flatten(0, 1), layout)
        x_td = shared(x_td, layout) if shared else x_td
        return TowerOutput(self.projection(x_td.unflatten(0, (b, -1)).mean(1)), x_td, layout)


class TextTower(nn.Module):
    """A causal transformer on packed tokens; the embedding is read at the end-of-text token, as in CLIP."""

    def __init__(self, spec: TextSpec, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Parameter(torch.empty(spec.context, spec.width))
        self.transformer = Transformer(spec, spec.depth)
        self.projection = nn.Linear(spec.width, embed_dim, bias=False)

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
        layout = Packed.of(lengths_b, len(tokens_t), longest)
        x_td = self.token_embedding(tokens_t) + self.position_embedding[layout.positions_t]
        last_b = lengths_b.cumsum(0) - 1
        if pooled_only:
            x_bd = self.transformer(x_td, layout, rows_b=last_b)
            return TowerOutput(self.projection(x_bd), x_bd[:0], layout)
        x_td = self.transformer(x_td, layout)
        x_td = shared(x_td, layout) if shared else x_td
        return TowerOutput(self.projection(x_td[last_b]), x_td, layout)

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


class SequenceTower(nn.Module):
    """A transformer over the frames of a further modality; the embedding is the mean of the frame tokens.

    The temperature of its similarities is its own (as in ImageBind, arXiv 2305.05665), so that a tower that has yet to
    learn does not move that of pictures and captions.
    """

    def __init__(self, spec: SequenceSpec, embed_dim: int) -> None:
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


class FurtherTowers(nn.Module):
    """The towers of further modalities by name, any name: also one that a module has a method of, as `type`."""

    def __init__(self, specs: Mapping[str, SequenceSpec], embed_dim: int) -> None:
        super().__init__()
        self._modules.update({name: SequenceTower(spec, embed_dim) for name, spec in specs.items()})

    def __getitem__(self, name: str) -> SequenceTower:
        tower = self._modules[name]
        assert isinstance(tower, SequenceTower)
        return tower
