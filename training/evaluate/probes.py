"""Probes: accuracy of a simple classifier on the picture embeddings, without text.

Both are plain functions of embeddings and class numbers. The linear probe is scikit-learn's logistic regression, as in
the CLIP paper (Radford et al., arXiv 2103.00020, appendix A.3), with the L2 strength chosen on a held-out part of the
training set. Shape suffixes: n training pictures, q test pictures, b of them in a chunk, k neighbours, e channels,
c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.order import stream
from ...data.shards.parallel import Progress, silent

STRENGTHS = tuple(10.0**power for power in range(-6, 7, 2))
"""inverse L2 strengths of the first sweep; the second sweep tries values between the best one and its neighbours"""
_HELD_OUT = 0.2  # fraction of the training set on which the strength is chosen
_MOST_STEPS = 1000
_CHUNK = 1024  # test pictures at a time, to bound the memory of their similarities


def nearest_neighbours(
    train_ne: Tensor, label_n: Tensor, test_qe: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """int64 [q]: the class with the largest vote among the `k` nearest training pictures.

    Each votes with weight exp(cosine / temperature) (Wu et al., arXiv 1805.01978, section 3.4). Ties go to the smaller
    class number.
    """
    assert len(train_ne) == len(label_n) > 0
    k, classes = min(k, len(train_ne)), int(label_n.max()) + 1
    train_ne = F.normalize(train_ne.float(), dim=-1)
    found = []
    for test_be in F.normalize(test_qe.float(), dim=-1).split(_CHUNK):
        near_bk, index_bk = (test_be @ train_ne.T).topk(k)
        # Subtract the largest similarity, so that small temperatures do not overflow.
        weight_bk = ((near_bk.double() - near_bk[:, :1].double()) / temperature).exp()
        votes_bc = torch.zeros(len(test_be), classes, dtype=torch.float64).scatter_add(1, label_n[index_bk], weight_bk)
        found.append(votes_bc.argmax(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class FittedProbe:
    """The predictions of a fitted linear probe."""

    predicted: Tensor
    """int64 [q]"""
    strength: float
    """the chosen inverse L2 strength"""
    held_out: float
    """its accuracy on the held-out part of the training set"""


def linear(
    train_ne: Tensor,
    label_n: Tensor,
    test_qe: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: Progress = silent,
) -> FittedProbe:
    """Multinomial logistic regression on the training embeddings, which are not normalised.

    The L2 strength is chosen on a held-out fifth of them (stratified); the final fit uses all. `progress(done, total)`
    counts fits.
    """
    from sklearn.linear_model import LogisticRegression

    features, labels = train_ne.double().numpy(), label_n.numpy()
    fitted, kept = _split(labels, seed)

    total, made = len(strengths) + (3 if len(strengths) > 1 else 1), count(1)

    def fit(strength: float, rows: Any) -> LogisticRegression:
        found = LogisticRegression(C=strength, max_iter=_MOST_STEPS).fit(features[rows], labels[rows])
        progress(next(made), total)
        return found

    def score(strength: float) -> float:
        return float(fit(strength, fitted).score(features[kept], labels[kept]))

    scores = {strength: score(strength) for strength in strengths}
    if len(strengths) > 1:
        best = max(scores, key=lambda strength: (scores[strength], -strength))
        step = (strengths[1] / strengths[0]) ** 0.5
        scores |= {near: score(near) for near in (best / step, best * step)}
    best = max(scores, key=lambda strength: (scores[strength], -strength))  # of equal ones, the more regularised
    final = fit(best, slice(None))
    return FittedProbe(torch.from_numpy(final.predict(test_qe.double().numpy())), best, scores[best])


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to choose the strength on, stratified by class; a class of one picture is in both."""
    random = stream(seed, "probe")
    fitted, kept = [], []
    for label in np.unique(labels):
        rows = random.permutation(np.nonzero(labels == label)[0])
        cut = max(1, round(_HELD_OUT * len(rows)))
        kept.append(rows[:cut])
        fitted.append(rows[cut:] if len(rows) > 1 else rows)
    return np.sort(np.concatenate(fitted)), np.sort(np.concatenate(kept))
