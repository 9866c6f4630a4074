"""How far a score can be trusted: intervals, calibration, and whether two models really differ.

All of it works on what each sample contributed (right or wrong, a rank, a probability), because that is what repeats
when a test set is drawn again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import comb

import numpy as np
import torch
from torch import Tensor

from ...data.order import stream

_DRAWS = 1000
_BINS = 15


def interval(value_n: Tensor, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron 1979): the middle `level` of the means of 1,000 samples drawn
    with replacement from `value_n`."""
    values = value_n.double().numpy()
    if len(values) == 0:
        return float("nan"), float("nan")
    random = stream(seed, "bootstrap", len(values))
    if np.isin(values, (0.0, 1.0)).all():  # a resample of rights and wrongs is a binomial draw
        means = random.binomial(len(values), values.mean(), _DRAWS) / len(values)
    else:
        means = np.array([values[random.integers(0, len(values), len(values))].mean() for _ in range(_DRAWS)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def calibration_error(probability_nc: Tensor, label_n: Tensor, bins: int = _BINS) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy over equal bins of confidence,
    weighted by their samples (Guo et al., arXiv 1706.04599)."""
    confidence_n, predicted_n = probability_nc.double().max(1)
    right_n = (predicted_n == label_n).double()
    bin_n = (confidence_n * bins).ceil().long().clamp(1, bins) - 1
    gap_b = torch.zeros(bins, dtype=torch.float64).scatter_add(0, bin_n, right_n - confidence_n)
    return (gap_b.abs().sum() / max(len(label_n), 1)).item()


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples."""

    before: float
    """share of samples that the first has right"""
    after: float
    negative_flips: float
    """share that the first has right and the second wrong (Yan et al., arXiv 2011.09161)"""
    positive_flips: float
    p_value: float
    """of McNemar's exact test: how likely flips as uneven as these are if the models are equally good"""

    def json(self) -> dict[str, float]:
        """As a plain object."""
        return asdict(self)


def compare(before_n: Tensor, after_n: Tensor) -> Comparison:
    """Compares which samples (bool [n]) two models have right."""
    assert before_n.shape == after_n.shape
    lost, won = int((before_n & ~after_n).sum()), int((~before_n & after_n).sum())
    count = max(len(before_n), 1)
    return Comparison(
        before=int(before_n.sum()) / count,
        after=int(after_n.sum()) / count,
        negative_flips=lost / count,
        positive_flips=won / count,
        p_value=_mcnemar(lost, won),
    )


def _mcnemar(lost: int, won: int) -> float:
    """Two-sided binomial test of `lost` against `won` at one half, in exact integers."""
    flips, fewer = lost + won, min(lost, won)
    tail = sum(comb(flips, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << flips)) if flips < 1000 else _normal_tail(lost, won)


def _normal_tail(lost: int, won: int) -> float:
    """The same for many flips, with the continuity correction."""
    from math import erfc, sqrt

    return erfc(max(abs(lost - won) - 1, 0) / sqrt(2 * (lost + won)))
