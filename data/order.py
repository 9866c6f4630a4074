"""The order of samples: a pure function of (seed, lengths, mixtures, position).

The idea: number the samples of a run 0, 1, 2, ... and compute which sample a position holds instead of remembering
what was drawn before it. A resume then needs one integer, and world size and loader workers cannot change the order.

- Which source: nested floors. Of two sources with fractions w and 1 - w of the stream, position n belongs to the first
  iff floor((n + 1) w) > floor(n w), and floor(n w) earlier positions belong to it; with more sources the second
  fraction is split again. Fractions are exact, so after any n positions each source has its fraction of them, up to
  rounding. A later period of the run may have other fractions; every source continues where it was.
- Which sample: a source is read without replacement, pass after pass, each pass in a new order. A source of at most
  `shuffle` samples is permuted as a whole. A larger one could then only be read sample by sample, with each node
  fetching every shard, so it is read in **lanes**: a pass permutes the shards, concatenates them into one line and cuts
  that line into L lanes of equal length; every lane is read front to back in windows of shuffle / L samples, permuted
  within the window, and consecutive draws visit the lanes in turn. The first windows differ in length, so that later
  windows do not all end at the same step.
- Which rank: the places of a global batch are sorted by lane and split into equal slices, one per rank. So a rank keeps
  the same lanes step after step and reads long ranges of a shard from each: a shard is read by one rank per pass,
  except shards at the edges of lanes. Consecutive draws step through the lanes with a golden-ratio stride, so that a
  source which fills only part of a batch still draws evenly from the whole line, and ranks keep their lanes.

Lanes do not depend on the world size, and ranks do not enter the order: any world size that divides the batch sees
the same global batches. All permutations are computed point by point (a keyed Feistel network over Z_a x Z_b with a*b
just above the length, applied again while the result is beyond the length: Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002); the only state kept is the order of the shards in a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_NEAR_SPARES = 4  # spares from the place's own window; of samples that are bad here and there, four in a row are rare
_WINDOW, _BATCHES = 1 << 17, 128
"""samples that are shuffled together by default: at least so many, and those of so many batches"""
_NEAR = 5  # places of a shard within which two samples are neighbours
_FINEST = 1 << 40  # the largest denominator of a fraction: products with a position in a batch stay below 2^63


def default_window(batch: int) -> int:
    """The number of samples that are shuffled together unless a recipe says otherwise. It follows large batches, which
    would else be full of neighbours: frames of one video, pictures of one page."""
    return max(_WINDOW, _BATCHES * batch)


def stream(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """A separate random generator for each (seed, name, numbers), the same on every machine and in every process."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stable_hash(name), *numbers])))


