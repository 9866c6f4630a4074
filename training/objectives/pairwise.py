"""Exact losses over all pairs of the global batch, in memory that grows with neither the batch squared nor the world.

The forward pass reduces each tile of `scores` to a few numbers per image and per text, and the backward pass recomputes
the tiles. Only this rank's features and O(b) numbers are saved in between. Each score is computed by one rank only, the
one that holds the image: the softmax over the texts of an image is local, and the softmax over the images of a text is
reduced from the partial sums of all ranks (as in Inf-CL, arXiv 2410.17243, which traverses the scores twice).

An excluded pair has the score -inf, which contributes nothing to a softmax in either direction or to a sum of sigmoids.

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
from .scores import GATHER_BUDGET, DotProducts, LateInteraction, Relations, Scores, Similarity, Tile


def softmax_losses(
    image_be: Tensor,
    text_ne: Tensor,
    scale: Tensor,
    relations: Relations,
    world: World,
    label_smoothing: float = 0.0,
    gather_budget: int = GATHER_BUDGET,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image among all texts [b], and of each text among all images [n]: InfoNCE.

        lse_j (s<x_i, y_j> + log v_j) - sum_j q_ij s<x_i, y_j>    and the same from texts to images

    The target q is distributed over the positives in proportion to their weights v, and a fraction `label_smoothing` of
    it over all candidates that are not excluded. An item without a positive (a hard negative) has loss 0. The features
    are those of this rank; they and `scale` [1] have the same float dtype. All ranks call it together with the same b
    and n; a rank holds `gather_budget` bytes of the texts of all at once, and as many of their gradients.
    Differentiable once, with respect to the features of all ranks and the scale; as in every objective, the gradient is
    that of the sum of the losses over all ranks.
    """
    losses: tuple[Tensor, Tensor] = _Softmax.apply(
        image_be, text_ne, scale, DotProducts, label_smoothing, gather_budget, world, *relations
    )
    return losses


def late_softmax_losses(
    image_bpe: Tensor,
    text_te: Tensor,
    lengths_n: Tensor,
    scale: Tensor,
    relations: Relations,
    world: World,
    label_smoothing: float = 0.0,
    gather_budget: int = GATHER_BUDGET,
) -> tuple[Tensor, Tensor]:
    """`softmax_losses` of token-wise maximum similarity (FILIP): the two directions have different scores.

    Every image has p tokens; texts are packed, text i has `lengths_n`[i] of the t tokens. Pass `lengths_n` on the CPU
    to avoid a host-device synchronisation.
    """
    lengths_wn = world.gather(lengths_n).view(world.size, -1).cpu()
    kind = partial(LateInteraction, lengths_wn=lengths_wn, rank=world.rank)
    losses: tuple[Tensor, Tensor] = _Softmax.apply(
        image_bpe, text_te, scale, kind, label_smoothing, gather_budget, world, *relations
    )
    return losses


def sigmoid_losses(
    image_be: Tensor,
    text_ne: Tensor,
    scale: Tensor,
    bias: Tensor,
    relations: Relations,
    world: World,
    label_smoothing: float = 0.0,
    gather_budget: int = GATHER_BUDGET,
) -> Tensor:
    """The sum of each image's binary cross-entropies with all texts: SigLIP (arXiv 2303.15343), a [b] vector.

        - sum_j v_j [ (1 - h) logsigmoid(z_ij l_ij) + h logsigmoid(-z_ij l_ij) ],    l_ij = s<x_i, y_j> + bias

    z = 1 for positives, else -1; v are the weights and h is half of `label_smoothing`. `bias` is [1]; the other
    arguments are those of `softmax_losses`.
    """
    losses_b: Tensor = _Sigmoid.apply(image_be, text_ne, scale, bias, label_smoothing, gather_budget, world, *relations)
    return losses_b


