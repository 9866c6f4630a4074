"""Scores of this rank's images with the texts of all ranks, walked through tile by tile and never kept.

Texts come by a rank's n at a time, so a rank holds its own features, a few blocks of that size, and one tile. What a
score is, is one of two things: the dot product of two embeddings (`Dots`), or the late interaction of their tokens
(`LateInteraction`). Everything else, which pairs belong together, which are left out and what counts how often, is said
by the `Relations` of the items and is the same for both.

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
"""of one tile of scores: 1024 x 1024 in fp32"""


class Relations(NamedTuple):
    """What is known of the images and texts of a rank beside their features. All but the ids is neutral by default."""

    image_ids_bg: Tensor
    """int64 [b, g], g from 0 on: an image and a text that share an id of any kind are no negatives of each other"""
    text_ids_ng: Tensor
    """int64 [n, g]"""
    image_labels_b: Tensor | None = None
    """int64 [b]: an image and a text of equal label, wherever they are, are positives; left out, text i is the positive
    of image i, and texts from b on are hard negatives"""
    text_labels_n: Tensor | None = None
    """int64 [n], given if those of the images are"""
    image_weights_b: Tensor | None = None
    """[b], of the features' dtype: how many times an image counts among the images of a text; 0: it is not there"""
    text_weights_n: Tensor | None = None
    """[n]: the same for texts"""

    @staticmethod
    def of(ids_bg: Tensor) -> Relations:
        """Of pairs that share their ids."""
        return Relations(ids_bg, ids_bg)


class Tile(NamedTuple):
    """Some images with some texts."""

    block: TileBlock
    rows: slice
    columns: slice
    image_rc: Tensor
    """scores of the images with the texts, -inf for what is left out; the reader's own, to work in"""
    text_rc: Tensor
    """scores of the texts with the images: of dot products the same tensor, so it must be used up last"""
    diagonal: bool
    """whether the pairs of the diagonal belong together, where no labels say which do"""
    positive_rc: Tensor | None
    """bool: which pairs belong together by their labels"""
    out_rc: Tensor
    """bool: left out"""
    argmax: tuple[Tensor, ...]
    """what the kind of scores wants to see again in its backward pass"""

    @property
    def place(self) -> tuple[int, slice]:
        """Of the texts in a tensor [w, n]."""
        return self.block.rank, self.columns


class TileBlock(NamedTuple):
    """The texts of one rank."""

    rank: int
    text: Tensor
    ids_ng: Tensor
    labels_n: Tensor | None
    weights_n: Tensor | None


