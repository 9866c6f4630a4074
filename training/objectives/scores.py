"""Scores of this rank's images with the texts of all ranks, computed tile by tile and never stored.

Texts arrive one rank's block at a time, so a rank holds its own features, a few blocks of that size, and one tile. A
score is either the dot product of two embeddings (`DotProducts`) or the late interaction of their tokens
(`LateInteraction`). Everything else is given by the `Relations` of the items and is the same for both: which pairs are
positives, which are excluded, and the weight of each item.

Shape suffixes: b images of this rank, n texts of this rank, w ranks, r rows (images) and c columns (texts) of a tile,
e channels of the joint space, g kinds of ids, p tokens of an image, t tokens of all texts, l tokens of one text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..world import World

TILE_BYTES = 4 << 20
"""size of one tile of scores: 1024 x 1024 in fp32"""


class Relations(NamedTuple):
    """Ids, labels and weights of the images and texts of a rank. By default only the ids have an effect."""

    image_ids_bg: Tensor
    """int64 [b, g], g may be 0: an image and a text with an equal id in any of the g columns are not negatives"""
    text_ids_ng: Tensor
    """int64 [n, g]: the same for texts"""
    image_labels_b: Tensor | None = None
    """int64 [b]: an image and a text with equal labels, on any ranks, are positives; None: text i is the positive of
    image i, and texts from b on are hard negatives"""
    text_labels_n: Tensor | None = None
    """int64 [n]: the same for texts; given if and only if the images have labels"""
    image_weights_b: Tensor | None = None
    """[b], in the features' dtype: the weight of an image among the images of a text; 0: excluded; None: all 1"""
    text_weights_n: Tensor | None = None
    """[n]: the same for texts"""

    @staticmethod
    def of(ids_bg: Tensor) -> Relations:
        """Relations of pairs: image i and text i have the ids `ids_bg`[i]."""
        return Relations(ids_bg, ids_bg)


class Tile(NamedTuple):
    """The scores of some images of this rank with some texts of one rank."""

    block: TileBlock
    rows: slice
    columns: slice
    image_rc: Tensor
    """scores of the images with the texts, -inf for excluded pairs; the consumer may overwrite it"""
    text_rc: Tensor
    """scores of the texts with the images; for dot products the same tensor as `image_rc`, so overwrite it last"""
    diagonal: bool
    """whether the pairs on the diagonal are the positives (only without labels)"""
    positive_rc: Tensor | None
    """bool: the positives by label; None: no labels"""
    excluded_rc: Tensor
    """bool: excluded pairs"""
    argmax: tuple[Tensor, ...]
    """indices of the maxima, kept for the backward pass of late interaction"""

    @property
    def place(self) -> tuple[int, slice]:
        """Index of the tile's texts in a tensor [w, n]."""
        return self.block.rank, self.columns


class TileBlock(NamedTuple):
    """The texts of one rank, with their relations."""

    rank: int
    text: Tensor
    ids_ng: Tensor
    labels_n: Tensor | None
    weights_n: Tensor | None


