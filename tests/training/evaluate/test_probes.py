"""Probes, geometry and reliability against scikit-learn, numpy written out, and counting."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor

from treering.data.order import stream
from treering.training.evaluate.geometry import geometry
from treering.training.evaluate.probes import linear, nearest_neighbours
from treering.training.evaluate.reliability import calibration_error, compare, difference, interval


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)


def test_linear_probe_is_as_good_as_scikit_learns_own_choice(digits: tuple[Tensor, Tensor]) -> None:
    """Within 0.5 points of its logistic regression whose strength its own cross-validation chose."""
    from sklearn.linear_model import LogisticRegressionCV

    pixels, labels = digits
    train, test = slice(0, 1000), slice(1000, None)
    found = linear(pixels[train], labels[train], pixels[test])
    score = (found.predicted == labels[test]).double().mean().item()
    theirs = LogisticRegressionCV(Cs=7, cv=3, max_iter=1000).fit(pixels[train].double(), labels[train])
    assert score == pytest.approx(theirs.score(pixels[test].double(), labels[test]), abs=0.005)
    assert 0.9 < found.held_out <= 1
    again = linear(pixels[train], labels[train], pixels[test])
    assert torch.equal(found.predicted, again.predicted)


def test_linear_probe_with_a_class_of_one() -> None:
    train = torch.eye(4).repeat(5, 1)[:17]
    labels = torch.tensor([0, 1, 2, 0] * 4 + [3])
    train[16] = torch.tensor([0.0, 0.0, 0.0, 9.0])
    assert linear(train, labels, train).predicted[16] == 3


def test_nearest_neighbours_against_a_loop(digits: tuple[Tensor, Tensor]) -> None:
    pixels, labels = digits[0].double(), digits[1]
    train, test, k = slice(0, 300), slice(300, 360), 7
    found = nearest_neighbours(pixels[train], labels[train], pixels[test], k, 0.1)
    unit = pixels / pixels.norm(dim=1, keepdim=True)
    for i, row in enumerate(unit[test]):
        similarity = unit[train] @ row
        votes = [0.0] * 10
        for j in sorted(range(300), key=lambda j: -float(similarity[j]))[:k]:
            votes[int(labels[j])] += float(np.exp(float(similarity[j]) / 0.1))
        assert found[i] == int(np.argmax(votes))
    from sklearn.neighbors import KNeighborsClassifier

    theirs = KNeighborsClassifier(1, metric="cosine").fit(pixels[train], labels[train]).predict(pixels[test])
    assert nearest_neighbours(pixels[train], labels[train], pixels[test], 1).tolist() == theirs.tolist()
    assert nearest_neighbours(pixels[train], labels[train], pixels[:0]).shape == (0,)
    assert len(nearest_neighbours(pixels[:3], labels[:3], pixels[test], 20)) == 60


def test_geometry_against_loops() -> None:
    random = np.random.default_rng(0)
    images, texts = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (random.normal(size=(9, 5)), random.normal(size=(14, 5)))
    )
    owner = random.integers(0, 9, 14)
    found = geometry(torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner))
    assert found["modality_gap"] == pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)))
    assert found["alignment"] == pytest.approx(
        np.mean([np.sum((images[o] - t) ** 2) for o, t in zip(owner, texts, strict=True)])
    )
    for name, rows in (("image", images), ("text", texts)):
        pairs = [np.exp(-2 * np.sum((a - b) ** 2)) for (i, a), (j, b) in product(enumerate(rows), repeat=2) if i != j]
        assert found[f"uniformity_{name}"] == pytest.approx(np.log(np.mean(pairs)))
    assert np.isnan(geometry(torch.eye(1), torch.eye(1), torch.zeros(1, dtype=torch.int64))["uniformity_image"])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    for draw in (lambda: random.random(80) < 0.7, lambda: random.random(80) * 1.4):
        covered = 0
        for _ in range(200):
            low, high = interval(torch.from_numpy(draw().astype(np.float64)))
            covered += low <= 0.7 <= high
        assert 0.91 < covered / 200 < 0.99
    assert interval(torch.tensor([True, False, True])) == interval(torch.tensor([True, False, True]))


def test_calibration_against_a_loop() -> None:
    random = np.random.default_rng(2)
    logits = torch.from_numpy(random.normal(size=(500, 4)) * 2)
    labels = torch.from_numpy(random.integers(0, 4, 500))
    probability = logits.softmax(1)
    expected = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 < float(probability[i].max()) <= (b + 1) / 15]
        if inside:
            accuracy = np.mean([int(probability[i].argmax()) == int(labels[i]) for i in inside])
            expected += len(inside) / 500 * abs(accuracy - np.mean([float(probability[i].max()) for i in inside]))
    assert calibration_error(probability, labels) == pytest.approx(expected)
    assert calibration_error(torch.eye(4), torch.arange(4)) == 0


def test_flips_are_counted_and_tested() -> None:

    before = torch.tensor([True] * 60 + [False] * 40)
    after = torch.tensor([True] * 50 + [False] * 10 + [True] * 25 + [False] * 15)
    found = compare(before, after)
    assert (found.before, found.after, found.negative_flips, found.positive_flips) == (0.6, 0.75, 0.1, 0.25)
    assert found.p_value == pytest.approx(exact(10, 35), rel=1e-12)
    assert compare(before, before).p_value == 1.0
    many = compare(torch.arange(4000) < 2000, torch.arange(4000) >= 1900)
    assert many.p_value == pytest.approx(exact(1900, 3900), rel=1e-9)


def exact(one: int, of: int) -> float:
    """McNemar's exact test in whole numbers: twice the tail of a fair coin."""
    fewer = min(one, of - one)
    return float(min(Fraction(1), Fraction(2 * sum(comb(of, i) for i in range(fewer + 1)), 1 << of)))


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=300)
    random = stream(7, "bootstrap", 300)
    means = [values[random.integers(0, 300, 300)].mean() for _ in range(1000)]
    found = interval(torch.from_numpy(values), 0.9, seed=7)
    assert found == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), rel=1e-12)