class Kind(Protocol):
    """What a score is. Images are scaled already."""

    def side(self) -> int:
        """Images, and texts, of a tile."""
        ...

    def tile(self, block: TileBlock, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Scores [r, c] of images with texts and of texts with images, and what `pull` wants."""
        ...

    def pull(self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor) -> None:
        """Add to the gradients of all images and of the block's texts, given the slopes in the scores of a tile.

        Where both scores are one tensor so are the slopes: their sum.
        """
        ...


@dataclass(frozen=True)
class Dots:
    """One embedding each, and its dot product with the other."""

    image_be: Tensor

    def side(self) -> int:
        return max(1, math.isqrt(TILE_BYTES // self.image_be.element_size()))

    def tile(self, block: TileBlock, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        scores_rc = self.image_be[rows] @ block.text[columns].T
        return scores_rc, scores_rc, ()

    def pull(self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor) -> None:
        image_grad[tile.rows].addmm_(image_rc, tile.block.text[tile.columns])
        text_grad[tile.columns].addmm_(image_rc.T, self.image_be[tile.rows])


class LateInteraction:
    """FILIP's scores (Yao et al., arXiv 2111.07783): each token finds its best match among the other side's tokens.

        image with text: mean over the image's tokens of max over the text's;   text with image: the reverse

    Images are [b, p, e]. Texts are packed [t, e] and `lengths_wn` says how many tokens each text of each rank has, at
    most `longest`; a rank with fewer tokens than another has its own filled up behind the last, by `padded`.
    """

    def __init__(self, image_bpe: Tensor, lengths_wn: Tensor, longest: int) -> None:
        self.image_bpe = image_bpe
        self.lengths_wn = lengths_wn
        self.starts_wn = lengths_wn.cumsum(1) - lengths_wn
        self.longest = longest

    @staticmethod
    def padded(text_te: Tensor, most: int) -> Tensor:
        """The packed texts of a rank, as many tokens as any rank has."""
        return torch.cat([text_te, text_te.new_zeros(most - len(text_te), text_te.shape[1])])

    def side(self) -> int:
        _, tokens, _ = self.image_bpe.shape
        return max(1, math.isqrt(TILE_BYTES // (self.image_bpe.element_size() * tokens * self.longest)))

    def _places(self, block: TileBlock, columns: slice) -> tuple[Tensor, Tensor]:
        """Where the tokens of some texts are in the stream, [c, l], and which of those are tokens of the text."""
        lengths_c, starts_c = self.lengths_wn[block.rank, columns], self.starts_wn[block.rank, columns]
        within_l = torch.arange(self.longest, device=lengths_c.device)
        real_cl = within_l < lengths_c[:, None]
        return torch.where(real_cl, starts_c[:, None] + within_l, 0), real_cl

    def tile(self, block: TileBlock, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        places_cl, real_cl = self._places(block, columns)
        image_rpe, text_cle = self.image_bpe[rows], block.text[places_cl]
        match_rpcl = torch.einsum("rpe,cle->rpcl", image_rpe, text_cle).masked_fill_(~real_cl, float("-inf"))
        best_rpc, token_rpc = match_rpcl.max(3)
        best_rcl, patch_rcl = match_rpcl.max(1)
        lengths_c = real_cl.sum(1)
        return best_rpc.mean(1), best_rcl.masked_fill_(~real_cl, 0.0).sum(2) / lengths_c, (token_rpc, patch_rcl)

    def pull(self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor) -> None:
        places_cl, real_cl = self._places(tile.block, tile.columns)
        token_rpc, patch_rcl = tile.argmax
        image_rpe, text_cle = self.image_bpe[tile.rows], tile.block.text[places_cl]
        (r, p, _), (c, longest, e) = image_rpe.shape, text_cle.shape
        slope_rpcl = image_rpe.new_zeros(r, p, c, longest)
        slope_rpcl.scatter_(3, token_rpc[..., None], (image_rc / p)[:, None, :, None].expand(r, p, c, 1))
        shared_rcl = (text_rc / real_cl.sum(1))[..., None] * real_cl
        slope_rpcl.scatter_add_(1, patch_rcl[:, None], shared_rcl[:, None])
        slope = slope_rpcl.view(r * p, c * longest)
        image_grad[tile.rows] += (slope @ text_cle.reshape(-1, e)).view(r, p, e)
        text_grad.index_add_(0, places_cl.flatten(), slope.T @ image_rpe.reshape(-1, e))


@dataclass(frozen=True)
class Scores:
    """All scores of this rank's images."""

    kind: Kind
    text: Tensor
    """of this rank, of one shape on all ranks"""
    relations: Relations
    world: World

    def blocks(self) -> Iterator[TileBlock]:
        """The texts of each rank in turn."""
        relations, world = self.relations, self.world

        def everywhere(own: Tensor | None) -> list[Any]:
            return [None] * world.size if own is None else list(world.gather(own).view(world.size, *own.shape))

        known = (relations.text_ids_ng, relations.text_labels_n, relations.text_weights_n)
        of_ranks = list(zip(*map(everywhere, known), strict=True))
        for rank, text in enumerate(world.each(self.text)):
            yield TileBlock(rank, text, *of_ranks[rank])

    def tiles(self, block: TileBlock) -> Iterator[Tile]:
        """The scores with one rank's texts."""
        side, relations = self.kind.side(), self.relations
        for rows in _cuts(len(relations.image_ids_bg), side):
            for columns in _cuts(len(block.ids_ng), side):
                image_rc, text_rc, argmax = self.kind.tile(block, rows, columns)
                out_rc = _share_an_id(relations.image_ids_bg[rows], block.ids_ng[columns])
                positive_rc, diagonal = None, False
                if relations.image_labels_b is not None and block.labels_n is not None:
                    positive_rc = relations.image_labels_b[rows, None] == block.labels_n[columns]
                    out_rc &= ~positive_rc
                elif block.rank == self.world.rank and rows.start == columns.start:
                    diagonal = True
                    out_rc.fill_diagonal_(False)
                for scores_rc in (image_rc,) if image_rc is text_rc else (image_rc, text_rc):
                    scores_rc.masked_fill_(out_rc, float("-inf"))
                yield Tile(block, rows, columns, image_rc, text_rc, diagonal, positive_rc, out_rc, argmax)

    def all_tiles(self) -> Iterator[Tile]:
        """The scores with all texts."""
        for block in self.blocks():
            yield from self.tiles(block)

    def pull_back(self, image: Tensor, slopes: Callable[[Tile], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Gradients of `image`, the kind's scaled images, and of `text`, given the slopes of the loss in each tile."""
        image_grad, text_grad = torch.zeros_like(image), self.text.new_empty(0)
        arrived: Callable[[], object] | None = None
        for block in self.blocks():
            part = torch.zeros_like(block.text)
            for tile in self.tiles(block):
                self.kind.pull(tile, *slopes(tile), image_grad, part)
            if arrived:
                arrived()
            arrived = self.world.sum_to(block.rank, part)
            if block.rank == self.world.rank:
                text_grad = part
        if arrived:
            arrived()
        return image_grad, text_grad


def _cuts(items: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, items)) for start in range(0, items, side)]


def _share_an_id(ids_rg: Tensor, ids_cg: Tensor) -> Tensor:
    """bool [r, c]: which pairs share an id of any kind."""
    same_rc = torch.zeros(len(ids_rg), len(ids_cg), dtype=torch.bool, device=ids_rg.device)
    for ids_r, ids_c in zip(ids_rg.unbind(1), ids_cg.unbind(1), strict=True):
        same_rc |= ids_r[:, None] == ids_c
    return same_rc
