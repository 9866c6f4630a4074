"""Losses over all pairs of the global batch, exact, in memory that grows with neither the batch squared nor the world.

The scores of this rank's images with the texts of all ranks are made a tile at a time and never kept: the forward pass
folds each tile into a few numbers per image and per text, and the backward pass makes the tiles once more. Texts come
by a rank's b at a time, so a rank holds its own features, a few blocks of that size, and one tile; what is saved for
the backward pass is the rank's own features and O(b) numbers. Every score of the world is made by one rank only: the
softmax over the texts of an image is local, the one over the images of a text is put together from the parts of all
ranks (as in Inf-CL, arXiv 2410.17243, which walks twice).

Two pairs that share an id are not negatives of each other: their scores are -inf, which is neutral in a softmax over
images or texts as in a sum of sigmoids.

Shape suffixes: b pairs of this rank, w ranks (w * b pairs of the global batch), r rows and c columns of a tile,
e channels of the joint space, g kinds of ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..world import World

_TILE_BYTES = 4 << 20
"""of one tile of scores: 1024 x 1024 in fp32"""


def softmax_losses(
    image_be: Tensor, text_be: Tensor, scale: Tensor, ids_bg: Tensor, world: World
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image among all texts, and of each text among all images: InfoNCE, two [b] vectors.

        lse_j s<x_i, y_j> - s<x_i, y_i>    and    lse_i s<x_i, y_j> - s<x_j, y_j>

    Features [b, e] of this rank's pairs and `scale` [1], all of one float dtype; `ids_bg` int64 [b, g], g from 0 on.
    All ranks call it together with the same b. Differentiable once, in the features of all ranks and the scale: as
    everywhere in objectives, the gradient is that of the sum over ranks.
    """
    image_losses_b, text_losses_b = _Softmax.apply(image_be, text_be, scale, ids_bg, world)
    return image_losses_b, text_losses_b


def sigmoid_losses(
    image_be: Tensor, text_be: Tensor, scale: Tensor, bias: Tensor, ids_bg: Tensor, world: World
) -> Tensor:
    """Each image's binary cross-entropies with all texts, summed: SigLIP (arXiv 2303.15343), a [b] vector.

        - sum_j logsigmoid(z_ij (s<x_i, y_j> + bias)),    z = 1 for the image's own text, else -1

    `bias` is [1]; the rest as in `softmax_losses`.
    """
    losses_b: Tensor = _Sigmoid.apply(image_be, text_be, scale, bias, ids_bg, world)
    return losses_b


class _Tile(NamedTuple):
    rank: int
    """whose texts"""
    rows: slice
    columns: slice
    scores_rc: Tensor
    """the reader's own, to work in"""
    matched: bool
    """whether the diagonal holds the scores of true pairs"""


class _Block(NamedTuple):
    rank: int
    text_be: Tensor
    ids_bg: Tensor


