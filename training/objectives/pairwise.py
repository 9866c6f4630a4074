"""Losses over all pairs of the global batch, exact, in memory that grows with neither the batch squared nor the world.

The forward pass folds each tile of `scores` into a few numbers per image and per text, and the backward pass makes the
tiles once more; what is saved in between is the rank's own features and O(b) numbers. Every score of the world is made
by one rank only: the softmax over the texts of an image is local, the one over the images of a text is put together
from the parts of all ranks (as in Inf-CL, arXiv 2410.17243, which walks twice).

A pair that is left out has the score -inf, which is neutral in a softmax over images or texts as in a sum of sigmoids.

Shape suffixes: b images and n texts of this rank, w ranks, r rows and c columns of a tile, e channels of the joint
space, p tokens of an image, t tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..world import World
from .scores import Dots, Kind, LateInteraction, Relations, Scores, Tile


def softmax_losses(
    image_be: Tensor, text_ne: Tensor, scale: Tensor, relations: Relations, world: World, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image among all texts [b], and of each text among all images [n]: InfoNCE.

        lse_j (s<x_i, y_j> + log v_j) - sum_j q_ij s<x_i, y_j>    and the same from texts to images

    q is spread over the positives, in proportion to their weights v, and a fraction `label_smoothing` of it over all
    that is not left out. An item without a positive (a hard negative) has loss 0. Features of this rank and `scale`
    [1], all of one float dtype. All ranks call it together with the same b and n. Differentiable once, in the features
    of all ranks and the scale: as everywhere in objectives, the gradient is that of the sum over ranks.
    """
    found: tuple[Tensor, Tensor] = _Softmax.apply(image_be, text_ne, scale, Dots, label_smoothing, world, *relations)
    return found