def stable_hash(*parts: str | int) -> int:
    """A 64-bit hash that depends only on the parts and their order."""
    digest = blake2b(digest_size=8)
    for part in parts:
        encoded = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def permuted(index: Ints | int, size: Ints | int, key: NDArray[np.uint64] | int) -> Ints:
    """The image of `index` under the permutation `key` of range(size): int64, in the arguments' broadcast shape."""
    index, size = np.asarray(index, np.int64), np.asarray(size, np.int64)
    assert np.all((index >= 0) & (index < size))
    shape = np.broadcast_shapes(index.shape, size.shape, np.shape(key))
    sizes = np.broadcast_to(size, shape).ravel()
    keys = np.broadcast_to(np.asarray(key, np.uint64), shape).ravel()
    rows = _integer_sqrt(sizes - 1) + 1
    columns = -(-sizes // rows)
    here = np.broadcast_to(index, shape).ravel().copy()
    left = np.arange(len(here))
    while len(left):
        here[left] = _feistel(here[left], rows[left], columns[left], keys[left])
        left = left[here[left] >= sizes[left]]
    return here.reshape(shape)


def _feistel(index: Ints, rows: Ints, columns: Ints, key: NDArray[np.uint64]) -> Ints:
    """One application of the network on Z_rows x Z_columns."""
    row, column = np.divmod(index, columns)
    for round_ in range(0, _ROUNDS, 2):
        row = (row + _remainder(_mix(key, round_, column), rows)) % rows
        column = (column + _remainder(_mix(key, round_ + 1, row), columns)) % columns
    return row * columns + column


def _remainder(value: NDArray[np.uint64], divisor: Ints) -> Ints:
    return (value % divisor.astype(np.uint64)).astype(np.int64)


def _mix(key: NDArray[np.uint64] | np.uint64, round_: int, value: Ints) -> NDArray[np.uint64]:
    """Splitmix64's finaliser (Steele, Lea and Flood 2014) over key, round and value; wraps at 64 bits."""
    z = key ^ (value.astype(np.uint64) * np.uint64(16) + np.uint64(round_ + 1)) * np.uint64(_GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ z >> np.uint64(31)
    return mixed


def _integer_sqrt(value: Ints) -> Ints:
    """The integer square root; the floating-point one may be off by one from 2^52 on."""
    root = np.sqrt(value.astype(np.float64)).astype(np.int64)
    root -= root * root > value
    root += (root + 1) * (root + 1) <= value
    return root


class Place(NamedTuple):
    """The sample at a position of the stream."""

    position: int
    source: int
    number: int  # of the sample within its source
    draw: int  # number of samples drawn from the source before this one


@dataclass(frozen=True, slots=True)
class Places:
    """The samples at several positions: each field of `Place` as an int64 array."""

    position: Ints
    source: Ints
    number: Ints
    draw: Ints

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, part: slice | Ints) -> Places:
        return Places(self.position[part], self.source[part], self.number[part], self.draw[part])

    def __iter__(self) -> Iterator[Place]:
        columns = (self.position, self.source, self.number, self.draw)
        return map(Place._make, zip(*(column.tolist() for column in columns), strict=True))


class Mixture(NamedTuple):
    """The weights of the sources from a step on; a source of weight 0 is not drawn."""

    step: int
    weights: tuple[float, ...]


class Order:
    """The samples of a run in order. The cursor is one integer: the number of positions seen."""

    def __init__(
        self,
        seed: int,
        shards: Sequence[Sequence[int] | Ints],
        mixtures: Sequence[Mixture],
        batch: int,
        shuffle: int | None = None,
        lanes: int = 1 << 10,
    ) -> None:
        """`shards` holds, for every source, the number of samples in each shard; the first of `mixtures` is at step
        0. `shuffle` None: `default_window`."""
        shuffle = default_window(batch) if shuffle is None else shuffle
        assert mixtures[0].step == 0
        assert all(before.step < after.step for before, after in pairwise(mixtures))
        self.seed, self.batch = seed, batch
        self.sources = [Line(seed, i, lengths, shuffle, min(lanes, batch)) for i, lengths in enumerate(shards)]
        self.lengths = tuple(line.length for line in self.sources)
        self._spans: list[_Span] = []
        for step, weights in mixtures:
            self._spans.append(_Span(step * batch, weights, self.counts(step) if step else [0] * len(weights)))

    def places(self, step: int, rank: int = 0, world: int = 1) -> Places:
        """The part of global batch `step` that rank `rank` of `world` reads.

        The batch is sorted by lane, so that a rank's slice keeps the same lanes step after step. Which samples they are
        is computed for this slice alone.
        """
        assert self.batch % world == 0
        assert 0 <= rank < world
        start, per_rank = step * self.batch, self.batch // world
        source, draw = self._span(start).draw_sources(start, self.batch)
        line_position = np.arange(self.batch) / self.batch  # relative position on its source's line, 0 to 1
        for i, line in enumerate(self.sources):
            if line.lanes:
                (rows,) = np.nonzero(source == i)
                line_position[rows] = line.lane(draw[rows]) / line.lanes
        own = np.argsort(line_position, kind="stable")[rank * per_rank : (rank + 1) * per_rank]
        source, draw, number = source[own], draw[own], np.empty(per_rank, np.int64)
        for i, line in enumerate(self.sources):
            (rows,) = np.nonzero(source == i)
            number[rows] = line.numbers(draw[rows])
        return Places(start + own, source, number, draw)

    def _span(self, position: int) -> _Span:
        return next(span for span in reversed(self._spans) if span.start <= position)

    def counts(self, step: int) -> list[int]:
        """The number of positions before global batch `step` that belong to each source."""
        return self._span(step * self.batch).counts(step * self.batch)

    def spare(self, place: Place, attempt: int) -> int | None:
        """The number of the sample of the same source that replaces a bad one at `place` after `attempt` bad spares.

        The first few spares come from the window of the place, which is being read anyway, in a keyed order; then they
        come from the whole source, since bad samples lie together (a bad shard is larger than a window). None when
        every sample has been tried."""
        key = stable_hash("spare", self.seed, place.source, place.position)
        line = self.sources[place.source]
        start, size = line.window(place.draw)
        near = min(size - 1, _NEAR_SPARES) if size < line.length else size - 1
        if attempt < near:
            spare = line.number_at(place.draw, start + _permute_one(attempt, size, key))
            if spare == place.number:  # the bad sample itself: use the last place of the permutation, not reached above
                spare = line.number_at(place.draw, start + _permute_one(size - 1, size, key))
            return spare
        attempt -= near
        return _permute_one(attempt, line.length, key) if size < line.length and attempt < line.length else None


def _permute_one(index: int, size: int, key: int) -> int:
    return int(permuted(index, size, key))


class _Span:
    """A period of the run with one mixture: from position `start` on, after `before` draws from each source."""

    def __init__(self, start: int, weights: Sequence[float], before: Sequence[int]) -> None:
        assert len(weights) == len(before)
        assert min(weights) >= 0 < max(weights)
        self.start, self._before = start, before
        exact = [Fraction(repr(float(weight))) for weight in weights]
        # Each source's fraction of what the sources before it leave; the last one with a weight takes the rest.
        self._fractions = [
            (weight / sum(exact[i:])).limit_denominator(_FINEST) if weight else Fraction(0)
            for i, weight in enumerate(exact)
        ]

    def counts(self, position: int) -> list[int]:
        """The number of positions before this one that belong to each source."""
        counts, n = [], position - self.start
        for fraction, before in zip(self._fractions, self._before, strict=True):
            taken = n * fraction.numerator // fraction.denominator
            counts.append(before + taken)
            n -= taken
        return counts

    def draw_sources(self, position: int, count: int) -> tuple[Ints, Ints]:
        """The sources of `count` positions from this one on, and how many draws each source had before: int64 [count].

        Exact at any position: the start is computed in Python integers, the rest relative to it in int64."""
        source, index = np.full(count, -1, np.int64), np.zeros(count, np.int64)
        start, ahead = position - self.start, np.arange(count, dtype=np.int64)
        for i, (fraction, before) in enumerate(zip(self._fractions, self._before, strict=True)):
            up, down = fraction.numerator, fraction.denominator
            first, rest = divmod(start * up, down)
            taken, after = (rest + ahead * up) // down, (rest + (ahead + 1) * up) // down
            hit = (after > taken) & (source < 0)
            source[hit], index[hit] = i, before + first + taken[hit]
            start, ahead = start - first, ahead - taken
        assert source.min() >= 0, "the last fraction is 1"
        return source, index


class Line:
    """The samples of one source, laid out in a new order in each pass; draws are counted over all passes."""

    def __init__(self, seed: int, source: int, shards: Sequence[int] | Ints, shuffle: int, lanes: int) -> None:
        self._seed, self._source = seed, source
        self._shards = np.asarray(shards, np.int64)
        self._firsts = np.cumsum(self._shards) - self._shards  # the number of each shard's first sample
        self.length = int(self._shards.sum())
        assert self.length > 0
        assert self._shards.min() >= 0
        self.lanes = 0 if self.length <= shuffle else lanes
        """0: the source is permuted as a whole, without lanes"""
        if self.lanes:
            self.window_size = max(1, shuffle // lanes)
            self._stride = next(n for n in range(max(1, round(lanes * 0.618)), lanes + 1) if gcd(n, lanes) == 1)
            turn = np.empty(lanes, np.int64)  # the place of each lane in the visiting order
            turn[np.arange(lanes) * self._stride % lanes] = np.arange(lanes)
            self._phases = turn * self.window_size // lanes  # by how much a lane's first window is shorter
            self._sizes = self.length // lanes + (turn < self.length % lanes)
            self._starts = np.cumsum(self._sizes) - self._sizes
        self._layouts: dict[int, tuple[Ints, Ints]] = {}

    def crowding(self, draws: float) -> float:
        """The fraction of a batch's `draws` samples that have another one at most five places further on in the
        shard."""
        pool = self.window_size * self.lanes if self.lanes else self.length
        return 1 - (1 - min(1.0, draws / pool)) ** _NEAR

    def lane(self, draw: Ints) -> Ints:
        """The lane of each draw, int64."""
        return draw % self.length % self.lanes * self._stride % self.lanes

    def numbers(self, draw: Ints) -> Ints:
        """The sample number of each draw, int64."""
        numbers = np.empty_like(draw)
        passes = draw // self.length
        for pass_ in np.unique(passes).tolist():
            (rows,) = np.nonzero(passes == pass_)
            here = draw[rows] - pass_ * self.length
            key = stable_hash("order", self._seed, self._source, pass_)
            if not self.lanes:
                numbers[rows] = permuted(here, self.length, key)
                continue
            lane, start, size = self._windows(here)
            window = np.uint64(key) ^ _mix(np.uint64(key), _ROUNDS, start)
            numbers[rows] = self._samples_at(
                pass_, start + permuted(here // self.lanes - (start - self._starts[lane]), size, window)
            )
        return numbers

    def _windows(self, draw: Ints) -> tuple[Ints, Ints, Ints]:
        """For draws of one pass: the lane, and the start (on the line) and length of the window."""
        lane = draw % self.lanes * self._stride % self.lanes
        phase = self._phases[lane]
        end = ((draw // self.lanes + phase) // self.window_size + 1) * self.window_size - phase
        start = np.maximum(end - self.window_size, 0)
        return lane, self._starts[lane] + start, np.minimum(end, self._sizes[lane]) - start

    def window(self, draw: int) -> tuple[int, int]:
        """Start and size, on the line, of the window that this draw belongs to."""
        if not self.lanes:
            return 0, self.length
        _, start, size = self._windows(np.array([draw % self.length]))
        return int(start[0]), int(size[0])

    def number_at(self, draw: int, place: int) -> int:
        """The number of the sample at `place` on the line, in the pass of this draw."""
        return int(self._samples_at(draw // self.length, np.array([place]))[0]) if self.lanes else place

    def _samples_at(self, pass_: int, place: Ints) -> Ints:
        shards, ends = self._layout(pass_)
        which = np.searchsorted(ends, place, side="right")
        shard = shards[which]
        return self._firsts[shard] + place - (ends[which] - self._shards[shard])

    def _layout(self, pass_: int) -> tuple[Ints, Ints]:
        """The order of the shards in a pass, and the end of each on the line. Neighbouring passes stay cached."""
        if pass_ not in self._layouts:
            key = np.uint64(stable_hash("shards", self._seed, self._source, pass_))
            shards = np.argsort(_mix(key, 0, np.arange(len(self._shards))), kind="stable")
            kept = {old: layout for old, layout in self._layouts.items() if abs(old - pass_) == 1}
            self._layouts = {**kept, pass_: (shards, np.cumsum(self._shards[shards]))}
        return self._layouts[pass_]
