"""The order against brute force: lists, counters and coin-free quotas."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data.order import Order, permuted, stable_hash, stream

mixtures = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 3.0, 7.0])), min_size=1, max_size=5
)


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permuted_favours_no_order() -> None:
    """Every order of four things comes up about equally often over keys: chi-square, 23 degrees of freedom."""
    counts = Counter(tuple(permuted(i, 4, stable_hash("key", k)) for i in range(4)) for k in range(24 * 200))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 60  # p = 4e-5


def test_permuted_needs_no_list() -> None:
    size = 5_850_000_000
    numbers = {permuted(i, size, 7) for i in range(1000)}
    assert len(numbers) == 1000
    assert all(0 <= number < size for number in numbers)
    assert max(numbers) > size * 0.9 > size * 0.1 > min(numbers)


@given(mixtures, st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_each_sample_once_a_pass_and_passes_differ(mixture: list[tuple[int, float]], seed: int) -> None:
    lengths, weights = [length for length, _ in mixture], [weight for _, weight in mixture]
    order = Order(seed, lengths, weights, batch=4)
    seen: dict[tuple[int, int], list[int]] = {}
    for n in range(600):
        place = order.position(n)
        seen.setdefault((place.source, place.pass_), []).append(place.number)
    for (source, pass_), numbers in seen.items():
        assert len(set(numbers)) == len(numbers)  # no sample twice
        if (source, pass_ + 1) in seen:
            assert sorted(numbers) == list(range(lengths[source]))  # none lost before the next pass begins
            if lengths[source] >= 12 and len(seen[source, pass_ + 1]) == lengths[source]:
                assert numbers != seen[source, pass_ + 1]


@given(mixtures, st.integers(0, 10**12))
@settings(deadline=None)
def test_quotas_are_exact(mixture: list[tuple[int, float]], start: int) -> None:
    weights = [weight for _, weight in mixture]
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in map(str, weights)]
    order = Order(0, [length for length, _ in mixture], weights, batch=1)
    counts = Counter(order.position(n).source for n in range(300))
    assert [counts[source] for source in range(len(weights))] == order.counts(300)
    for n in (0, 300, start):
        counted = order.counts(n)
        assert sum(counted) == n
        assert all(abs(count - n * share) <= len(weights) for count, share in zip(counted, shares, strict=True))
    after = order.counts(start + 1)
    drawn = [b - a for a, b in zip(order.counts(start), after, strict=True)]
    assert drawn.index(1) == order.position(start).source


def test_two_sources_take_turns_as_written() -> None:
    order = Order(0, [10, 10], [1.0, 3.0], batch=4)
    assert [order.position(n).source for n in range(8)] == [1, 1, 1, 0, 1, 1, 1, 0]


def test_weights_are_decimal_fractions() -> None:
    assert Order(0, [5, 5], [0.1, 0.9], batch=1).counts(10**15) == [10**14, 9 * 10**14]


@given(st.integers(1, 30), st.integers(0, 500), st.integers(0, 100))
def test_spares_are_every_other_sample_of_the_source(length: int, position: int, seed: int) -> None:
    order = Order(seed, [length, 7], [2.0, 1.0], batch=1)
    place = order.position(position)
    length = order.lengths[place.source]
    spares = [order.spare(position, attempt) for attempt in range(length - 1)]
    assert sorted([place.number, *spares]) == list(range(length))  # type: ignore[type-var]
    assert order.spare(position, length - 1) is None


@given(st.integers(0, 50), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_share_a_global_batch_in_order(step: int, world: int) -> None:
    order = Order(0, [9], [1.0], batch=12)
    shared = [n for rank in range(world) for n in order.positions(step, rank, world)]
    assert shared == list(range(step * 12, step * 12 + 12))


def test_seed_changes_the_order() -> None:
    first, second = (Order(seed, [50], [1.0], batch=1) for seed in (0, 1))
    assert [first.position(n) for n in range(50)] != [second.position(n) for n in range(50)]


def test_order_never_changes() -> None:
    """A resumed run must read on as it began, also after an upgrade: these numbers are for ever."""
    order = Order(3, [10, 100], [1.0, 2.0], batch=4)
    assert [tuple(order.position(n))[:2] for n in range(8)] == [
        (1, 22),
        (1, 2),
        (0, 6),
        (1, 71),
        (1, 18),
        (0, 5),
        (1, 57),
        (1, 19),
    ]
    assert stable_hash("order", 3, "ü\ud800") == 7854126692079797212
    assert stream(5, "augment", 2**40).integers(0, 1000, 4).tolist() == [932, 147, 626, 613]


def test_streams_are_apart() -> None:
    draws = {
        tuple(stream(*name).integers(0, 2**32, 2).tolist())
        for name in [(0, "augment", 1), (0, "augment", 2), (1, "augment", 1), (0, "caption", 1), (0, "augment")]
    }
    assert len(draws) == 5
    assert np.array_equal(stream(4, "x", 1).random(9), stream(4, "x", 1).random(9))
