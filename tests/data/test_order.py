"""The order against brute force: lists, counters, coin-free quotas, and a plain reading of what lanes are."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import gcd, isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data.order import Mixture, Order, Place, default_window, permuted, stable_hash, stream

WEIGHTS = st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 3.0, 7.0])
small_sources = st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=5)
sharded_sources = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), WEIGHTS), min_size=1, max_size=3
)


def order(lengths: list[int], weights: list[float], batch: int = 4, seed: int = 0) -> Order:
    """Each source in one shard."""
    return Order(seed, [[length] for length in lengths], [Mixture(0, tuple(weights))], batch)


def places(each: Order, start: int, count: int) -> list[Place]:
    """What lies at `count` positions from `start` on, by position."""
    steps = range(start // each.batch, -(-(start + count) // each.batch))
    found = sorted(place for step in steps for place in each.places(step))
    return [place for place in found if start <= place.position < start + count]


# The permutation


def mixed(key: int, round_: int, value: int) -> int:
    """The hash once more, in Python's integers."""
    mask = (1 << 64) - 1
    z = (key ^ (value * 16 + round_ + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def feistel(index: int, size: int, key: int) -> int:
    """The network once more, number by number."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for round_ in range(0, 8, 2):
            row = (row + mixed(key, round_, column)) % rows
            column = (column + mixed(key, round_ + 1, row)) % columns
        index = row * columns + column
        if index < size:
            return index


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size: int, key: int) -> None:
    numbers = permuted(np.arange(size), size, key)
    assert sorted(numbers.tolist()) == list(range(size))
    assert numbers.tolist() == [feistel(i, size, key) for i in range(size)]


@given(st.lists(st.tuples(st.integers(1, 2**52), st.integers(0, 2**64 - 1)), min_size=1, max_size=20), st.data())
def test_sizes_and_keys_may_differ(cases: list[tuple[int, int]], data: st.DataObject) -> None:
    index = [data.draw(st.integers(0, size - 1)) for size, _ in cases]
    sizes, keys = [size for size, _ in cases], np.array([key for _, key in cases], np.uint64)
    expected = [feistel(i, size, key) for i, (size, key) in zip(index, cases, strict=True)]
    assert permuted(np.array(index), np.array(sizes), keys).tolist() == expected


def test_permuted_favours_no_order() -> None:
    """Every order of four things comes up about equally often over keys: chi-square, 23 degrees of freedom."""
    counts = Counter(tuple(permuted(np.arange(4), 4, stable_hash("key", k)).tolist()) for k in range(24 * 200))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 60  # p = 4e-5


def test_permuted_needs_no_list() -> None:
    size = 5_850_000_000
    numbers = permuted(np.arange(1000), size, 7)
    assert len(set(numbers.tolist())) == 1000
    assert numbers.max() > size * 0.9 > size * 0.1 > numbers.min() >= 0


# Which source


@given(small_sources, st.integers(0, 10**12))
@settings(deadline=None)
def test_quotas_are_exact(mixture: list[tuple[int, float]], start: int) -> None:
    weights = [weight for _, weight in mixture]
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in map(str, weights)]
    each = order([length for length, _ in mixture], weights, batch=1)
    counts = Counter(place.source for place in places(each, 0, 300))
    assert [counts[source] for source in range(len(weights))] == each.counts(300)
    for n in (0, 300, start):
        counted = each.counts(n)
        assert sum(counted) == n
        assert all(abs(count - n * share) <= len(weights) for count, share in zip(counted, shares, strict=True))
    drawn = [b - a for a, b in zip(each.counts(start), each.counts(start + 1), strict=True)]
    (place,) = each.places(start)
    assert drawn.index(1) == place.source
    assert place.draw == each.counts(start)[place.source]


def test_two_sources_take_turns_as_written() -> None:
    assert [place.source for place in places(order([10, 10], [1.0, 3.0]), 0, 8)] == [1, 1, 1, 0, 1, 1, 1, 0]


def test_weights_are_decimal_fractions() -> None:
    assert order([5, 5], [0.1, 0.9], batch=1).counts(10**15) == [10**14, 9 * 10**14]
    assert order([5, 5, 5], [1 / 3, 1e-9, 1e9]).counts(10**15)[1] == pytest.approx(4 * 10**15 * 1e-18, abs=1)


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(1, 40), st.lists(WEIGHTS | st.just(0.0), min_size=4, max_size=4)), max_size=4),
)
@settings(deadline=None)
def test_later_mixtures_go_on_where_the_sources_are(
    lengths: list[int], stretches: list[tuple[int, list[float]]]
) -> None:
    mixtures = [Mixture(0, (1.0,) * len(lengths))]
    for steps, weights in stretches:
        own = tuple(weights[: len(lengths)])
        mixtures.append(Mixture(mixtures[-1].step + steps, own if any(own) else mixtures[0].weights))
    each = Order(0, [[length] for length in lengths], mixtures, batch=3)
    drawn = [0] * len(lengths)
    ends = [mixture.step for mixture in mixtures[1:]] + [mixtures[-1].step + 20]
    for mixture, end in zip(mixtures, ends, strict=True):
        before = list(drawn)
        for step in range(mixture.step, end):
            assert each.counts(step) == drawn
            for place in sorted(each.places(step)):
                assert place.draw == drawn[place.source]
                drawn[place.source] += 1
        total, n = sum(map(Fraction, mixture.weights)), (end - mixture.step) * 3
        for now, then, weight in zip(drawn, before, mixture.weights, strict=True):
            assert abs(now - then - n * Fraction(weight) / total) <= len(lengths)
            assert weight or now == then


# Which sample


@given(small_sources, st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_each_sample_once_a_pass_and_passes_differ(mixture: list[tuple[int, float]], seed: int) -> None:
    lengths, weights = [length for length, _ in mixture], [weight for _, weight in mixture]
    seen: dict[tuple[int, int], list[int]] = {}
    for place in places(order(lengths, weights, seed=seed), 0, 600):
        seen.setdefault((place.source, place.draw // lengths[place.source]), []).append(place.number)
    for (source, pass_), numbers in seen.items():
        assert len(set(numbers)) == len(numbers)  # no sample twice
        if (source, pass_ + 1) in seen:
            assert sorted(numbers) == list(range(lengths[source]))  # none lost before the next pass begins
            if lengths[source] >= 12 and len(seen[source, pass_ + 1]) == lengths[source]:
                assert numbers != seen[source, pass_ + 1]


@given(sharded_sources, st.integers(0, 2**63 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))
@settings(deadline=None)
def test_lanes_lose_nothing(
    mixture: list[tuple[list[int], float]], seed: int, batch: int, lanes: int, shuffle: int
) -> None:
    shards, weights = [shards for shards, _ in mixture], tuple(weight for _, weight in mixture)
    each = Order(seed, shards, [Mixture(0, weights)], batch, shuffle, lanes)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(-(-400 // batch)):
        found = list(each.places(step))
        assert sorted(place.position for place in found) == list(range(step * batch, (step + 1) * batch))
        for place in sorted(found):
            length = sum(shards[place.source])
            assert 0 <= place.number < length
            seen.setdefault((place.source, place.draw // length), []).append(place.number)
    for (source, pass_), numbers in seen.items():
        assert len(set(numbers)) == len(numbers)
        if (source, pass_ + 1) in seen:
            assert sorted(numbers) == list(range(sum(shards[source])))


def by_lists(shards: list[int], seed: int, pass_: int, lanes: int, window: int) -> list[int]:
    """The numbers of a pass, with the line, the lanes and the windows laid out as lists."""
    numbers = iter(range(sum(shards)))
    held = [[next(numbers) for _ in range(length)] for length in shards]
    key = stable_hash("shards", seed, 0, pass_)
    line = [n for shard in sorted(range(len(shards)), key=lambda shard: mixed(key, 0, shard)) for n in held[shard]]
    stride = next(n for n in range(max(1, round(lanes * 0.618)), lanes + 1) if gcd(n, lanes) == 1)
    turn = {t * stride % lanes: t for t in range(lanes)}
    reads: dict[int, list[int]] = {}
    begin = 0
    for lane in range(lanes):
        size = len(line) // lanes + (turn[lane] < len(line) % lanes)
        own, begin = list(enumerate(line))[begin : begin + size], begin + size
        cut = window - turn[lane] * window // lanes
        reads[turn[lane]] = []
        while own:
            part, own, cut = own[:cut], own[cut:], window
            order = stable_hash("order", seed, 0, pass_)
            order ^= mixed(order, 8, part[0][0])
            reads[turn[lane]] += [part[feistel(i, len(part), order)][1] for i in range(len(part))]
    return [reads[t][depth] for depth in range(len(line)) for t in range(lanes) if depth < len(reads[t])]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any), st.integers(0, 99), st.integers(1, 8), st.data()
)
@settings(deadline=None)
def test_lanes_are_read_front_to_back_in_shuffled_windows(
    shards: list[int], seed: int, lanes: int, data: st.DataObject
) -> None:
    length = sum(shards)
    window = data.draw(st.integers(1, max(1, (length - 1) // lanes)))
    each = Order(seed, [shards], [Mixture(0, (1.0,))], 8, shuffle=min(lanes * window, length - 1) or 1, lanes=lanes)
    if each.sources[0].lanes:
        found = [place.number for place in places(each, 0, 2 * length)]
        window = max(1, min(lanes * window, length - 1) // lanes)
        assert found == [n for pass_ in range(2) for n in by_lists(shards, seed, pass_, lanes, window)]


def test_windows_end_one_after_another() -> None:
    each = Order(0, [[1000] * 100], [Mixture(0, (1.0,))], 64, shuffle=64 * 16, lanes=64)
    line = each.sources[0]
    first = [line.window(draw)[1] for draw in range(64)]
    assert Counter(first) == dict.fromkeys(range(1, 17), 4)


def test_each_pass_has_a_new_shard_order() -> None:
    each = Order(0, [[10] * 50], [Mixture(0, (1.0,))], 10, shuffle=10, lanes=10)
    passes = [[place.number // 10 for place in places(each, n * 500, 500)] for n in range(2)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert sum(a == b for a, b in zip(*passes, strict=True)) < 100


@pytest.mark.parametrize(("weights", "most"), [((1.0,), 1.1), ((3.0, 1.0), 1.6), ((0.7, 0.2, 0.1), 2.2)])
def test_a_shard_is_read_by_one_rank(weights: tuple[float, ...], most: float) -> None:
    """How many ranks read a shard in a pass, on average over the shards. In a single permutation it would be all 8."""
    shards = [[50] * 400 for _ in weights]
    world, batch = 8, 64
    each = Order(0, shards, [Mixture(0, weights)], batch, shuffle=256, lanes=32)
    readers: dict[tuple[int, int], set[int]] = {}
    for step in range(400 * 50 // batch):
        for rank in range(world):
            for place in each.places(step, rank, world):
                if place.draw < 400 * 50:
                    readers.setdefault((place.source, place.number // 50), set()).add(rank)
    assert sum(map(len, readers.values())) / len(readers) < most


def test_a_rank_reads_few_shards_at_a_time() -> None:
    each = Order(0, [[1000] * 1000], [Mixture(0, (1.0,))], 256, shuffle=4096, lanes=64)
    for rank in range(8):
        shards = {place.number // 1000 for step in range(4) for place in each.places(step, rank, 8)}
        assert len(shards) <= 2 * 64 // 8


# Spares


@given(st.integers(1, 30), st.integers(0, 500), st.integers(0, 100))
def test_spares_are_every_other_sample_of_the_source(length: int, position: int, seed: int) -> None:
    each = order([length, 7], [2.0, 1.0], batch=1, seed=seed)
    (place,) = each.places(position)
    length = each.lengths[place.source]
    spares = [each.spare(place, attempt) for attempt in range(length - 1)]
    assert sorted([place.number, *spares]) == list(range(length))  # type: ignore[type-var]
    assert each.spare(place, length - 1) is None


@given(st.integers(0, 300), st.integers(0, 3))
@settings(deadline=None)
def test_spares_of_a_lane_come_from_its_window_first(step: int, slot: int) -> None:
    each = Order(2, [[9] * 12], [Mixture(0, (1.0,))], 4, shuffle=24, lanes=4)
    place = list(each.places(step))[slot]
    start, size = each.sources[0].window(place.draw)
    near = {each.sources[0].number_at(place.draw, start + i) for i in range(size)}
    assert place.number in near
    assert 1 <= size <= 6
    few = min(size - 1, 4)
    nearest = {each.spare(place, attempt) for attempt in range(few)}
    assert nearest <= near - {place.number}
    assert len(nearest) == few
    others = [each.spare(place, few + attempt) for attempt in range(108)]
    assert sorted(others) == list(range(108))  # type: ignore[type-var]
    assert each.spare(place, few + 108) is None


def test_a_bad_shard_costs_few_tries() -> None:
    """Whole windows are bad: the first four spares are, and then hardly any."""
    each = Order(0, [[1_000] * 200], [Mixture(0, (1.0,))], 256, shuffle=16_384, lanes=64)
    bad = range(50_000, 51_000)
    tries = []
    for place in (p for step in range(0, 780, 10) for p in each.places(step) if p.number in bad):
        number, count = place.number, 0
        while number in bad:
            number, count = each.spare(place, count), count + 1  # type: ignore[assignment]
        tries.append(count)
    assert len(tries) > 20
    assert np.mean(tries) < 6


# Ranks, seeds, time


@given(st.integers(0, 50), st.sampled_from([1, 2, 3, 4, 6, 12]), st.booleans())
def test_ranks_share_a_global_batch(step: int, world: int, lanes: bool) -> None:
    each = Order(0, [[9, 30], [5]], [Mixture(0, (2.0, 1.0))], 12, shuffle=8 if lanes else 1000, lanes=4)
    shared = [place for rank in range(world) for place in each.places(step, rank, world)]
    assert shared == list(each.places(step))
    if not lanes:
        assert [place.position for place in shared] == list(range(step * 12, step * 12 + 12))


@pytest.mark.parametrize("shuffle", [10, 1000])
def test_seed_changes_the_order(shuffle: int) -> None:
    first, second = (Order(seed, [[50]], [Mixture(0, (1.0,))], 1, shuffle, 2) for seed in (0, 1))
    assert [place.number for place in places(first, 0, 50)] != [place.number for place in places(second, 0, 50)]


def test_order_never_changes() -> None:
    """A resumed run must read on as it began, also after an upgrade: these numbers are for ever."""
    each = order([10, 100], [1.0, 2.0], seed=3)
    assert [(place.source, place.number) for place in places(each, 0, 8)] == [
        (1, 22),
        (1, 2),
        (0, 6),
        (1, 71),
        (1, 18),
        (0, 5),
        (1, 57),
        (1, 19),
    ]
    lanes = Order(3, [[7, 0, 90, 11]], [Mixture(0, (1.0,))], 6, shuffle=12, lanes=3)
    assert [place.number for place in lanes.places(2**40)] == LANES
    assert stable_hash("order", 3, "ü\ud800") == 7854126692079797212
    assert stream(5, "augment", 2**40).integers(0, 1000, 4).tolist() == [932, 147, 626, 613]


LANES = [24, 23, 56, 58, 94, 95]


def test_the_largest_data_and_cluster_there_are() -> None:
    """LAION-5B on 4,096 ranks: the cursor is one number, and a batch costs milliseconds at any of them."""
    shards = np.full(585_000, 10_000)
    each = Order(0, [shards], [Mixture(0, (1.0,))], 32_768)
    for step in (0, 10**5, 10**9):
        found = each.places(step, 4095, 4096)
        assert len(found) == 8
        assert found.number.max() < 5_850_000_000


def test_streams_are_apart() -> None:
    draws = {
        tuple(stream(*name).integers(0, 2**32, 2).tolist())
        for name in [(0, "augment", 1), (0, "augment", 2), (1, "augment", 1), (0, "caption", 1), (0, "augment")]
    }
    assert len(draws) == 5
    assert np.array_equal(stream(4, "x", 1).random(9), stream(4, "x", 1).random(9))


@pytest.mark.parametrize(("batch", "window", "most"), [(4096, None, 0.06), (32768, None, 0.06), (8192, 65536, 0.5)])
def test_few_of_a_batch_are_neighbours_and_the_share_is_known(batch: int, window: int | None, most: float) -> None:
    """Against the batches of a source of ten million samples."""
    order = Order(0, [np.full(1000, 10_000)], [Mixture(0, (1.0,))], batch, window)
    near = [(np.diff(np.sort(order.places(step).number)) <= 5).mean() for step in (101, 180, 250)]
    assert np.mean(near) == pytest.approx(order.sources[0].crowding(batch), rel=0.3)
    assert np.mean(near) < most


@pytest.mark.parametrize("batch", [16, 1024])
def test_the_default_window_of_small_batches_is_what_it_was(batch: int) -> None:
    shards = [np.full(40, 10_000)]
    now, before = (Order(3, shards, [Mixture(0, (1.0,))], batch, window) for window in (None, 1 << 17))
    for step in (0, 7, 99):
        assert np.array_equal(now.places(step).number, before.places(step).number)
    assert default_window(1025) == 128 * 1025