def late_softmax_losses(
    image_bpe: Tensor,
    text_te: Tensor,
    lengths_n: Tensor,
    scale: Tensor,
    relations: Relations,
    world: World,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`softmax_losses` of token-wise maximum similarity (FILIP): each direction has scores of its own.

    Every image has p tokens; texts are packed, text i has `lengths_n`[i] of the t tokens. With lengths on the host the
    device is not waited for.
    """
    lengths_wn = world.gather(lengths_n).view(world.size, -1)
    longest, most = int(lengths_wn.max()), int(lengths_wn.sum(1).max())
    lengths_wn = lengths_wn.to(text_te.device, non_blocking=True)
    kind = partial(LateInteraction, lengths_wn=lengths_wn, longest=longest)
    text_te = LateInteraction.padded(text_te, most)
    found: tuple[Tensor, Tensor] = _Softmax.apply(image_bpe, text_te, scale, kind, label_smoothing, world, *relations)
    return found


def sigmoid_losses(
    image_be: Tensor,
    text_ne: Tensor,
    scale: Tensor,
    bias: Tensor,
    relations: Relations,
    world: World,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Each image's binary cross-entropies with all texts, summed: SigLIP (arXiv 2303.15343), a [b] vector.

        - sum_j v_j [ (1 - h) logsigmoid(z_ij l_ij) + h logsigmoid(-z_ij l_ij) ],    l_ij = s<x_i, y_j> + bias

    z = 1 for positives, else -1; v are the weights and h half of `label_smoothing`. `bias` is [1]; the rest as in
    `softmax_losses`.
    """
    losses_b: Tensor = _Sigmoid.apply(image_be, text_ne, scale, bias, label_smoothing, world, *relations)
    return losses_b


class _Folded:
    """What is left of all scores of the items of one side, any shape: the parts of their cross-entropies.

    Of each softmax the largest score and the sum of exp(score - largest), which together are its lse: kept apart they
    lose nothing to rounding when the scores are around 100. The largest of no scores is the lowest finite number, for
    which no difference is NaN.
    """

    def __init__(self, like: Tensor, *shape: int, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.top = like.new_full(shape, torch.finfo(like.dtype).min)
        # Of exp(score - top); of the positives' scores and weights; of all scores and weights.
        self.sums = like.new_zeros(5 if label_smoothing else 3, *shape)

    def add(self, place: Any, scores_rc: Tensor, tile: Tile, weights: Tensor | None, dim: int) -> None:
        """Fold in a tile's scores along `dim`; `weights` [r, 1] or [1, c] are of the items along it."""
        top, (total, matched, positives, *rest) = self.top[place], (s[place] for s in self.sums)
        weighted_rc = scores_rc if weights is None else scores_rc + weights.log()
        higher = torch.maximum(top, weighted_rc.amax(dim))
        total.mul_((top - higher).exp_()).add_((weighted_rc - higher.unsqueeze(dim)).exp_().sum(dim))
        top.copy_(higher)
        weight = scores_rc.new_ones(1) if weights is None else weights
        if tile.diagonal:
            weight_d = weight.expand_as(scores_rc).diagonal()
            matched[: len(weight_d)] += scores_rc.diagonal() * weight_d
            positives[: len(weight_d)] += weight_d
        elif tile.positive_rc is not None:
            matched.add_((scores_rc * weight).masked_fill_(~tile.positive_rc, 0.0).sum(dim))
            positives.add_((tile.positive_rc * weight).sum(dim))
        if rest:
            rest[0].add_((scores_rc * weight).masked_fill_(tile.out_rc, 0.0).sum(dim))
            rest[1].add_((~tile.out_rc * weight).sum(dim))

    def of_rank(self, world: World) -> _Folded:
        """Those of this rank's items, put together from what all ranks have of them, [w, n] -> [n]."""
        highest_wn = world.max(self.top)
        self.sums[0] *= (self.top - highest_wn).exp_()
        mine = _Folded(highest_wn, 0, label_smoothing=self.label_smoothing)
        mine.top, mine.sums = highest_wn[world.rank].clone(), world.sum(self.sums)[:, world.rank].clone()
        return mine

    def losses(self) -> Tensor:
        """Cross-entropies; 0 for items without positives."""
        total, matched, positives, *rest = self.sums
        target = matched / positives * (1 - self.label_smoothing)
        if rest:
            target = target + rest[0] / rest[1] * self.label_smoothing
        return (total.log() + (self.top - target)).masked_fill(positives == 0, 0.0)

    def slopes(self, slope: Tensor) -> Tensor:
        """[k, ...]: the top, and what exp(score - top), positives and all are multiplied by in the gradient."""
        total, _, positives, *rest = self.sums
        slope = slope.masked_fill(positives == 0, 0.0)
        factors = [slope / total, (slope * (1 - self.label_smoothing) / positives).masked_fill(positives == 0, 0.0)]
        return torch.stack([self.top, *factors, *([slope * self.label_smoothing / rest[1]] if rest else [])])


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        kind: Callable[[Tensor], Kind],
        label_smoothing: float,
        world: World,
        *known: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        relations = Relations(*known)  # type: ignore[arg-type]
        images, texts = len(relations.image_ids_bg), len(relations.text_ids_ng)
        of_images = _Folded(image, images, label_smoothing=label_smoothing)
        of_texts = _Folded(image, world.size, texts, label_smoothing=label_smoothing)
        for tile in Scores(kind(image * scale), text, relations, world).all_tiles():
            text_weights, image_weights = _weights(tile, relations)
            of_images.add(tile.rows, tile.image_rc, tile, text_weights, 1)
            of_texts.add(tile.place, tile.text_rc, tile, image_weights, 0)
        mine = of_texts.of_rank(world)
        ctx.world, ctx.kind, ctx.label_smoothing = world, kind, label_smoothing
        ctx.save_for_backward(image, text, scale, *known, of_images.top, of_images.sums, mine.top, mine.sums)
        return of_images.losses(), mine.losses()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, *known, image_top, image_sums, text_top, text_sums = ctx.saved_tensors
        world: World = ctx.world
        relations = Relations(*known)
        folded = []
        for top, sums, slope in ((image_top, image_sums, slopes[0]), (text_top, text_sums, slopes[1])):
            side = _Folded(top, 0, label_smoothing=ctx.label_smoothing)
            side.top, side.sums = top, sums
            folded.append(side.slopes(slope))
        of_images_kb = folded[0]
        of_texts_wkn = world.gather(folded[1]).view(world.size, *folded[1].shape)

        def slopes_of(tile: Tile) -> tuple[Tensor, Tensor]:
            image_k, text_k = (
                of_images_kb[:, tile.rows, None].unbind(0),
                of_texts_wkn[tile.block.rank, :, tile.columns].unbind(0),
            )
            text_weights, image_weights = _weights(tile, relations)
            image_rc = _softened(tile.image_rc - image_k[0], text_weights).mul_(image_k[1])
            text_rc = _softened(tile.text_rc.sub_(text_k[0]), image_weights)
            if tile.text_rc is tile.image_rc:
                image_rc = text_rc = image_rc.addcmul_(text_rc, text_k[1])
                _take_targets(image_rc, tile, (image_k, text_weights), (text_k, image_weights))
            else:
                _take_targets(image_rc, tile, (image_k, text_weights))
                _take_targets(text_rc.mul_(text_k[1]), tile, (text_k, image_weights))
            return image_rc, text_rc

        scaled = image * scale
        image_grad, text_grad = Scores(ctx.kind(scaled), text, relations, world).pull_back(scaled, slopes_of)
        scale_grad = (image_grad * image).sum().view_as(scale)
        return image_grad.mul_(scale), text_grad, scale_grad, *[None] * (3 + len(known))


def _weights(tile: Tile, relations: Relations) -> tuple[Tensor | None, Tensor | None]:
    """Weights of a tile's texts [c] and of its images [r, 1]."""
    texts, images = tile.block.weights_n, relations.image_weights_b
    return (
        None if texts is None else texts[tile.columns],
        None if images is None else images[tile.rows, None],
    )


def _softened(scores_rc: Tensor, weights: Tensor | None) -> Tensor:
    """weight * exp(score) in the scores' place; a weight of 0 beats any score."""
    return (scores_rc if weights is None else scores_rc.add_(weights.log())).exp_()


def _take_targets(slope_rc: Tensor, tile: Tile, *sides: tuple[Sequence[Tensor], Tensor | None]) -> None:
    """Subtract from slopes, in place, the parts of the targets: factors of `_Folded.slopes`, and weights."""
    matched, *spread = (
        sum(k[part] if weights is None else k[part] * weights for k, weights in sides)
        for part in range(2, len(sides[0][0]))
    )
    if tile.diagonal:
        slope_rc.diagonal().sub_(torch.as_tensor(matched).expand_as(slope_rc).diagonal())
    elif tile.positive_rc is not None:
        slope_rc.sub_(torch.where(tile.positive_rc, matched, 0.0))
    for everywhere in spread:
        slope_rc.sub_(torch.where(tile.out_rc, 0.0, everywhere))


class _Sigmoid(torch.autograd.Function):
    """A sum over scores has no normaliser: nothing is saved but the inputs, and no numbers are put together."""

    @staticmethod
    def forward(
        ctx: Any,
        image_be: Tensor,
        text_ne: Tensor,
        scale: Tensor,
        bias: Tensor,
        label_smoothing: float,
        world: World,
        *known: Tensor | None,
    ) -> Tensor:
        relations = Relations(*known)  # type: ignore[arg-type]
        losses_b = image_be.new_zeros(len(image_be))
        for tile in Scores(Dots(image_be * scale), text_ne, relations, world).all_tiles():
            wrong_rc = _wrongness(tile, bias)
            if label_smoothing:
                losses_b[tile.rows] -= _weighed(
                    wrong_rc.masked_fill(tile.out_rc, 0.0) * (label_smoothing / 2), tile
                ).sum(1)
            losses_b[tile.rows] -= _weighed(F.logsigmoid(wrong_rc.neg_()), tile).sum(1)
        ctx.world, ctx.label_smoothing = world, label_smoothing
        ctx.save_for_backward(image_be, text_ne, scale, bias, *known)
        return losses_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        image_be, text_ne, scale, bias, *known = ctx.saved_tensors
        slope_b, bias_grad, relations = slopes[0], torch.zeros_like(bias), Relations(*known)

        def slopes_of(tile: Tile) -> tuple[Tensor, Tensor]:
            slope_rc = _wrongness(tile, bias).sigmoid_()
            if ctx.label_smoothing:
                slope_rc.sub_(ctx.label_smoothing / 2).masked_fill_(tile.out_rc, 0.0)
            slope_rc = _weighed(slope_rc.mul_(slope_b[tile.rows, None]), tile)
            slope_rc = _turned(slope_rc, tile)
            bias_grad.add_(slope_rc.sum())
            return slope_rc, slope_rc

        scaled = image_be * scale
        scores = Scores(Dots(scaled), text_ne, relations, ctx.world)
        image_grad_be, text_grad_ne = scores.pull_back(scaled, slopes_of)
        scale_grad = (image_grad_be * image_be).sum().view_as(scale)
        return image_grad_be.mul_(scale), text_grad_ne, scale_grad, bias_grad, *[None] * (2 + len(known))


def _wrongness(tile: Tile, bias: Tensor) -> Tensor:
    """-z (score + bias), in the tile's place where it can: the logit of being wrong about a pair."""
    return _turned(tile.image_rc.add_(bias), tile)


def _turned(values_rc: Tensor, tile: Tile) -> Tensor:
    """Values of positives times -1, in place where it can."""
    if tile.positive_rc is not None:
        return torch.where(tile.positive_rc, -values_rc, values_rc)
    if tile.diagonal:
        values_rc.diagonal().neg_()
    return values_rc


def _weighed(values_rc: Tensor, tile: Tile) -> Tensor:
    """Times the weights of the texts."""
    return values_rc if tile.block.weights_n is None else values_rc * tile.block.weights_n[tile.columns]
