"""The order of samples: a pure function of (seed, lengths, weights, position).

The idea: number the samples of a run 0, 1, 2, ... and compute what lies at a position instead of remembering what was
drawn before it. Then a resume is one integer, and world size and loader workers cannot matter: rank r of a global
batch reads its slice of the positions.

- Which source: nested floors. Of two sources with shares w and 1 - w, position n belongs to the first iff
  floor((n + 1) w) > floor(n w), and floor(n w) positions of it lie before; with more sources the second share is split
  again. Shares are exact fractions, so after any n positions each source has had its share to within the rounding.
- Which sample: a source is read without replacement, pass after pass, each pass in a fresh order. The order is a
  keyed permutation computed point by point (a Feistel network over Z_a x Z_b with a*b just above the length, walking
  on when it lands beyond the length: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so that no
  list of the source's length is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from math import isqrt
from typing import NamedTuple

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 8


class Place(NamedTuple):
    """What lies at a position of the stream."""

    source: int
    number: int  # of the sample within the source
    pass_: int  # how often the source had been read through before


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


def permuted(index: int, size: int, key: int) -> int:
    """Where the permutation `key` of range(size) sends `index`."""
    assert 0 <= index < size
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        row, column = divmod(index, columns)
        for round_ in range(0, _ROUNDS, 2):
            row = (row + _mixed(key, round_, column)) % rows
            column = (column + _mixed(key, round_ + 1, row)) % columns
        index = row * columns + column
        if index < size:
            return index


def _mixed(key: int, round_: int, value: int) -> int:
    """Splitmix64's finaliser (Steele, Lea and Flood 2014) over key, round and value."""
    z = (key ^ (value * 16 + round_ + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
    return z ^ z >> 31


class Order:
    """The samples of a run in order. The cursor is one integer: how many positions were seen."""

    def __init__(self, seed: int, lengths: Sequence[int], weights: Sequence[float], batch: int) -> None:
        assert len(lengths) == len(weights) > 0
        assert min(*lengths, *weights, batch) > 0
        self.seed, self.lengths, self.batch = seed, tuple(lengths), batch
        exact = [Fraction(repr(float(weight))) for weight in weights]
        # The share of each source among itself and those after it; the last one takes what is left.
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]

    def position(self, n: int) -> Place:
        """What lies at position `n` >= 0."""
        source, index = self._source(n)
        pass_, index = divmod(index, self.lengths[source])
        key = stable_hash("order", self.seed, source, pass_)
        return Place(source, permuted(index, self.lengths[source], key), pass_)

    def _source(self, n: int) -> tuple[int, int]:
        """The source of position `n`, and how many earlier positions were of that source."""
        for source, share in enumerate(self._shares):
            before = n * share.numerator // share.denominator
            if (n + 1) * share.numerator // share.denominator > before:
                return source, before
            n -= before
        raise AssertionError("the last share is 1")

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` positions belong to each source."""
        counts = []
        for share in self._shares:
            counts.append(n * share.numerator // share.denominator)
            n -= counts[-1]
        return counts

    def positions(self, step: int, rank: int = 0, world: int = 1) -> range:
        """The positions that rank `rank` of `world` reads of global batch `step`."""
        assert self.batch % world == 0
        assert 0 <= rank < world
        share = self.batch // world
        start = step * self.batch + rank * share
        return range(start, start + share)

    def spare(self, n: int, attempt: int) -> int | None:
        """The number of the sample, of the same source, that stands in at position `n` when the sample there and
        `attempt` spares before this one are bad. None when every other sample of the source has been tried."""
        source, number, _ = self.position(n)
        length = self.lengths[source]
        if attempt >= length - 1:
            return None
        key = stable_hash("spare", self.seed, source, n)
        spare = permuted(attempt, length, key)
        return spare if spare != number else permuted(length - 1, length, key)