@dataclass(frozen=True)
class _Scores:
    """The scores of this rank's images with the texts of all ranks, walked through tile by tile."""

    image_be: Tensor
    """times the scale"""
    text_be: Tensor
    ids_bg: Tensor
    world: World

    def blocks(self) -> Iterator[_Block]:
        """The texts of each rank in turn."""
        ids_wbg = self.world.gather(self.ids_bg).view(self.world.size, *self.ids_bg.shape)
        for rank, text_be in enumerate(self.world.each(self.text_be)):
            yield _Block(rank, text_be, ids_wbg[rank])

    def tiles(self, block: _Block) -> Iterator[_Tile]:
        """The scores with one rank's texts."""
        side = max(1, math.isqrt(_TILE_BYTES // self.image_be.element_size()))
        pairs = len(self.image_be)
        cuts = [slice(start, min(start + side, pairs)) for start in range(0, pairs, side)]
        for rows in cuts:
            for columns in cuts:
                scores_rc = self.image_be[rows] @ block.text_be[columns].T
                matched = block.rank == self.world.rank and rows == columns
                same_rc = _same(self.ids_bg[rows], block.ids_bg[columns])
                if matched:
                    same_rc.fill_diagonal_(False)
                scores_rc.masked_fill_(same_rc, float("-inf"))
                yield _Tile(block.rank, rows, columns, scores_rc, matched)

    def all_tiles(self) -> Iterator[_Tile]:
        """The scores with all texts."""
        for block in self.blocks():
            yield from self.tiles(block)

    def pull_back(self, slope: Callable[[_Tile], Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients [b, e] of `image_be` and `text_be`, given the slope of the loss in each score of a tile."""
        image_grad_be, text_grad_be = torch.zeros_like(self.image_be), self.text_be.new_empty(0)
        arrived: Callable[[], object] | None = None
        for block in self.blocks():
            part_be = torch.zeros_like(block.text_be)
            for tile in self.tiles(block):
                slope_rc = slope(tile)
                image_grad_be[tile.rows].addmm_(slope_rc, block.text_be[tile.columns])
                part_be[tile.columns].addmm_(slope_rc.T, self.image_be[tile.rows])
            if arrived:
                arrived()
            arrived = self.world.sum_to(block.rank, part_be)
            if block.rank == self.world.rank:
                text_grad_be = part_be
        if arrived:
            arrived()
        return image_grad_be, text_grad_be


def _same(ids_rg: Tensor, ids_cg: Tensor) -> Tensor:
    """bool [r, c]: which pairs share an id of any kind."""
    same_rc = torch.zeros(len(ids_rg), len(ids_cg), dtype=torch.bool, device=ids_rg.device)
    for ids_r, ids_c in zip(ids_rg.unbind(1), ids_cg.unbind(1), strict=True):
        same_rc |= ids_r[:, None] == ids_c
    return same_rc


class _Softmax(torch.autograd.Function):
    """Saves of each softmax its largest score and the sum of exp(score - largest), which together are its lse.

    Kept apart they lose nothing to rounding when the scores are around 100.
    """

    @staticmethod
    def forward(
        ctx: Any, image_be: Tensor, text_be: Tensor, scale: Tensor, ids_bg: Tensor, world: World
    ) -> tuple[Tensor, Tensor]:
        scores = _Scores(image_be * scale, text_be, ids_bg, world)
        matched_b = image_be.new_empty(len(image_be))
        image_top_b, image_sum_b = _no_terms(matched_b, len(image_be))
        text_top_wb, text_sum_wb = _no_terms(matched_b, world.size, len(image_be))
        for tile in scores.all_tiles():
            if tile.matched:
                matched_b[tile.rows] = tile.scores_rc.diagonal()
            _add_terms(image_top_b[tile.rows], image_sum_b[tile.rows], tile.scores_rc, 1)
            _add_terms(text_top_wb[tile.rank, tile.columns], text_sum_wb[tile.rank, tile.columns], tile.scores_rc, 0)
        highest_wb = world.max(text_top_wb)
        text_sum_wb = world.sum(text_sum_wb * (text_top_wb - highest_wb).exp_())
        text_top_b, text_sum_b = highest_wb[world.rank].clone(), text_sum_wb[world.rank].clone()
        ctx.world = world
        ctx.save_for_backward(image_be, text_be, scale, ids_bg, image_top_b, image_sum_b, text_top_b, text_sum_b)
        return (
            image_sum_b.log().add_(image_top_b - matched_b),
            text_sum_b.log().add_(text_top_b - matched_b),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        image_be, text_be, scale, ids_bg, image_top_b, image_sum_b, text_top_b, text_sum_b = ctx.saved_tensors
        world: World = ctx.world
        image_slope_b, text_slope_b = slopes
        image_factor_b = image_slope_b / image_sum_b
        text_top_wb = world.gather(text_top_b).view(world.size, -1)
        text_factor_wb = world.gather(text_slope_b / text_sum_b).view(world.size, -1)

        def slope(tile: _Tile) -> Tensor:
            slope_rc = (tile.scores_rc - image_top_b[tile.rows, None]).exp_()
            slope_rc.mul_(image_factor_b[tile.rows, None])
            other_rc = tile.scores_rc.sub_(text_top_wb[tile.rank, tile.columns]).exp_()
            slope_rc.addcmul_(other_rc, text_factor_wb[tile.rank, tile.columns])
            if tile.matched:
                slope_rc.diagonal().sub_(image_slope_b[tile.rows] + text_slope_b[tile.columns])
            return slope_rc

        image_grad_be, text_grad_be = _Scores(image_be * scale, text_be, ids_bg, world).pull_back(slope)
        scale_grad = (image_grad_be * image_be).sum().view_as(scale)
        return image_grad_be.mul_(scale), text_grad_be, scale_grad, None, None


def _no_terms(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Running log-sum-exps of nothing: the largest score so far and the sum of exp(score - largest).

    The largest of no scores is the lowest finite number, for which no difference is NaN.
    """
    return like.new_full(shape, torch.finfo(like.dtype).min), like.new_zeros(shape)


def _add_terms(top: Tensor, total: Tensor, scores_rc: Tensor, dim: int) -> None:
    """Fold a tile's scores along `dim` into running log-sum-exps, in place."""
    higher = torch.maximum(top, scores_rc.amax(dim))
    total.mul_((top - higher).exp_()).add_((scores_rc - higher.unsqueeze(dim)).exp_().sum(dim))
    top.copy_(higher)


class _Sigmoid(torch.autograd.Function):
    """A sum over scores has no normaliser: nothing is saved but the inputs, and no numbers are put together."""

    @staticmethod
    def forward(
        ctx: Any, image_be: Tensor, text_be: Tensor, scale: Tensor, bias: Tensor, ids_bg: Tensor, world: World
    ) -> Tensor:
        losses_b = image_be.new_zeros(len(image_be))
        for tile in _Scores(image_be * scale, text_be, ids_bg, world).all_tiles():
            losses_b[tile.rows] -= F.logsigmoid(_wrongness(tile, bias).neg_()).sum(1)
        ctx.world = world
        ctx.save_for_backward(image_be, text_be, scale, bias, ids_bg)
        return losses_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        image_be, text_be, scale, bias, ids_bg = ctx.saved_tensors
        slope_b, bias_grad = slopes[0], torch.zeros_like(bias)

        def slope(tile: _Tile) -> Tensor:
            slope_rc = _wrongness(tile, bias).sigmoid_().mul_(slope_b[tile.rows, None])
            if tile.matched:
                slope_rc.diagonal().neg_()
            bias_grad.add_(slope_rc.sum())
            return slope_rc

        image_grad_be, text_grad_be = _Scores(image_be * scale, text_be, ids_bg, ctx.world).pull_back(slope)
        scale_grad = (image_grad_be * image_be).sum().view_as(scale)
        return image_grad_be.mul_(scale), text_grad_be, scale_grad, bias_grad, None, None


def _wrongness(tile: _Tile, bias: Tensor) -> Tensor:
    """-z (score + bias) in the tile's place: the logit of being wrong about a pair."""
    logits_rc = tile.scores_rc.add_(bias)
    if tile.matched:
        logits_rc.diagonal().neg_()
    return logits_rc
