"""How reliable a score is: confidence intervals, calibration, and tests of whether two models differ.

Everything works on the value of each sample (right or wrong, a rank, a probability), because samples are what a
bootstrap draws again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.order import stream

_DRAWS = 1000
_BINS = 15

Floats = NDArray[np.float64]


def interval(value_n: Tensor, level: float = 0.95, seed: int = 0, group_n: Tensor | None = None) -> tuple[float, float]:
    """An interval of a mean.

    Of shares (all values 0 or 1) Wilson's (1927), which is not empty at 0 and 1 either; of other values the percentile
    bootstrap (Efron 1979): the middle `level` of the means of 1,000 resamples. Values with equal `group_n` belong
    together (captions of one picture) and are drawn together. NaN for no values.
    """
    values, of_g, total_g = _grouped(value_n, group_n)
    if len(of_g) == 0:
        return float("nan"), float("nan")
    shares = np.isin(values, (0.0, 1.0)).all()
    if shares and (len(of_g) == len(values) or values.min() == values.max()):
        return _wilson(float(values.mean()), len(of_g), level)
    if len(of_g) == 1:
        return float(values.mean()), float(values.mean())
    means = _resampled_means(of_g, total_g, stream(seed, "bootstrap", len(values)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _wilson(share: float, count: int, level: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` draws; it ends at 0 and 1 where the share does."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre, reach = share + z * z / (2 * count), z * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = (centre - reach) / (1 + z * z / count), (centre + reach) / (1 + z * z / count)
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high


def _grouped(value_n: Tensor, group_n: Tensor | None) -> tuple[Floats, Floats, Floats]:
    """The values, float64, and of each group their number and sum; without groups every value is one."""
    values: Floats = value_n.double().numpy()
    if group_n is None:
        return values, np.ones(len(values)), values
    place_n = torch.unique(group_n, return_inverse=True)[1].numpy()
    of_g: Floats = np.bincount(place_n).astype(np.float64)
    total_g: Floats = np.bincount(place_n, weights=values).astype(np.float64)
    return values, of_g, total_g


def _resampled_means(of_g: Floats, total_g: Floats, random: np.random.Generator) -> Floats:
    """The mean of each of 1,000 resamples of groups."""
    drawn = (random.integers(0, len(of_g), len(of_g)) for _ in range(_DRAWS))
    return np.array([total_g[rows].sum() / of_g[rows].sum() for rows in drawn])


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


def difference(
    before_n: Tensor, after_n: Tensor, level: float = 0.95, seed: int = 0, group_n: Tensor | None = None
) -> Difference:
    """The paired bootstrap of the mean difference of the samples' values (Efron and Tibshirani 1993); values of one
    group are drawn together."""
    assert before_n.shape == after_n.shape
    value_n, of_g, total_g = _grouped(after_n.double() - before_n.double(), group_n)
    random = stream(seed, "bootstrap", len(value_n))
    if len(of_g) == len(value_n) and np.isin(value_n, (-1.0, 0.0, 1.0)).all():
        # A resample of losses, ties and wins is a multinomial draw.
        fractions = [(value_n == each).mean() for each in (-1.0, 0.0, 1.0)]
        counts = random.multinomial(len(value_n), fractions, _DRAWS)
        means = (counts[:, 2] - counts[:, 0]) / len(value_n)
    else:
        means = _resampled_means(of_g, total_g, random)
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
