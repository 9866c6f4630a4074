"""Scores of this rank's images with the texts of all ranks, computed tile by tile and never stored.

Texts are cut into groups, each of the same texts of every rank, as many as `gather_budget` bytes hold: one collective
brings the texts of a group, one returns their gradient. So a rank holds its own features, one or two groups and a tile,
however many ranks there are, and up to a large world there is one group. A score is either the dot product of two
embeddings (`DotProducts`) or the late interaction of their tokens (`LateInteraction`). Everything else is given by the
`Relations` of the items and is the same for both: which pairs are positives, which are excluded, and the weight of each
item.

Shape suffixes: b images of this rank, n texts of this rank, w ranks, a texts of all ranks in the order of their groups,
m texts of a group, r rows (images) and c columns (texts) of a tile, e channels of the joint space, g kinds of ids,
p tokens of an image, t tokens of several texts, l tokens of one text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..world import World

TILE_BYTES = 4 << 20
"""size of one tile of scores on a CPU, whose cache holds it: 1024 x 1024 in fp32"""
GPU_TILE_BYTES = 256 << 20
"""size of one tile of scores on a GPU, where a call takes as long as a few million scores"""
GATHER_BUDGET = 256_000_000
"""bytes of the texts of a group, if the recipe says nothing else"""


def tile_bytes(device_type: str) -> int:
    """Size of one tile of scores on a device."""
    return TILE_BYTES if device_type == "cpu" else GPU_TILE_BYTES


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
    """The scores of some images of this rank with some texts of a group."""

    group: TextGroup
    rows: slice
    columns: slice
    image_rc: Tensor
    """scores of the images with the texts, -inf for excluded pairs; the consumer may overwrite it"""
    text_rc: Tensor
    """scores of the texts with the images; for dot products the same tensor as `image_rc`, so overwrite it last"""
    pairs: tuple[slice, slice] | None
    """rows and columns of the tile whose diagonal are the positives (only without labels); None: it has none"""
    positive_rc: Tensor | None
    """bool: the positives by label; None: no labels"""
    excluded_rc: Tensor
    """bool: excluded pairs"""
    argmax: tuple[Tensor, ...]
    """indices of the maxima, kept for the backward pass of late interaction"""

    @property
    def place(self) -> slice:
        """Indices of the tile's texts among the texts of all ranks, [a]."""
        first = self.group.place.start
        return slice(first + self.columns.start, first + self.columns.stop)


class TextGroup(NamedTuple):
    """The texts `texts` of every rank, in rank order, with their relations."""

    texts: slice
    place: slice
    """their indices among the texts of all ranks, [a]"""
    text: Tensor
    ids_mg: Tensor
    labels_m: Tensor | None
    weights_m: Tensor | None