@pytest.mark.parametrize(("right", "of"), [(0, 1), (0, 12), (3, 3), (3, 10), (37, 40), (1200, 4000)])
def test_an_interval_of_shares_is_wilsons(right: int, of: int) -> None:
    """Every end is a share from which the seen one is 1.96 standard deviations away; it is never empty."""
    low, high = interval(torch.arange(of) < right)
    assert 0 <= low < high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / of - end) / (end * (1 - end) / of) ** 0.5 == pytest.approx(1.959964, rel=1e-6)
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == of)
    assert interval(torch.tensor([0.3])) == (pytest.approx(0.3), pytest.approx(0.3))


def test_captions_of_one_picture_are_drawn_together() -> None:
    """Five captions each that stand or fall with their picture are as sure as one: the interval covers as often as it
    says, and drawn one by one they would not."""
    random, covered, alone, groups = np.random.default_rng(5), 0, 0, torch.arange(80).repeat_interleave(5)
    for _ in range(200):
        difficulty = random.random(80).repeat(5)
        values = torch.from_numpy(random.random(400) * 0.2 + difficulty < 0.6)
        low, high = interval(values, group_n=groups)
        covered += low <= 0.5 <= high
        low, high = interval(values)
        alone += low <= 0.5 <= high
    assert 0.9 < covered / 200 < 0.99
    assert alone / 200 < 0.8
    low, high = interval(torch.ones(400), group_n=groups)
    assert (low, high) == interval(torch.ones(80))
    shuffled = torch.from_numpy(random.permutation(400))
    assert interval(values[shuffled], group_n=groups[shuffled]) == pytest.approx(interval(values, group_n=groups))


def test_a_difference_of_captions_of_one_picture() -> None:
    """Every picture five times changes nothing."""
    random = np.random.default_rng(6)
    before, after = (torch.from_numpy(random.random(60) < share) for share in (0.5, 0.6))
    once = difference(before, after)
    five = difference(before.repeat(5), after.repeat(5), group_n=torch.arange(60).repeat(5))
    assert five.value == once.value
    assert (five.low, five.high) == pytest.approx((once.low, once.high), abs=0.05)
    assert five.p_value > difference(before.repeat(5), after.repeat(5)).p_value
