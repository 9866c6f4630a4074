"""Statistics of what goes by, in bounded memory: numbers, classes, copies, and pictures that look alike.

Everything is exact up to a bound, and says so where it no longer is. Quantiles beyond it come from every 2nd, then
every 4th, 8th number. Copies beyond it are counted among those items whose hash is small (Gibbons, "Distinct sampling",
2001): all copies of an item have its hash, so a share of the items stands for all, whatever came first.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST = 1 << 17  # numbers, classes or items that are held
_NAMED = 10  # groups that are named
_MEMBERS = 6  # of a group
_BANDS = 4
_FLAT = 8  # grey levels below which a picture shows nothing


class Values:
    """Numbers: mean, least and most of all; p10, p50, p90, p99 (numpy's linear interpolation)."""

    def __init__(self, most: int = MOST) -> None:
        self.count, self._most, self._step = 0, most, 1
        self._sum, self._least, self._greatest = 0.0, float("inf"), float("-inf")
        self._kept: list[float] = []

    def add(self, value: float) -> None:
        """One more number, finite."""
        self._sum += value
        self._least, self._greatest = min(self._least, value), max(self._greatest, value)
        if self.count % self._step == 0:
            self._kept.append(value)
            if len(self._kept) > self._most:
                self._kept, self._step = self._kept[::2], 2 * self._step
        self.count += 1

    def summary(self) -> dict[str, float] | None:
        """The statistics; None of no numbers."""
        if not self.count:
            return None
        p10, p50, p90, p99 = (float(q) for q in np.quantile(self._kept, [0.1, 0.5, 0.9, 0.99]))
        mean, least, most = self._sum / self.count, float(self._least), float(self._greatest)
        return {"mean": mean, "least": least, "p10": p10, "p50": p50, "p90": p90, "p99": p99, "most": most}


class Classes:
    """Names, by how often they come; those that come first after `most` different ones are counted together."""

    def __init__(self, most: int = 1000) -> None:
        self._most, self.others = most, 0
        self._counts: Counter[str] = Counter()

    def add(self, name: str) -> None:
        """One more."""
        if name in self._counts or len(self._counts) < self._most:
            self._counts[name] += 1
        else:
            self.others += 1

    def summary(self) -> dict[str, int]:
        """Counts, most frequent first."""
        return dict(self._counts.most_common()) | ({"(others)": self.others} if self.others else {})


class Copies:
    """Items by their identity: how many are copies of an earlier one, and the largest groups by their first names."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._level = most, 0
        self._groups: dict[bytes, list[Any]] = {}  # hash -> [times, first name]

    def add(self, identity: bytes, name: str) -> None:
        """One more item."""
        key = blake2b(identity, digest_size=16).digest()
        if self._small(key):
            self._groups.setdefault(key, [0, name])[0] += 1
            while len(self._groups) > self._most:
                self._level += 1
                self._groups = {key: group for key, group in self._groups.items() if self._small(key)}

    def _small(self, key: bytes) -> bool:
        return int.from_bytes(key[:8], "little") & ((1 << self._level) - 1) == 0

    def summary(self) -> dict[str, Any]:
        """Copies and groups: of all items, or estimated from a share of them."""
        largest = sorted((group for group in self._groups.values() if group[0] > 1), key=lambda group: -group[0])
        scale = 1 << self._level
        return {
            "copies": scale * sum(times - 1 for times, _ in largest),
            "groups": scale * len(largest),
            "largest": [{"times": times, "first": name} for times, name in largest[:_NAMED]],
        } | ({"estimated_from": 1 / scale} if self._level else {})


def difference_hash(pixels: NDArray[np.uint8]) -> int | None:
    """64 bits that stay nearly the same when a picture [H, W, 3] is scaled, recompressed or a little brighter: where
    each of 9 x 8 grey fields is brighter than the one left of it (dHash). None of a picture without contrast."""
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    if grey.max() - grey.min() < _FLAT:
        return None
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


class Alike:
    """Pictures that look alike: whose difference hashes differ in at most 3 of 64 bits, directly or by way of others.

    Two hashes so near have one of their four 16-bit bands in common, so only hashes that share a band are compared.
    Different hashes beyond `most` are not held: then the groups are those among the first pictures.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._groups: dict[int, tuple[list[str], list[int]]] = {}  # hash -> first keys, [times]

    def add(self, hash: int | None, key: str) -> None:
        """One more picture."""
        if hash is None or (hash not in self._groups and len(self._groups) >= self._most):
            return
        keys, times = self._groups.setdefault(hash, ([], [0]))
        times[0] += 1
        if len(keys) < _MEMBERS:
            keys.append(key)

    def summary(self) -> dict[str, Any]:
        """Pictures that look like an earlier one, and the largest groups by some of their keys."""
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
    """For each hash the first one of its group (union-find over near pairs)."""
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
