"""The order of samples: a pure function of (seed, lengths, mixtures, position).

The idea: number the samples of a run 0, 1, 2, ... and compute what lies at a position instead of remembering what was
drawn before it. Then a resume is one integer, and world size and loader workers cannot matter.

- Which source: nested floors. Of two sources with shares w and 1 - w, position n belongs to the first iff
  floor((n + 1) w) > floor(n w), and floor(n w) positions of it lie before; with more sources the second share is split
  again. Shares are exact fractions, so after any n positions each source has had its share to within the rounding. A
  later stretch of the run may have other shares; every source goes on where it was.
- Which sample: a source is read without replacement, pass after pass, each pass in a fresh order. A source of at most
  `shuffle` samples is permuted as a whole. A larger one could then only be read sample by sample, each node fetching
  every shard, so it is read in **lanes**: a pass permutes the shards, lays them end to end and cuts that line into L
  lanes of equal length; every lane is read front to back in windows of shuffle / L samples, permuted within, and
  consecutive draws visit the lanes in turn. The first windows differ in length, so that later ones do not all end at
  once.
- Who reads it: the places of a global batch are sorted by lane and dealt to the ranks in equal slices. So a rank has
  the same lanes step after step, in each of which it reads large stretches of a shard: a shard is read by one rank a
  pass, but for those at the edges of lanes. Which lanes follow one another is a golden stride over the line, so that
  a source which fills only a part of a batch still draws evenly from all of the line, and ranks keep their lanes.

Lanes do not depend on the world, and ranks are not written into the order: any world size that divides the batch sees
the same global batches. All permutations are computed point by point (a keyed Feistel network over Z_a x Z_b with a*b
just above the length, walking on when it lands beyond it: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002); what is remembered is one line of shards a pass.
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
_FINEST = 1 << 40  # the largest denominator of a share: products with a position in a batch stay below 2^63


def stream(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """A random generator of its own for each (seed, name, numbers), the same on every machine and in every process."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stable_hash(name), *numbers])))