class Similarity(Protocol):
    """How a score is computed, and its gradient. The images it holds are multiplied by the temperature already."""

    def tile_side(self) -> int:
        """Number of images, and of texts, in a tile."""
        ...

    def tile(self, block: TileBlock, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Scores [r, c] of images with texts, scores of texts with images, and indices that `add_gradients` needs."""
        ...

    def add_gradients(
        self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        """Add a tile's part to the gradients of all images and of the block's texts, given d loss / d scores.

        Where both scores are one tensor, `image_rc` and `text_rc` are one too: the sum of both gradients.
        """
        ...


@dataclass(frozen=True)
class DotProducts:
    """The dot product of an image embedding and a text embedding."""

    image_be: Tensor

    def tile_side(self) -> int:
        return max(1, math.isqrt(TILE_BYTES // self.image_be.element_size()))

    def tile(self, block: TileBlock, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        scores_rc = self.image_be[rows] @ block.text[columns].T
        return scores_rc, scores_rc, ()

    def add_gradients(
        self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        image_grad[tile.rows].addmm_(image_rc, tile.block.text[tile.columns])
        text_grad[tile.columns].addmm_(image_rc.T, self.image_be[tile.rows])


class LateInteraction:
    """FILIP's scores (Yao et al., arXiv 2111.07783): each token takes its best match among the other side's tokens.

        image with text: mean over the image's tokens of max over the text's;   text with image: the reverse

    Images are [b, p, e]. Texts are packed [t, e]; `lengths_wn` gives the number of tokens of each text of each rank, at
    most `longest`. `padded` pads a rank's texts to the largest number of tokens of any rank, so that blocks have one
    shape.
    """

    def __init__(self, image_bpe: Tensor, lengths_wn: Tensor, longest: int) -> None:
        self.image_bpe = image_bpe
        self.lengths_wn = lengths_wn
        self.starts_wn = lengths_wn.cumsum(1) - lengths_wn
        self.longest = longest

    @staticmethod
    def padded(text_te: Tensor, most: int) -> Tensor:
        """The packed texts [t, e] of a rank, zero-padded to `most` tokens."""
        return torch.cat([text_te, text_te.new_zeros(most - len(text_te), text_te.shape[1])])

    def tile_side(self) -> int:
        _, tokens, _ = self.image_bpe.shape
        return max(1, math.isqrt(TILE_BYTES // (self.image_bpe.element_size() * tokens * self.longest)))

    def _places(self, block: TileBlock, columns: slice) -> tuple[Tensor, Tensor]:
        """Positions [c, l] of the tokens of some texts in the packed stream, and a mask [c, l] of the real ones."""
        lengths_c, starts_c = self.lengths_wn[block.rank, columns], self.starts_wn[block.rank, columns]
        within_l = torch.arange(self.longest, device=lengths_c.device)
        real_cl = within_l < lengths_c[:, None]
        return torch.where(real_cl, starts_c[:, None] + within_l, 0), real_cl

    def tile(self, block: TileBlock, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        places_cl, real_cl = self._places(block, columns)
        image_rpe, text_cle = self.image_bpe[rows], block.text[places_cl]
        # Padding of a text must never be the best match of a patch.
        match_rpcl = torch.einsum("rpe,cle->rpcl", image_rpe, text_cle).masked_fill_(~real_cl, float("-inf"))
        best_rpc, token_rpc = match_rpcl.max(3)
        best_rcl, patch_rcl = match_rpcl.max(1)
        lengths_c = real_cl.sum(1)
        return best_rpc.mean(1), best_rcl.masked_fill_(~real_cl, 0.0).sum(2) / lengths_c, (token_rpc, patch_rcl)

    def add_gradients(
        self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        places_cl, real_cl = self._places(tile.block, tile.columns)
        token_rpc, patch_rcl = tile.argmax
        image_rpe, text_cle = self.image_bpe[tile.rows], tile.block.text[places_cl]
        (r, p, _), (c, longest, e) = image_rpe.shape, text_cle.shape
        # A maximum passes its gradient to one pair of tokens: scatter both directions into one matrix, so that two
        # products give both gradients.
        slope_rpcl = image_rpe.new_zeros(r, p, c, longest)
        slope_rpcl.scatter_(3, token_rpc[..., None], (image_rc / p)[:, None, :, None].expand(r, p, c, 1))
        per_token_rcl = (text_rc / real_cl.sum(1))[..., None] * real_cl
        slope_rpcl.scatter_add_(1, patch_rcl[:, None], per_token_rcl[:, None])
        slope = slope_rpcl.view(r * p, c * longest)
        image_grad[tile.rows] += (slope @ text_cle.reshape(-1, e)).view(r, p, e)
        text_grad.index_add_(0, places_cl.flatten(), slope.T @ image_rpe.reshape(-1, e))


@dataclass(frozen=True)
class Scores:
    """All scores of this rank's images with the texts of all ranks."""

    kind: Similarity
    text: Tensor
    """this rank's texts, of the same shape on all ranks"""
    relations: Relations
    world: World

    def blocks(self) -> Iterator[TileBlock]:
        """The texts of each rank in turn; all ranks iterate together."""
        relations, world = self.relations, self.world

        # Ids, labels and weights are small: gather them once. Features come one rank at a time.
        def of_all_ranks(own: Tensor | None) -> list[Any]:
            return [None] * world.size if own is None else list(world.gather(own).view(world.size, *own.shape))

        fields = (relations.text_ids_ng, relations.text_labels_n, relations.text_weights_n)
        by_rank = list(zip(*map(of_all_ranks, fields), strict=True))
        for rank, text in enumerate(world.each(self.text)):
            yield TileBlock(rank, text, *by_rank[rank])

    def tiles(self, block: TileBlock) -> Iterator[Tile]:
        """The scores with one rank's texts, tile by tile."""
        side, relations = self.kind.tile_side(), self.relations
        for rows in _slices(len(relations.image_ids_bg), side):
            for columns in _slices(len(block.ids_ng), side):
                image_rc, text_rc, argmax = self.kind.tile(block, rows, columns)
                # Pairs with a common id are not negatives; positives are then put back.
                excluded_rc = _equal_in_any(relations.image_ids_bg[rows], block.ids_ng[columns])
                positive_rc, diagonal = None, False
                if relations.image_labels_b is not None and block.labels_n is not None:
                    positive_rc = relations.image_labels_b[rows, None] == block.labels_n[columns]
                    excluded_rc &= ~positive_rc
                elif block.rank == self.world.rank and rows.start == columns.start:
                    # Tiles are square and cut at the same places, so pair i with i lies on a tile's diagonal.
                    diagonal = True
                    excluded_rc.fill_diagonal_(False)
                for scores_rc in (image_rc,) if image_rc is text_rc else (image_rc, text_rc):
                    scores_rc.masked_fill_(excluded_rc, float("-inf"))
                yield Tile(block, rows, columns, image_rc, text_rc, diagonal, positive_rc, excluded_rc, argmax)

    def all_tiles(self) -> Iterator[Tile]:
        """The scores with the texts of all ranks, tile by tile."""
        for block in self.blocks():
            yield from self.tiles(block)

    def backward(self, image: Tensor, slopes: Callable[[Tile], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Gradients of `image` (the scaled images) and `text`; `slopes` gives d loss / d scores of a tile.

        The texts' gradient is the sum over all ranks; the images' needs no reduction.
        """
        image_grad, text_grad = torch.zeros_like(image), self.text.new_empty(0)
        wait: Callable[[], object] | None = None
        for block in self.blocks():
            part = torch.zeros_like(block.text)
            for tile in self.tiles(block):
                self.kind.add_gradients(tile, *slopes(tile), image_grad, part)
            # The previous block's reduction ran while this block's tiles were computed; one is in flight at a time.
            if wait:
                wait()
            wait = self.world.sum_to(block.rank, part)
            if block.rank == self.world.rank:
                text_grad = part
        if wait:
            wait()
        return image_grad, text_grad


def _slices(items: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, items)) for start in range(0, items, side)]


def _equal_in_any(ids_rg: Tensor, ids_cg: Tensor) -> Tensor:
    """bool [r, c]: which pairs have an equal id in any column."""
    same_rc = torch.zeros(len(ids_rg), len(ids_cg), dtype=torch.bool, device=ids_rg.device)
    for ids_r, ids_c in zip(ids_rg.unbind(1), ids_cg.unbind(1), strict=True):
        same_rc |= ids_r[:, None] == ids_c
    return same_rc