class Similarity(Protocol):
    """How a score is computed, and its gradient. The images it holds are multiplied by the temperature already."""

    def score_bytes(self) -> int:
        """Bytes that one score takes in a tile."""
        ...

    def text_bytes(self, text: Tensor) -> int:
        """Bytes of the largest text of any rank."""
        ...

    def part(self, text: Tensor, texts: slice) -> Tensor:
        """Some of a rank's texts, of the same shape on all ranks."""
        ...

    def own(self, part: Tensor, texts: slice) -> Tensor:
        """What of a `part` belongs to this rank's texts: the rest is there for the shape."""
        ...

    def tile(self, group: TextGroup, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Scores [r, c] of images with texts, scores of texts with images, and indices that `add_gradients` needs."""
        ...

    def add_gradients(
        self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        """Add a tile's part to the gradients of all images and of the group's texts, given d loss / d scores.

        Where both scores are one tensor, `image_rc` and `text_rc` are one too: the sum of both gradients.
        """
        ...


@dataclass(frozen=True)
class DotProducts:
    """The dot product of an image embedding and a text embedding."""

    image_be: Tensor

    def score_bytes(self) -> int:
        return self.image_be.element_size()

    def text_bytes(self, text: Tensor) -> int:
        return text.shape[1] * text.element_size()

    def part(self, text: Tensor, texts: slice) -> Tensor:
        return text[texts]

    def own(self, part: Tensor, texts: slice) -> Tensor:
        return part

    def tile(self, group: TextGroup, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        scores_rc = self.image_be[rows] @ group.text[columns].T
        return scores_rc, scores_rc, ()

    def add_gradients(
        self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        image_grad[tile.rows].addmm_(image_rc, tile.group.text[tile.columns])
        text_grad[tile.columns].addmm_(image_rc.T, self.image_be[tile.rows])


class LateInteraction:
    """FILIP's scores (Yao et al., arXiv 2111.07783): each token takes its best match among the other side's tokens.

        image with text: mean over the image's tokens of max over the text's;   text with image: the reverse

    Images are [b, p, e]. Texts are packed [t, e]; `lengths_wn`, on the host, gives the number of tokens of each text of
    each rank. A rank's part of a group is zero-padded to the largest number of tokens of any rank.
    """

    def __init__(self, image_bpe: Tensor, lengths_wn: Tensor, rank: int) -> None:
        self.image_bpe, self.lengths_wn, self.rank = image_bpe, lengths_wn, rank
        self.longest = int(lengths_wn.max())
        on_gpu = image_bpe.device.type == "cuda"  # where only what is pinned is copied without a wait
        sent = lengths_wn.pin_memory() if on_gpu else lengths_wn
        self.device_lengths_wn = sent.to(image_bpe.device, non_blocking=True)

    def score_bytes(self) -> int:
        return self.image_bpe.element_size() * self.image_bpe.shape[1] * self.longest

    def text_bytes(self, text: Tensor) -> int:
        return text.shape[1] * text.element_size() * self.longest

    def part(self, text: Tensor, texts: slice) -> Tensor:
        first = int(self.lengths_wn[self.rank, : texts.start].sum())
        own_te = text[first : first + int(self.lengths_wn[self.rank, texts].sum())]
        padding = own_te.new_zeros(self._most(texts) - len(own_te), own_te.shape[1])
        return torch.cat([own_te, padding])

    def own(self, part: Tensor, texts: slice) -> Tensor:
        return part[: int(self.lengths_wn[self.rank, texts].sum())]

    def _most(self, texts: slice) -> int:
        return int(self.lengths_wn[:, texts].sum(1).max())

    def _places(self, group: TextGroup, columns: slice) -> tuple[Tensor, Tensor]:
        """Positions [c, l] of the tokens of some texts in a group's stream, and a mask [c, l] of the real ones."""
        lengths_wm = self.device_lengths_wn[:, group.texts]
        ranks_w = torch.arange(len(lengths_wm), device=lengths_wm.device)
        starts_wm = lengths_wm.cumsum(1) - lengths_wm + ranks_w[:, None] * self._most(group.texts)
        lengths_c, starts_c = lengths_wm.flatten()[columns], starts_wm.flatten()[columns]
        within_l = torch.arange(self.longest, device=lengths_c.device)
        real_cl = within_l < lengths_c[:, None]
        return torch.where(real_cl, starts_c[:, None] + within_l, 0), real_cl

    def tile(self, group: TextGroup, rows: slice, columns: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        places_cl, real_cl = self._places(group, columns)
        image_rpe, text_cle = self.image_bpe[rows], group.text[places_cl]
        # Padding of a text must never be the best match of a patch.
        match_rpcl = torch.einsum("rpe,cle->rpcl", image_rpe, text_cle).masked_fill_(~real_cl, float("-inf"))
        best_rpc, token_rpc = match_rpcl.max(3)
        best_rcl, patch_rcl = match_rpcl.max(1)
        lengths_c = real_cl.sum(1)
        return best_rpc.mean(1), best_rcl.masked_fill_(~real_cl, 0.0).sum(2) / lengths_c, (token_rpc, patch_rcl)

    def add_gradients(
        self, tile: Tile, image_rc: Tensor, text_rc: Tensor, image_grad: Tensor, text_grad: Tensor
    ) -> None:
        places_cl, real_cl = self._places(tile.group, tile.columns)
        token_rpc, patch_rcl = tile.argmax
        image_rpe, text_cle = self.image_bpe[tile.rows], tile.group.text[places_cl]
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
    """this rank's texts"""
    relations: Relations
    world: World
    gather_budget: int

    def slices(self) -> list[slice]:
        """The texts of each rank that form a group: as many as the budget holds, and one at least."""
        texts, size = len(self.relations.text_ids_ng), self.world.size
        most = texts if size == 1 else self.gather_budget // (size * self.kind.text_bytes(self.text))
        return _slices(texts, max(1, most))

    def in_groups(self, of_ranks_wn: Tensor) -> Tensor:
        """What belongs to the texts of all ranks, [w, n, ...], in the order of their groups: [a, ...]."""
        parts = [of_ranks_wn[:, texts].flatten(0, 1) for texts in self.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def of_own(self, in_groups_ka: Tensor) -> Tensor:
        """What belongs to this rank's texts, of [k, a]: [k, n]."""
        size, parts = self.world.size, []
        for texts in self.slices():
            of_group_ka = in_groups_ka[:, size * texts.start : size * texts.stop]
            parts.append(of_group_ka.unflatten(1, (size, -1))[:, self.world.rank])
        return torch.cat(parts, 1)

    def groups(self) -> Iterator[TextGroup]:
        """The groups in turn, the next on its way while the caller uses one; all ranks iterate together."""
        relations, world, slices = self.relations, self.world, self.slices()
        coming = world.start_gather(self.kind.part(self.text, slices[0]))

        # Ids, labels and weights are small: gather them once.
        def of_all_ranks(own: Tensor | None) -> Tensor | None:
            return None if own is None else self.in_groups(world.gather(own).view(world.size, *own.shape))

        ids_ag = of_all_ranks(relations.text_ids_ng)
        labels_a, weights_a = of_all_ranks(relations.text_labels_n), of_all_ranks(relations.text_weights_n)
        assert ids_ag is not None
        for number, texts in enumerate(slices):
            text = coming()
            if number + 1 < len(slices):
                coming = world.start_gather(self.kind.part(self.text, slices[number + 1]))
            at = slice(world.size * texts.start, world.size * texts.stop)
            labels_m, weights_m = (None if one is None else one[at] for one in (labels_a, weights_a))
            yield TextGroup(texts, at, text, ids_ag[at], labels_m, weights_m)

    def tiles(self, group: TextGroup) -> Iterator[Tile]:
        """The scores with the texts of a group, tile by tile."""
        relations, images = self.relations, len(self.relations.image_ids_bg)
        most = tile_bytes(self.text.device.type) // self.kind.score_bytes()
        side = min(images, max(1, math.isqrt(most)))
        for rows in _slices(images, side):
            for columns in _slices(len(group.ids_mg), max(1, most // side)):
                image_rc, text_rc, argmax = self.kind.tile(group, rows, columns)
                # Pairs with a common id are not negatives; positives are then put back.
                excluded_rc = _equal_in_any(relations.image_ids_bg[rows], group.ids_mg[columns])
                positive_rc = pairs = None
                if relations.image_labels_b is not None and group.labels_m is not None:
                    positive_rc = relations.image_labels_b[rows, None] == group.labels_m[columns]
                    excluded_rc &= ~positive_rc
                elif pairs := self._pairs(group, rows, columns):
                    excluded_rc[pairs].diagonal().fill_(False)
                for scores_rc in (image_rc,) if image_rc is text_rc else (image_rc, text_rc):
                    scores_rc.masked_fill_(excluded_rc, float("-inf"))
                yield Tile(group, rows, columns, image_rc, text_rc, pairs, positive_rc, excluded_rc, argmax)

    def _pairs(self, group: TextGroup, rows: slice, columns: slice) -> tuple[slice, slice] | None:
        """The part of a tile whose diagonal holds the pairs of this rank: image i and text i."""
        texts = group.texts
        shift = self.world.rank * (texts.stop - texts.start) - texts.start  # from a text's number to its column
        first = max(rows.start, texts.start, columns.start - shift)
        last = min(rows.stop, texts.stop, columns.stop - shift)
        if first >= last:
            return None
        ahead = shift - columns.start
        return slice(first - rows.start, last - rows.start), slice(first + ahead, last + ahead)

    def all_tiles(self) -> Iterator[Tile]:
        """The scores with the texts of all ranks, tile by tile."""
        for group in self.groups():
            yield from self.tiles(group)

    def backward(self, image: Tensor, slopes: Callable[[Tile], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Gradients of `image` (the scaled images) and `text`; `slopes` gives d loss / d scores of a tile.

        The texts' gradient is the sum over all ranks; the images' needs no reduction.
        """
        image_grad, found = torch.zeros_like(image), []
        going: tuple[Callable[[], Tensor], slice] | None = None
        for group in self.groups():
            of_group = torch.zeros_like(group.text)
            for tile in self.tiles(group):
                self.kind.add_gradients(tile, *slopes(tile), image_grad, of_group)
            # The sum of the group before went on while this group's tiles were computed; one is on its way at a time.
            if going:
                found.append(self.kind.own(going[0](), going[1]))
            going = self.world.start_sum(of_group), group.texts
        if going:
            found.append(self.kind.own(going[0](), going[1]))
        return image_grad, found[0] if len(found) == 1 else torch.cat(found)


def _slices(items: int, side: int) -> list[slice]:
    return [slice(start, min(start + side, items)) for start in range(0, items, side)]


def _equal_in_any(ids_rg: Tensor, ids_cg: Tensor) -> Tensor:
    """bool [r, c]: which pairs have an equal id in any column."""
    same_rc = torch.zeros(len(ids_rg), len(ids_cg), dtype=torch.bool, device=ids_rg.device)
    for ids_r, ids_c in zip(ids_rg.unbind(1), ids_cg.unbind(1), strict=True):
        same_rc |= ids_r[:, None] == ids_c
    return same_rc