class _SoftmaxSums:
    """Running sums of the cross-entropies of the items of one side (images or texts), of any shape.

    For each softmax: the largest score and the sum of exp(score - largest), which together give its logsumexp. Kept
    separate they lose no precision when scores are around 100. The maximum starts at the lowest finite number, not at
    -inf, so that a difference of two maxima is never NaN.
    """

    def __init__(self, like: Tensor, *shape: int, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing
        self.top = like.new_full(shape, torch.finfo(like.dtype).min)
        # Sums of exp(score - top), of the positives' scores and weights, and of all scores and weights.
        self.sums = like.new_zeros(5 if label_smoothing else 3, *shape)

    def add(self, place: Any, scores_rc: Tensor, tile: Tile, weights: Tensor | None, dim: int) -> None:
        """Add a tile's scores, reduced along `dim`; `weights` [r, 1] or [1, c] are those of the items along it."""
        top, (total, matched, positives, *rest) = self.top[place], (s[place] for s in self.sums)
        # A weight v multiplies exp(score), so it is added to the score as log v; weight 0 becomes -inf: excluded.
        weighted_rc = scores_rc if weights is None else scores_rc + weights.log()
        # Online softmax: rescale the sum so far to the new maximum, then add this tile's terms.
        higher = torch.maximum(top, weighted_rc.amax(dim))
        total.mul_((top - higher).exp_()).add_((weighted_rc - higher.unsqueeze(dim)).exp_().sum(dim))
        top.copy_(higher)
        weight = scores_rc.new_ones(1) if weights is None else weights
        # Positives' scores are summed on the way, so the loss needs no second pass over the tiles.
        if tile.pairs:
            weight_d, along = weight.expand_as(scores_rc)[tile.pairs].diagonal(), tile.pairs[1 - dim]
            matched[along] += scores_rc[tile.pairs].diagonal() * weight_d
            positives[along] += weight_d
        elif tile.positive_rc is not None:
            # masked_fill, not a product with the mask: an excluded score is -inf, and -inf * 0 is NaN.
            matched.add_((scores_rc * weight).masked_fill_(~tile.positive_rc, 0.0).sum(dim))
            positives.add_((tile.positive_rc * weight).sum(dim))
        if rest:
            rest[0].add_((scores_rc * weight).masked_fill_(tile.excluded_rc, 0.0).sum(dim))
            rest[1].add_((~tile.excluded_rc * weight).sum(dim))

    def reduced(self, scores: Scores) -> _SoftmaxSums:
        """The sums of this rank's texts over all ranks, [a] -> [n]; all ranks call it together."""
        # Sums that refer to different maxima cannot be added: rescale each rank's to the global maximum first.
        world = scores.world
        highest_a = world.max(self.top)
        self.sums[0] *= (self.top - highest_a).exp_()
        mine = _SoftmaxSums(highest_a, 0, label_smoothing=self.label_smoothing)
        mine.top, mine.sums = scores.of_own(highest_a[None])[0], scores.of_own(world.sum(self.sums))
        return mine

    def losses(self) -> Tensor:
        """Cross-entropies; 0 for an item without positives."""
        total, matched, positives, *rest = self.sums
        target = matched / positives * (1 - self.label_smoothing)
        if rest:
            target = target + rest[0] / rest[1] * self.label_smoothing
        # Subtract target from top first: both are as large as a score, and their difference may be small.
        return (total.log() + (self.top - target)).masked_fill(positives == 0, 0.0)

    def slopes(self, slope: Tensor) -> Tensor:
        """[k, ...]: `top`, and the factors of exp(score - top), of positives and of all candidates in the gradient."""
        total, _, positives, *rest = self.sums
        slope = slope.masked_fill(positives == 0, 0.0)
        factors = [slope / total, (slope * (1 - self.label_smoothing) / positives).masked_fill(positives == 0, 0.0)]
        return torch.stack([self.top, *factors, *([slope * self.label_smoothing / rest[1]] if rest else [])])


class _Softmax(torch.autograd.Function):
    """Saves features and running sums; the backward pass recomputes the tiles of scores from the features."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        kind: Callable[[Tensor], Similarity],
        label_smoothing: float,
        gather_budget: int,
        world: World,
        *known: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        relations = Relations(*known)  # type: ignore[arg-type]
        images, texts = len(relations.image_ids_bg), len(relations.text_ids_ng)
        of_images = _SoftmaxSums(image, images, label_smoothing=label_smoothing)
        of_texts = _SoftmaxSums(image, world.size * texts, label_smoothing=label_smoothing)
        # One pass over this rank's rows of the score matrix serves both directions: complete for its images, partial
        # for the texts of all ranks, [a].
        scores = Scores(kind(image * scale), text, relations, world, gather_budget)
        for tile in scores.all_tiles():
            text_weights, image_weights = _weights(tile, relations)
            of_images.add(tile.rows, tile.image_rc, tile, text_weights, 1)
            of_texts.add(tile.place, tile.text_rc, tile, image_weights, 0)
        mine = of_texts.reduced(scores)
        ctx.world, ctx.kind, ctx.label_smoothing, ctx.gather_budget = world, kind, label_smoothing, gather_budget
        ctx.save_for_backward(image, text, scale, *known, of_images.top, of_images.sums, mine.top, mine.sums)
        return of_images.losses(), mine.losses()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, *known, image_top, image_sums, text_top, text_sums = ctx.saved_tensors
        world: World = ctx.world
        relations = Relations(*known)
        factors = []
        for top, sums, slope in ((image_top, image_sums, slopes[0]), (text_top, text_sums, slopes[1])):
            side = _SoftmaxSums(top, 0, label_smoothing=ctx.label_smoothing)
            side.top, side.sums = top, sums
            factors.append(side.slopes(slope))
        of_images_kb = factors[0]
        # Scores are products with scaled images, so their gradient gives d loss / d scale too: no second pass.
        scaled = image * scale
        scores = Scores(ctx.kind(scaled), text, relations, world, ctx.gather_budget)
        # This rank computes the scores of its images with all texts, so it needs the factors of the texts of all ranks.
        of_texts_wkn = world.gather(factors[1]).view(world.size, *factors[1].shape)
        of_texts_ka = scores.in_groups(of_texts_wkn.transpose(1, 2)).T

        def slopes_of(tile: Tile) -> tuple[Tensor, Tensor]:
            image_k, text_k = of_images_kb[:, tile.rows, None].unbind(0), of_texts_ka[:, tile.place].unbind(0)
            text_weights, image_weights = _weights(tile, relations)
            # For dot products image_rc and text_rc are one tensor: copy it first, overwrite it second.
            image_rc = _weighted_exp(tile.image_rc - image_k[0], text_weights).mul_(image_k[1])
            text_rc = _weighted_exp(tile.text_rc.sub_(text_k[0]), image_weights)
            if tile.text_rc is tile.image_rc:
                image_rc = text_rc = image_rc.addcmul_(text_rc, text_k[1])
                _subtract_targets(image_rc, tile, (image_k, text_weights), (text_k, image_weights))
            else:
                _subtract_targets(image_rc, tile, (image_k, text_weights))
                _subtract_targets(text_rc.mul_(text_k[1]), tile, (text_k, image_weights))
            return image_rc, text_rc

        image_grad, text_grad = scores.backward(scaled, slopes_of)
        scale_grad = (image_grad * image).sum().view_as(scale)
        return image_grad.mul_(scale), text_grad, scale_grad, *[None] * (4 + len(known))


def _weights(tile: Tile, relations: Relations) -> tuple[Tensor | None, Tensor | None]:
    """Weights of a tile's texts [c] and of its images [r, 1]; None: all 1."""
    texts, images = tile.group.weights_m, relations.image_weights_b
    return (
        None if texts is None else texts[tile.columns],
        None if images is None else images[tile.rows, None],
    )


def _weighted_exp(scores_rc: Tensor, weights: Tensor | None) -> Tensor:
    """weight * exp(score), in place; exactly 0 where the weight is 0, however large the score."""
    return (scores_rc if weights is None else scores_rc.add_(weights.log())).exp_()


def _subtract_targets(slope_rc: Tensor, tile: Tile, *sides: tuple[Sequence[Tensor], Tensor | None]) -> None:
    """Subtract the targets from softmax gradients, in place; `sides`: factors of `_SoftmaxSums.slopes`, and weights."""
    matched, *smoothed = (
        sum(k[part] if weights is None else k[part] * weights for k, weights in sides)
        for part in range(2, len(sides[0][0]))
    )
    if tile.pairs:
        target_rc = torch.as_tensor(matched).expand_as(slope_rc)
        slope_rc[tile.pairs].diagonal().sub_(target_rc[tile.pairs].diagonal())
    elif tile.positive_rc is not None:
        slope_rc.sub_(torch.where(tile.positive_rc, matched, 0.0))
    for everywhere in smoothed:  # label smoothing gives a part of the target to every pair that is not excluded
        slope_rc.sub_(torch.where(tile.excluded_rc, 0.0, everywhere))


class _Sigmoid(torch.autograd.Function):
    """A sum of sigmoids has no normaliser: only the inputs are saved, and nothing is reduced over ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        image_be: Tensor,
        text_ne: Tensor,
        scale: Tensor,
        bias: Tensor,
        label_smoothing: float,
        gather_budget: int,
        world: World,
        *known: Tensor | None,
    ) -> Tensor:
        relations = Relations(*known)  # type: ignore[arg-type]
        losses_b = image_be.new_zeros(len(image_be))
        for tile in Scores(DotProducts(image_be * scale), text_ne, relations, world, gather_budget).all_tiles():
            error_rc = _error_logits(tile, bias)
            if label_smoothing:  # (1 - h) logsigmoid(-x) + h logsigmoid(x) = logsigmoid(-x) + h x
                losses_b[tile.rows] -= _times_text_weights(
                    error_rc.masked_fill(tile.excluded_rc, 0.0) * (label_smoothing / 2), tile
                ).sum(1)
            losses_b[tile.rows] -= _times_text_weights(F.logsigmoid(error_rc.neg_()), tile).sum(1)
        ctx.world, ctx.label_smoothing, ctx.gather_budget = world, label_smoothing, gather_budget
        ctx.save_for_backward(image_be, text_ne, scale, bias, *known)
        return losses_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        image_be, text_ne, scale, bias, *known = ctx.saved_tensors
        slope_b, bias_grad, relations = slopes[0], torch.zeros_like(bias), Relations(*known)

        def slopes_of(tile: Tile) -> tuple[Tensor, Tensor]:
            # -logsigmoid(-x) has the derivative sigmoid(x) in the error logit x = -z (score + bias).
            slope_rc = _error_logits(tile, bias).sigmoid_()
            if ctx.label_smoothing:
                slope_rc.sub_(ctx.label_smoothing / 2).masked_fill_(tile.excluded_rc, 0.0)
            slope_rc = _times_text_weights(slope_rc.mul_(slope_b[tile.rows, None]), tile)
            slope_rc = _negate_positives(slope_rc, tile)  # from x back to the score: times -z
            bias_grad.add_(slope_rc.sum())
            return slope_rc, slope_rc

        scaled = image_be * scale
        scores = Scores(DotProducts(scaled), text_ne, relations, ctx.world, ctx.gather_budget)
        image_grad_be, text_grad_ne = scores.backward(scaled, slopes_of)
        scale_grad = (image_grad_be * image_be).sum().view_as(scale)
        return image_grad_be.mul_(scale), text_grad_ne, scale_grad, bias_grad, *[None] * (3 + len(known))


def _error_logits(tile: Tile, bias: Tensor) -> Tensor:
    """-z (score + bias), in place where possible: the logit of classifying the pair wrongly."""
    return _negate_positives(tile.image_rc.add_(bias), tile)


def _negate_positives(values_rc: Tensor, tile: Tile) -> Tensor:
    """The values with those of positives negated, in place where possible."""
    if tile.positive_rc is not None:
        return torch.where(tile.positive_rc, -values_rc, values_rc)
    if tile.pairs:
        values_rc[tile.pairs].diagonal().neg_()
    return values_rc


def _times_text_weights(values_rc: Tensor, tile: Tile) -> Tensor:
    """The values times the weights of the texts."""
    return values_rc if tile.group.weights_m is None else values_rc * tile.group.weights_m[tile.columns]