def stable_hash(*parts: str | int) -> int:
    """64 bits that depend on the parts and their order alone."""
    digest = blake2b(digest_size=8)
    for part in parts:
        encoded = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def permuted(index: Ints | int, size: Ints | int, key: NDArray[np.uint64] | int) -> Ints:
    """Where the permutation `key` of range(size) sends `index`: int64, in the arguments' common shape."""
    index, size = np.asarray(index, np.int64), np.asarray(size, np.int64)
    assert np.all((index >= 0) & (index < size))
    shape = np.broadcast_shapes(index.shape, size.shape, np.shape(key))
    sizes = np.broadcast_to(size, shape).ravel()
    keys = np.broadcast_to(np.asarray(key, np.uint64), shape).ravel()
    rows = _root(sizes - 1) + 1
    columns = -(-sizes // rows)
    here = np.broadcast_to(index, shape).ravel().copy()
    left = np.arange(len(here))
    while len(left):
        here[left] = _walked(here[left], rows[left], columns[left], keys[left])
        left = left[here[left] >= sizes[left]]
    return here.reshape(shape)


def _walked(index: Ints, rows: Ints, columns: Ints, key: NDArray[np.uint64]) -> Ints:
    """One application of the network on Z_rows x Z_columns."""
    row, column = np.divmod(index, columns)
    for round_ in range(0, _ROUNDS, 2):
        row = (row + _remainder(_mixed(key, round_, column), rows)) % rows
        column = (column + _remainder(_mixed(key, round_ + 1, row), columns)) % columns
    return row * columns + column


def _remainder(value: NDArray[np.uint64], divisor: Ints) -> Ints:
    return (value % divisor.astype(np.uint64)).astype(np.int64)


def _mixed(key: NDArray[np.uint64] | np.uint64, round_: int, value: Ints) -> NDArray[np.uint64]:
    """Splitmix64's finaliser (Steele, Lea and Flood 2014) over key, round and value; wraps at 64 bits."""
    z = key ^ (value.astype(np.uint64) * np.uint64(16) + np.uint64(round_ + 1)) * np.uint64(_GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ z >> np.uint64(31)
    return mixed


def _root(value: Ints) -> Ints:
    """The integer square root; a floating one is off by one here and there from 2^52 on."""
    root = np.sqrt(value.astype(np.float64)).astype(np.int64)
    root -= root * root > value
    root += (root + 1) * (root + 1) <= value
    return root


class Place(NamedTuple):
    """What lies at a position of the stream."""

    position: int
    source: int
    number: int  # of the sample within its source
    draw: int  # how many were drawn from the source before it


@dataclass(frozen=True, slots=True)
class Places:
    """What lies at some positions, an array of the fields of Place each."""

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
    """The weights of the sources from a step on; a source of weight 0 rests."""

    step: int
    weights: tuple[float, ...]


class Order:
    """The samples of a run in order. The cursor is one integer: how many positions were seen."""

    def __init__(
        self,
        seed: int,
        shards: Sequence[Sequence[int] | Ints],
        mixtures: Sequence[Mixture],
        batch: int,
        shuffle: int = 1 << 17,
        lanes: int = 1 << 10,
    ) -> None:
        """`shards` holds, for every source, the samples in each of its shards; the first of `mixtures` is at step 0."""
        assert mixtures[0].step == 0
        assert all(before.step < after.step for before, after in pairwise(mixtures))
        self.seed, self.batch = seed, batch
        self.sources = [Line(seed, i, lengths, shuffle, min(lanes, batch)) for i, lengths in enumerate(shards)]
        self.lengths = tuple(line.length for line in self.sources)
        self._spans: list[_Span] = []
        for step, weights in mixtures:
            self._spans.append(_Span(step * batch, weights, self.counts(step) if step else [0] * len(weights)))

    def places(self, step: int, rank: int = 0, world: int = 1) -> Places:
        """What rank `rank` of `world` reads of global batch `step`."""
        assert self.batch % world == 0
        assert 0 <= rank < world
        share = self.batch // world
        return self._sorted(step)[rank * share : (rank + 1) * share]

    def _sorted(self, step: int) -> Places:
        """Global batch `step`, by lane."""
        start = step * self.batch
        source, draw = self._span(start).drawn(start, self.batch)
        number = np.empty_like(draw)
        along = np.arange(self.batch) / self.batch  # where on the line of its source a place lies, 0 to 1
        for i, line in enumerate(self.sources):
            (of,) = np.nonzero(source == i)
            number[of] = line.numbers(draw[of])
            if line.lanes:
                along[of] = line.lane(draw[of]) / line.lanes
        position = np.arange(start, start + self.batch, dtype=np.int64)
        return Places(position, source, number, draw)[np.argsort(along, kind="stable")]

    def _span(self, position: int) -> _Span:
        return next(span for span in reversed(self._spans) if span.start <= position)

    def counts(self, step: int) -> list[int]:
        """How many of the positions before global batch `step` belong to each source."""
        return self._span(step * self.batch).counts(step * self.batch)

    def spare(self, place: Place, attempt: int) -> int | None:
        """The number of the sample, of the same source, that stands in when the one at `place` and `attempt` spares
        before this one are bad: those of its window in some order, then all. None when every one has been tried."""
        key = stable_hash("spare", self.seed, place.source, place.position)
        line = self.sources[place.source]
        start, size = line.window(place.draw)
        if attempt < size - 1:
            spare = line.at(place.draw, start + _one(attempt, size, key))
            return spare if spare != place.number else line.at(place.draw, start + _one(size - 1, size, key))
        attempt -= size - 1
        return _one(attempt, line.length, key) if size < line.length and attempt < line.length else None


def _one(index: int, size: int, key: int) -> int:
    return int(permuted(index, size, key))


class _Span:
    """A stretch of the run with one mixture, from position `start` on, when `before` were drawn from each source."""

    def __init__(self, start: int, weights: Sequence[float], before: Sequence[int]) -> None:
        assert len(weights) == len(before)
        assert min(weights) >= 0 < max(weights)
        self.start, self._before = start, before
        exact = [Fraction(repr(float(weight))) for weight in weights]
        # The share of each source among itself and those after it; the last one with a weight takes what is left.
        self._shares = [
            (weight / sum(exact[i:])).limit_denominator(_FINEST) if weight else Fraction(0)
            for i, weight in enumerate(exact)
        ]

    def counts(self, position: int) -> list[int]:
        """How many of the positions before this one belong to each source."""
        counts, n = [], position - self.start
        for share, before in zip(self._shares, self._before, strict=True):
            own = n * share.numerator // share.denominator
            counts.append(before + own)
            n -= own
        return counts

    def drawn(self, position: int, count: int) -> tuple[Ints, Ints]:
        """The sources of `count` positions from this one on, and how many were drawn from each before: int64 [count].

        Numbers of any size stay exact: the start is reckoned in Python's integers, the rest relative to it."""
        source, index = np.full(count, -1, np.int64), np.zeros(count, np.int64)
        start, ahead = position - self.start, np.arange(count, dtype=np.int64)
        for i, (share, before) in enumerate(zip(self._shares, self._before, strict=True)):
            up, down = share.numerator, share.denominator
            first, rest = divmod(start * up, down)
            own, after = (rest + ahead * up) // down, (rest + (ahead + 1) * up) // down
            hit = (after > own) & (source < 0)
            source[hit], index[hit] = i, before + first + own[hit]
            start, ahead = start - first, ahead - own
        assert source.min() >= 0, "the last share is 1"
        return source, index


class Line:
    """The samples of one source, laid out anew in each pass: a draw counts what came before it, over all passes."""

    def __init__(self, seed: int, source: int, shards: Sequence[int] | Ints, shuffle: int, lanes: int) -> None:
        self._seed, self._source = seed, source
        self._shards = np.asarray(shards, np.int64)
        self._firsts = np.cumsum(self._shards) - self._shards  # the number of each shard's first sample
        self.length = int(self._shards.sum())
        assert self.length > 0
        assert self._shards.min() >= 0
        self.lanes = 0 if self.length <= shuffle else lanes
        """0: the source is permuted as a whole"""
        if self.lanes:
            self.most_in_window = max(1, shuffle // lanes)
            self._stride = next(n for n in range(max(1, round(lanes * 0.618)), lanes + 1) if gcd(n, lanes) == 1)
            turn = np.empty(lanes, np.int64)  # the turn of each lane
            turn[np.arange(lanes) * self._stride % lanes] = np.arange(lanes)
            self._phases = turn * self.most_in_window // lanes  # by how much a lane's first window is shorter
            self._sizes = self.length // lanes + (turn < self.length % lanes)
            self._starts = np.cumsum(self._sizes) - self._sizes
        self._layouts: dict[int, tuple[Ints, Ints]] = {}

    def lane(self, draw: Ints) -> Ints:
        """The lane of each draw."""
        return draw % self.length % self.lanes * self._stride % self.lanes

    def numbers(self, draw: Ints) -> Ints:
        """The numbers of the samples at each draw."""
        numbers = np.empty_like(draw)
        passes = draw // self.length
        for pass_ in np.unique(passes).tolist():
            (of,) = np.nonzero(passes == pass_)
            here = draw[of] - pass_ * self.length
            key = stable_hash("order", self._seed, self._source, pass_)
            if not self.lanes:
                numbers[of] = permuted(here, self.length, key)
                continue
            lane, start, size = self._windows(here)
            window = np.uint64(key) ^ _mixed(np.uint64(key), _ROUNDS, start)
            numbers[of] = self._on_line(
                pass_, start + permuted(here // self.lanes - (start - self._starts[lane]), size, window)
            )
        return numbers

    def _windows(self, draw: Ints) -> tuple[Ints, Ints, Ints]:
        """For draws of one pass: lane, where on the line the window starts, and how long it is."""
        lane = draw % self.lanes * self._stride % self.lanes
        phase = self._phases[lane]
        end = ((draw // self.lanes + phase) // self.most_in_window + 1) * self.most_in_window - phase
        start = np.maximum(end - self.most_in_window, 0)
        return lane, self._starts[lane] + start, np.minimum(end, self._sizes[lane]) - start

    def window(self, draw: int) -> tuple[int, int]:
        """Start and size, on the line, of the stretch that is read together with this draw."""
        if not self.lanes:
            return 0, self.length
        _, start, size = self._windows(np.array([draw % self.length]))
        return int(start[0]), int(size[0])

    def at(self, draw: int, place: int) -> int:
        """The number of the sample at `place` on the line of the pass of this draw."""
        return int(self._on_line(draw // self.length, np.array([place]))[0]) if self.lanes else place

    def _on_line(self, pass_: int, place: Ints) -> Ints:
        shards, ends = self._layout(pass_)
        which = np.searchsorted(ends, place, side="right")
        shard = shards[which]
        return self._firsts[shard] + place - (ends[which] - self._shards[shard])

    def _layout(self, pass_: int) -> tuple[Ints, Ints]:
        """The order of the shards in a pass, and where on the line each ends."""
        if pass_ not in self._layouts:
            key = np.uint64(stable_hash("shards", self._seed, self._source, pass_))
            shards = np.argsort(_mixed(key, 0, np.arange(len(self._shards))), kind="stable")
            kept = {old: layout for old, layout in self._layouts.items() if abs(old - pass_) == 1}
            self._layouts = {**kept, pass_: (shards, np.cumsum(self._shards[shards]))}
        return self._layouts[pass_]
