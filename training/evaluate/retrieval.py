"""Retrieval in both directions: how often the right caption (picture) is among the k most similar ones.

Captions and pictures belong together in pairs: a picture may have several captions, and a caption several pictures.
Equal texts count as one, as in training (`distinct`). A score that is not finite is never right.

Shape suffixes: n pictures, m captions, p pairs, q queries, c candidates, e channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.samples.sample import caption_id

CUTS = (1, 5, 10)
NEVER = torch.iinfo(torch.int64).max
"""rank of a query whose right candidates have no finite score"""
_CHUNK = 1024  # queries at a time, to bound the memory of their similarities


def recalls(image_ne: Tensor, text_me: Tensor, picture_p: Tensor, caption_p: Tensor | None = None) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions; caption `caption_p[i]` describes picture `picture_p[i]`, or caption i.

    A picture counts if any of its captions is among the first k (the protocol of Karpathy and Fei-Fei, arXiv
    1412.2306). Ties count as wrong, so a model that gives every pair the same score has a recall of 0.
    """
    image_rank_n, text_rank_m = ranks(image_ne, text_me, picture_p, caption_p)
    scores = {}
    for k in CUTS:
        scores[f"image_to_text@{k}"] = (image_rank_n < k).double().mean().item()
        scores[f"text_to_image@{k}"] = (text_rank_m < k).double().mean().item()
    return scores


def ranks(
    image_ne: Tensor, text_me: Tensor, picture_p: Tensor, caption_p: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ranks int64 [n] of each picture's right captions, and [m] of each caption's right pictures; pairs as above.

    A rank is the number of wrong candidates at least as similar as the (best) right one; 0 is best.
    """
    caption_p = torch.arange(len(text_me)) if caption_p is None else caption_p
    of_images = _ranks(image_ne, text_me, picture_p, caption_p)
    return of_images, _ranks(text_me, image_ne, caption_p, picture_p)


def _ranks(query_qe: Tensor, candidate_ce: Tensor, query_p: Tensor, candidate_p: Tensor) -> Tensor:
    """int64 [q]: the rank of each query."""
    found = []
    for start in range(0, len(query_qe), _CHUNK):
        score_qc = query_qe[start : start + _CHUNK] @ candidate_ce.T
        own_p = (query_p >= start) & (query_p < start + _CHUNK)
        right_qc = torch.zeros_like(score_qc, dtype=torch.bool)
        right_qc[query_p[own_p] - start, candidate_p[own_p]] = True
        found.append(rank_of(score_qc, right_qc))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def rank_of(score_qc: Tensor, right_qc: Tensor) -> Tensor:
    """int64 [q]: the number of wrong candidates that score at least as high as the query's best right one; NEVER if no
    right one has a finite score."""
    best_q1 = score_qc.masked_fill(~right_qc | ~score_qc.isfinite(), float("-inf")).amax(1, keepdim=True)
    rank_q = ((score_qc >= best_q1) & ~right_qc).sum(1)
    return rank_q.masked_fill(best_q1[:, 0].isneginf(), NEVER)


def chance(pictures: int, picture_p: Tensor, caption_p: Tensor | None = None) -> dict[str, float]:
    """The exact expected recalls of a random order; pairs as above."""
    caption_p = torch.arange(len(picture_p)) if caption_p is None else caption_p
    captions = int(caption_p.max()) + 1
    pairs_p2 = torch.stack([picture_p, caption_p], 1).unique(dim=0)
    scores = {}
    for k in CUTS:
        scores[f"image_to_text@{k}"] = _guessed(pairs_p2[:, 0].bincount(minlength=pictures), captions, k)
        scores[f"text_to_image@{k}"] = _guessed(pairs_p2[:, 1].bincount(minlength=captions), pictures, k)
    return scores


def _guessed(right_q: Tensor, candidates: int, k: int) -> float:
    """The mean probability that one of each query's right candidates is among `k` that are drawn."""
    drawn = min(k, candidates)
    counts = right_q.unique(return_counts=True)
    missed = [
        count * (math.comb(candidates - right, drawn) / math.comb(candidates, drawn))
        for right, count in zip(*(each.tolist() for each in counts), strict=True)
    ]
    return 1 - sum(missed) / len(right_q)


class Distinct(NamedTuple):
    """Which texts are equal once they are cleaned for the tokenizer."""

    first_u: list[int]
    """the place of each distinct text's first appearance, in order"""
    number_m: Tensor
    """int64 [m]: of each text, the distinct one that it is"""

    def note(self, name: str, what: str) -> list[str]:
        """A sentence for the user where texts are equal, else nothing."""
        count = len(self.number_m)
        equal = count - len(self.first_u)
        return [f"{name}: {equal:,} of {count:,} {what} equal others; equal ones count as one"] if equal else []


def distinct(texts: Sequence[str]) -> Distinct:
    """The distinct texts among `texts`."""
    numbers: dict[int, int] = {}
    first: list[int] = []
    found = []
    for place, text in enumerate(texts):
        number = numbers.setdefault(caption_id(text), len(numbers))
        if number == len(first):
            first.append(place)
        found.append(number)
    return Distinct(first, torch.tensor(found, dtype=torch.int64))
