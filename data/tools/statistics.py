"""Streaming statistics in bounded memory: numbers, classes, duplicates, and near-duplicate pictures.

Everything is exact up to a bound, and estimates say so. Beyond the bound, quantiles use every 2nd, then every 4th, 8th
number. Duplicates are then counted among the items with a small hash (Gibbons, "Distinct sampling", 2001): all copies
of an item have the same hash, so a fraction of the items represents all, whatever their order.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST = 1 << 17  # numbers, classes or items kept in memory
_NAMED = 10  # groups listed in a summary
_MEMBERS = 6  # keys kept per group
_BANDS = 4
_FLAT = 8  # range of grey levels below which a picture has no contrast


class Values:
    """Numbers: mean, minimum and maximum; p10, p50, p90, p99 (numpy's linear interpolation)."""

    def __init__(self, most: int = MOST) -> None:
        self.count, self._most, self._step = 0, most, 1
        self._sum, self._least, self._greatest = 0.0, float("inf"), float("-inf")
        self._kept: list[float] = []

    def add(self, value: float) -> None:
        """Adds a finite number."""
        self._sum += value
        self._least, self._greatest = min(self._least, value), max(self._greatest, value)
        if self.count % self._step == 0:
            self._kept.append(value)
            if len(self._kept) > self._most:
                self._kept, self._step = self._kept[::2], 2 * self._step
        self.count += 1

    def summary(self) -> dict[str, float] | None:
        """The statistics; None without numbers."""
        if not self.count:
            return None
        p10, p50, p90, p99 = (float(q) for q in np.quantile(self._kept, [0.1, 0.5, 0.9, 0.99]))
        mean, least, most = self._sum / self.count, float(self._least), float(self._greatest)
        return {"mean": mean, "least": least, "p10": p10, "p50": p50, "p90": p90, "p99": p99, "most": most}


class Classes:
    """Counts of names; names first seen after `most` distinct ones are counted together."""

    def __init__(self, most: int = 1000) -> None:
        self._most, self.others = most, 0
        self._counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """Adds a name."""
        if name in self._counts or len(self._counts) < self._most:
            self._counts[name] += 1
        else:
            self.others += 1

    def summary(self) -> dict[str, int]:
        """Counts, most frequent first."""
        return dict(self._counts.most_common()) | ({"(others)": self.others} if self.others else {})


class Copies:
    """Duplicates by identity: the number of copies of earlier items, and the largest groups by their first names."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._level = most, 0
        self._groups: dict[bytes, list[Any]] = {}  # hash -> [times, first name]

    def add(self, identity: bytes, name: str) -> None:
        """Adds an item."""
        key = blake2b(identity, digest_size=16).digest()
        if self._small(key):
            self._groups.setdefault(key, [0, name])[0] += 1
            while len(self._groups) > self._most:
                self._level += 1
                self._groups = {key: group for key, group in self._groups.items() if self._small(key)}

    def _small(self, key: bytes) -> bool:
        return int.from_bytes(key[:8], "little") & ((1 << self._level) - 1) == 0

    def summary(self) -> dict[str, Any]:
        """Copies and groups among all items, or estimated from a fraction of them (`estimated_from`)."""
        largest = sorted((group for group in self._groups.values() if group[0] > 1), key=lambda group: -group[0])
        scale = 1 << self._level
        return {
            "copies": scale * sum(times - 1 for times, _ in largest),
            "groups": scale * len(largest),
            "largest": [{"times": times, "first": name} for times, name in largest[:_NAMED]],
        } | ({"estimated_from": 1 / scale} if self._level else {})


def difference_hash(pixels: NDArray[np.uint8]) -> int | None:
    """The 64-bit dHash of a picture uint8 [H, W, 3]: whether each of 9 x 8 grey cells is brighter than its left
    neighbour. Nearly unchanged by scaling, recompression and small changes of brightness. None without contrast."""
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    if grey.max() - grey.min() < _FLAT:
        return None
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


class Alike:
    """Near-duplicate pictures: difference hashes that differ in at most 3 of 64 bits, directly or through others.

    Two such hashes have at least one of their four 16-bit bands in common, so only hashes that share a band are
    compared. At most `most` distinct hashes are kept: beyond that, groups only cover the first pictures.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._groups: dict[int, tuple[list[str], list[int]]] = {}  # hash -> first keys, [times]

    def add(self, hash: int | None, key: str) -> None:
        """Adds a picture."""
        if hash is None or (hash not in self._groups and len(self._groups) >= self._most):
            return
        keys, times = self._groups.setdefault(hash, ([], [0]))
        times[0] += 1
        if len(keys) < _MEMBERS:
            keys.append(key)

    def summary(self) -> dict[str, Any]:
        """The number of near-duplicates of earlier pictures, and the largest groups with some of their keys."""
        hashes = np.array(list(self._groups), dtype=np.uint64)
        members = list(self._groups.values())
        joined: dict[int, list[int]] = {}
        for i, root in enumerate(_joined(hashes)):
            joined.setdefault(root, []).append(i)
        groups = []
        for own in joined.values():
            times = sum(members[i][1][0] for i in own)
            keys = [key for i in own for key in members[i][0]]
            groups.append((times, keys[:_MEMBERS]))
        largest = sorted((group for group in groups if group[0] > 1), key=lambda group: -group[0])
        return {
            "copies": sum(times - 1 for times, _ in largest),
            "groups": len(largest),
            "largest": [{"times": times, "keys": keys} for times, keys in largest[:_NAMED]],
        }


def _joined(hashes: NDArray[np.uint64]) -> list[int]:
    """For each hash the index of the first one of its group (union-find over near pairs)."""
    root = list(range(len(hashes)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for band in range(_BANDS):
        values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(values, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
            for at, i in enumerate(bucket[:-1]):
                later = bucket[at + 1 :]
                for j in later[np.bitwise_count(hashes[later] ^ hashes[i]) < _BANDS]:
                    first, second = sorted((find(int(i)), find(int(j))))
                    root[second] = first
    return [find(i) for i in range(len(hashes))]
