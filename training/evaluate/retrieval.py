"""Retrieval in both directions: how often the right caption (picture) is among the k most similar ones.

Shape suffixes: n pictures, m captions, e channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CUTS = (1, 5, 10)
_CHUNK = 1024  # queries at a time, to bound the memory of their similarities


def recalls(image_ne: Tensor, text_me: Tensor, owner_m: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions; caption j describes picture `owner_m[j]`.

    A picture counts if any of its captions is among the first k (the protocol of Karpathy and Fei-Fei, arXiv
    1412.2306). Ties count as wrong, so a model that gives every pair the same score has a recall of 0.
    """
    image_rank_n, text_rank_m = ranks(image_ne, text_me, owner_m)
    scores = {}
    for k in CUTS:
        scores[f"image_to_text@{k}"] = (image_rank_n < k).double().mean().item()
        scores[f"text_to_image@{k}"] = (text_rank_m < k).double().mean().item()
    return scores


def ranks(image_ne: Tensor, text_me: Tensor, owner_m: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks int64 [n] of each picture's right caption, and [m] of each caption's right picture.

    A rank is the number of wrong candidates at least as similar as the (best) right one; 0 is best.
    """
    picture_n, caption_m = torch.arange(len(image_ne)), torch.arange(len(text_me))
    of_images = [_ranks(image_ne[b] @ text_me.T, b[:, None] == owner_m) for b in picture_n.split(_CHUNK)]
    of_texts = [_ranks(text_me[b] @ image_ne.T, owner_m[b][:, None] == picture_n) for b in caption_m.split(_CHUNK)]
    return torch.cat(of_images), torch.cat(of_texts)


def _ranks(score_qc: Tensor, right_qc: Tensor) -> Tensor:
    """int64 [q]: the number of wrong candidates that score at least as high as the query's best right one."""
    best_q = score_qc.masked_fill(~right_qc, float("-inf")).amax(1, keepdim=True)
    return ((score_qc >= best_q) & ~right_qc).sum(1)


def chance(pictures: int, owner_m: Tensor) -> dict[str, float]:
    """The exact expected recalls of a random order."""
    captions = len(owner_m)
    counts = torch.bincount(owner_m, minlength=pictures).tolist()
    scores = {}
    for k in CUTS:
        drawn = min(k, captions)
        missed = [math.comb(captions - c, drawn) / math.comb(captions, drawn) for c in counts]
        scores[f"image_to_text@{k}"] = 1 - sum(missed) / len(missed)
        scores[f"text_to_image@{k}"] = min(1.0, k / pictures)
    return scores
