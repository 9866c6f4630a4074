"""How reliable a score is: confidence intervals, calibration, and tests of whether two models differ.

Everything works on the value of each sample (right or wrong, a rank, a probability), because samples are what a
bootstrap draws again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ...data.order import stream

_DRAWS = 1000
_BINS = 15
_AT_ONCE = 1 << 22  # resampled values in memory at a time


def interval(value_n: Tensor, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean (Efron 1979): the middle `level` of the means of 1,000 resamples.

    If all values are 0 or 1 the interval is exact, because the sum of a resample is binomial. NaN for no values.
    """
    from scipy import stats  # imported here: it takes half a second, and only an evaluation needs it

    values = value_n.double().numpy()
    if len(values) == 0:
        return float("nan"), float("nan")
    if np.isin(values, (0.0, 1.0)).all():
        low, high = stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], len(values), values.mean()) / len(values)
        return float(low), float(high)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_DRAWS,
        batch=max(1, _AT_ONCE // len(values)),
        confidence_level=level,
        method="percentile",
        rng=stream(seed, "bootstrap", len(values)),
    ).confidence_interval
    return float(found.low), float(found.high)


def calibration_error(probability_nc: Tensor, label_n: Tensor, bins: int = _BINS) -> float:
    """Expected calibration error: the mean distance between confidence and accuracy over equally wide bins of
    confidence, weighted by their number of samples (Guo et al., arXiv 1706.04599)."""
    gap_n, bin_n = _gaps(probability_nc, label_n, bins)
    gap_b = torch.zeros(bins, dtype=torch.float64).scatter_add(0, bin_n, gap_n)
    return (gap_b.abs().sum() / max(len(label_n), 1)).item()


def calibration_interval(
    probability_nc: Tensor, label_n: Tensor, bins: int = _BINS, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval of the calibration error: its quantiles over 1,000 resamples of the samples."""
    gap_n, bin_n = (each.numpy() for each in _gaps(probability_nc, label_n, bins))
    random, errors = stream(seed, "bootstrap", len(gap_n)), []
    for _ in range(_DRAWS):
        drawn = random.integers(0, len(gap_n), len(gap_n))
        errors.append(np.abs(np.bincount(bin_n[drawn], gap_n[drawn], bins)).sum() / len(gap_n))
    low, high = np.quantile(errors, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _gaps(probability_nc: Tensor, label_n: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """For each sample: correctness (0 or 1) minus confidence, float64 [n], and its confidence bin, int64 [n]."""
    confidence_n, predicted_n = probability_nc.double().max(1)
    bin_n = (confidence_n * bins).ceil().long().clamp(1, bins) - 1
    return (predicted_n == label_n).double() - confidence_n, bin_n


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples."""

    before: float
    """fraction of samples that the first model has right"""
    after: float
    negative_flips: float
    """fraction that the first model has right and the second wrong (Yan et al., arXiv 2011.09161)"""
    positive_flips: float
    p_value: float
    """of McNemar's exact test: the probability of flips at least this uneven if the models are equally good"""

    def json(self) -> dict[str, float]:
        """As a plain object."""
        return asdict(self)


def compare(before_n: Tensor, after_n: Tensor) -> Comparison:
    """Compare two models by the samples that each has right, bool [n]."""
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


@dataclass(frozen=True)
class Difference:
    """The difference of a mean between two models on the same samples."""

    value: float
    """after minus before"""
    low: float
    high: float
    """ends of the paired bootstrap interval"""
    p_value: float
    """two-sided: twice the fraction of bootstrap differences on the other side of zero"""


def difference(before_n: Tensor, after_n: Tensor, level: float = 0.95, seed: int = 0) -> Difference:
    """The paired bootstrap of the mean difference of the samples' values (Efron and Tibshirani 1993)."""
    assert before_n.shape == after_n.shape
    value_n = (after_n.double() - before_n.double()).numpy()
    random = stream(seed, "bootstrap", len(value_n))
    if np.isin(value_n, (-1.0, 0.0, 1.0)).all():  # a resample of losses, ties and wins is a multinomial draw
        fractions = [(value_n == each).mean() for each in (-1.0, 0.0, 1.0)]
        counts = random.multinomial(len(value_n), fractions, _DRAWS)
        means = (counts[:, 2] - counts[:, 0]) / len(value_n)
    else:
        means = np.array([value_n[random.integers(0, len(value_n), len(value_n))].mean() for _ in range(_DRAWS)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p_value = min(1.0, 2 * max(beyond, 1 / _DRAWS)) if value_n.any() else 1.0
    return Difference(float(value_n.mean()), float(low), float(high), float(p_value))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for multiple comparisons with Holm's method (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(order) - place)))
        adjusted[i] = highest
    return adjusted


def _mcnemar(lost: int, won: int) -> float:
    """P-value of the two-sided binomial test of `lost` out of `lost + won` at probability one half."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
