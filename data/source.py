"""A source: one collection of shards, opened by URL, whose samples have numbers 0 .. len - 1.

Samples are numbered by shard (sorted by URL), then in the order of the tar. All of a source's index is in memory;
the bytes of a sample are read when it is asked for, one range a sample, through the node's cache where it has room for
the source (blocks.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

from .blocks import BlockCache
from .config import DataError
from .files import Reader, ShardInfo, read_range, shown_url
from .ledger import shown
from .record import Record
from .shards import IMAGE_KINDS, ShardIndex, expand, index_shard, is_usable

_READ_KINDS = frozenset((*IMAGE_KINDS, "txt", "json"))
_GAP = 1 << 16  # bytes between two members that are cheaper read than skipped


class Source:
    """The samples of a URL. Reading is safe in any process and thread."""

    def __init__(self, url: str, shards: list[ShardIndex], read: Reader = read_range) -> None:
        self.url, self._read = url, read
        self._shards = shards
        self._ends = list(accumulate(len(shard.keys) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shard_sizes(self) -> list[int]:
        """The bytes of each shard that holds samples."""
        return [shard.size for shard in self._shards]

    @property
    def shard_lengths(self) -> list[int]:
        """The samples of each shard; numbers run through the shards in this order."""
        return [len(shard.keys) for shard in self._shards]

    def record(self, number: int) -> Record:
        """The raw members of sample `number`: picture, caption and metadata. DataError if the shard is gone."""
        shard, i = self._place(number)
        places = {kind: place for kind, place in shard.samples[i].items() if kind in _READ_KINDS}
        return Record(shard.keys[i], shard.url, self.offset(number), _members(self._read, shard.shard, places))

    def span(self, number: int) -> tuple[ShardInfo, int, int]:
        """The shard of sample `number`, and from where to where in it the sample lies, in bytes."""
        shard, i = self._place(number)
        places = shard.samples[i].values()
        return shard.shard, min(offset for offset, _ in places), max(offset + size for offset, size in places)

    @property
    def is_cached(self) -> bool:
        """Whether it is read through the node's cache."""
        return self._read is not read_range

    def read_through(self, cache: BlockCache, need: int) -> None:
        """Read through the cache if that has room for the `need` bytes that are drawn from at a time."""
        if not self.is_cached:
            self._read = cache.reader([shard.shard for shard in self._shards], need)

    def key(self, number: int) -> str:
        """The key of sample `number`; nothing is read."""
        shard, i = self._place(number)
        return shard.keys[i]

    def shard(self, number: int) -> str:
        """The URL of the shard that holds sample `number`."""
        return self._place(number)[0].url

    def offset(self, number: int) -> int:
        """Where the data of the sample's first member starts in its shard, in bytes."""
        shard, i = self._place(number)
        return min(offset for offset, _ in shard.samples[i].values())

    def _place(self, number: int) -> tuple[ShardIndex, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._ends, number)
        return self._shards[shard], number - (self._ends[shard - 1] if shard else 0)


def _members(read: Reader, shard: ShardInfo, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The members at `places`, by one read where they lie close together, as those of one sample do."""
    if not places:
        return {}
    start = min(offset for offset, _ in places.values())
    end = max(offset + size for offset, size in places.values())
    if end - start > sum(size for _, size in places.values()) + _GAP:
        return {kind: read(shard, offset, offset + size) for kind, (offset, size) in places.items()}
    span = read(shard, start, end)
    return {kind: span[offset - start : offset - start + size] for kind, (offset, size) in places.items()}


def open_source(url: str, cache: BlockCache | None = None) -> Source:
    """Opens `samples://NAME` or a glob/brace URL of tar shards, read through `cache` if they are remote and it has room
    for them; raises DataError if it holds no usable sample."""
    found = shards_of(url)
    read = cache.reader(found) if cache else read_range
    shards = [index_shard(shard, read) for shard in found]
    _check_keys(shards)
    usable = sum(is_usable(sample) for shard in shards for sample in shard.samples)
    if not usable:
        raise DataError(_nothing_usable(url, shards))
    return Source(url, [shard for shard in shards if shard.keys], read)


def shards_of(url: str) -> list[ShardInfo]:
    """The shards behind `samples://NAME` or a glob/brace URL, sorted. DataError if there is none."""
    return expand(_samples(url) if url.startswith("samples://") else url)


def _check_keys(shards: list[ShardIndex]) -> None:
    first: dict[str, str] = {}
    for shard in shards:
        for key in shard.keys:
            other = first.setdefault(key, shard.url)
            if other != shard.url:
                raise DataError(
                    f"{shown_url(other)} and {shown_url(shard.url)} both hold a sample with key {shown(key)}; "
                    f"keys must differ within a source, so pack one of them again"
                )


def _nothing_usable(url: str, shards: list[ShardIndex]) -> str:
    total = sum(len(shard.keys) for shard in shards)
    if not total:
        return f"{shown_url(url)} is empty: {len(shards)} shards and no sample in them; check how they were written"
    kinds = Counter(kind for shard in shards for sample in shard.samples for kind in sample)
    found = ", ".join("." + shown(kind, 20)[1:-1] for kind, _ in kinds.most_common(6))
    return (
        f"{shown_url(url)}: 0 of {total} samples have a picture and a caption: found {found}; "
        f"a picture is .{', .'.join(IMAGE_KINDS)}, a caption .txt or .json"
    )


def _samples(url: str) -> str:
    """The glob of the shards behind a samples:// URL."""
    from . import emoji  # packs on first use; nobody else pays for it

    known: dict[str, Callable[[], str]] = {"emoji": emoji.train_shards, "emoji/held_out": emoji.held_out_shards}
    name = url.removeprefix("samples://")
    if name not in known:
        raise DataError(f"{shown_url(url)} is unknown; there are {', '.join('samples://' + each for each in known)}")
    return known[name]()


def held_out(url: str) -> str | None:
    """The URL of the samples kept apart for evaluation, where a source has such a split."""
    return {"samples://emoji": "samples://emoji/held_out"}.get(url)
