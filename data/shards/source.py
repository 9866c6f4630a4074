"""A source: one collection of shards, opened by URL, with samples numbered 0 .. len - 1.

Samples are numbered by shard (sorted by URL), then in the order of the tar; with a filter, only the accepted samples
belong to the source and are numbered. Opening reads one small file whatever the number of shards (opening.py): the
index of a shard is only opened when one of its samples is requested, and the sample's bytes are then read as one range,
through the node's cache if the source fits in it (block_cache.py).

Keys must be unique within a shard. Equal keys in two shards are only detected in small sources (opening.py): at a
billion samples the keys would not fit in memory; `treering data lint` checks them all.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..builtin.registry import HELD_OUT, SampleSet, sample_set
from ..errors import BadSample, DataError, shown
from ..identity import SourceIdentity
from ..ledger import LedgerEntry
from ..storage.block_cache import BlockCache
from ..storage.files import Reader, ShardChanged, ShardInfo, changed, is_remote, read_range, shown_url
from ..storage.gzip_cache import Unpacked, is_gzip
from ..units import counted
from .account import Count, total
from .content import BLOCK, is_header_of
from .filter import Filter
from .index import IMAGE_KINDS, Handles, ShardIndex
from .index import READ_KINDS as READ_KINDS
from .listing import index_table, list_shards
from .opening import Accepted, apply_filter, gc_paused, summarize_anew, summarize_shards
from .parallel import Progress, silent
from .record import Record
from .summary import ShardSummary
from .tar_reader import DamagedShard

MOST_BYTES = 1 << 28  # of a member; a photo of 64 megapixels takes a tenth of it
_GAP = 1 << 16  # bytes between members up to which one read is cheaper than two


class Source:
    """The samples of a URL. Safe to read from any process and thread."""

    def __init__(
        self,
        url: str,
        shards: Sequence[ShardIndex],
        read: Reader | None = None,
        accepted: Accepted | None = None,
        skipped: Sequence[LedgerEntry] = (),
        summary: Sequence[ShardSummary] = (),
    ) -> None:
        """`read` reads ranges of shards (None: directly, .tar.gz unpacked); `accepted` selects the samples (None: all);
        `skipped` lists damaged shards; `summary` is that of all shards, also of those, under which `url` was opened."""
        whole = [len(shard) for shard in shards]
        lengths = whole if accepted is None else accepted.counts.tolist()
        self.url, self.skipped = url, tuple(skipped)
        self.samples_before_filter = sum(whole)
        self._read, self._accepted = read or Unpacked().read, accepted
        self._shards, self._summary = shards, summary
        self._places = [i for i, length in enumerate(lengths) if length]  # indices into `shards` of those with samples
        self._ends = list(accumulate(length for length in lengths if length))

    @property
    def skipped_members(self) -> Mapping[str, Count]:
        """The counts of what in the shards belongs to no sample."""
        return total(each.skipped_members for each in self._summary if each.skipped_members).skipped_members

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shard_lengths(self) -> NDArray[np.int64]:
        """The number of samples of each non-empty shard, int64 [shards], in the order of sample numbers."""
        ends = np.array(self._ends, np.int64)
        return ends - np.concatenate(([0], ends[:-1]))

    @property
    def shard_sizes(self) -> list[int]:
        """The size in bytes of each non-empty shard."""
        return [self._shards[place].size for place in self._places]

    @property
    def size(self) -> int:
        """The total size in bytes of the non-empty shards."""
        return sum(self.shard_sizes)

    def record(self, number: int, kinds: frozenset[str] = READ_KINDS) -> Record:
        """The raw members of sample `number` of these kinds (default: picture, caption and metadata).

        Raises DataError if the shard cannot be read, BadSample if a member is too large."""
        try:
            return self._record(number, kinds)
        except ShardChanged as error:
            self._check_content(number, error)
            return self._record(number, kinds)

    def _record(self, number: int, kinds: frozenset[str]) -> Record:
        shard, i = self._place(number)
        key, places = shard.key(i), shard.places(i)
        wanted = {kind: place for kind, place in places.items() if kind in kinds}
        check_sizes({kind: size for kind, (_, size) in wanted.items()})
        fields = read_members(self._read, shard.shard, key, wanted)
        return Record(key, shard.url, _first(places), fields, tuple(places))

    def _check_content(self, number: int, error: ShardChanged) -> None:
        """After a read that did not find what the index says: makes the index of the shard anew. If the samples are the
        same (the shard was touched, or written again), reading goes on with that, else `error` is raised."""
        place = self._places[self._shard_of(number)]
        shards, was = self._shards, self._shards[place].shard
        at = next((i for i, each in enumerate(self._summary) if each.shard.url == was.url), None)
        if at is None or not isinstance(shards, Handles):
            raise error
        try:
            now = summarize_anew(pattern_of(self.url), self._summary, at, read_range)
        except DamagedShard:  # it is being written
            raise error from None
        if (now.samples, now.digest) != (self._summary[at].samples, self._summary[at].digest):
            raise ShardChanged(
                f"{shown_url(was.url)} is not what it was when it was opened: it has {now.samples:,} samples, of which "
                f"some or all differ from the {self._summary[at].samples:,} before; start again with the shard as it "
                f"was, or start a new run with the new one"
            ) from None
        shards.replace(place, now.shard)

    def kinds(self, number: int) -> tuple[str, ...]:
        """The kinds of all members of sample `number`; reads only the shard's index."""
        shard, i = self._place(number)
        return tuple(shard.places(i))

    def span(self, number: int) -> tuple[ShardInfo, int, int]:
        """The shard of sample `number`, and the start and end in it of what is read for the sample, in bytes."""
        shard, i = self._place(number)
        places = shard.places(i)
        return shard.shard, _first(places) - BLOCK, max(offset + size for offset, size in places.values())

    @property
    def identity(self) -> SourceIdentity:
        """What identifies the samples and their order, wherever they are."""
        rows = {each.shard.url: each for each in self._summary}
        shards = [rows[self._shards[place].url] for place in self._places]
        chosen = [b"" if self._accepted is None else self._accepted.bits(place) for place in self._places]
        return SourceIdentity.of(
            [each.shard.url for each in shards],
            [f"{each.samples} {each.digest} {bits.hex()}" for each, bits in zip(shards, chosen, strict=True)],
            len(self),
        )

    @property
    def is_remote(self) -> bool:
        """Whether its shards are read over the network."""
        return any(is_remote(shard.url) for shard in self._shards[:1])

    @property
    def is_cached(self) -> bool:
        """Whether it is read through the node's cache."""
        return isinstance(getattr(self._read, "__self__", None), BlockCache)

    def read_through(self, cache: BlockCache, need: int) -> None:
        """Use the cache if the `need` bytes that are being read from at a time fit in it."""
        if self._read is read_range:
            self._read = cache.reader([shard.shard for shard in self._shards], need)

    def key(self, number: int) -> str:
        """The key of sample `number`; reads only the shard's index."""
        shard, i = self._place(number)
        return shard.key(i)

    def shard(self, number: int) -> str:
        """The URL of the shard of sample `number`; reads nothing."""
        return self._shards[self._places[self._shard_of(number)]].url

    def offset(self, number: int) -> int:
        """The byte at which the data of the sample's first member starts in its shard (.tar.gz: in the unpacked
        tar)."""
        shard, i = self._place(number)
        return _first(shard.places(i))

    def _shard_of(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return bisect_right(self._ends, number)

    def _place(self, number: int) -> tuple[ShardIndex, int]:
        """The shard of a sample, and the sample's number within the shard."""
        shard = self._shard_of(number)
        i = number - (self._ends[shard - 1] if shard else 0)
        if self._accepted is not None:
            i = int(self._accepted.numbers(self._places[shard])[i])
        return self._shards[self._places[shard]], i


def _first(places: dict[str, tuple[int, int]]) -> int:
    return min(offset for offset, _ in places.values())


def check_sizes(sizes: dict[str, int]) -> None:
    """Raises BadSample if a member (bytes by kind) is too large to be read into memory."""
    for kind, size in sizes.items():
        if size > MOST_BYTES:
            raise BadSample(f"member too large: .{shown(kind, 20)[1:-1]} has {size:,} bytes")


def read_members(read: Reader, shard: ShardInfo, key: str, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The members of sample `key` at `places` (offset and size by kind), in one read if they are close together.

    Raises ShardChanged if a header before them is that of another member."""
    if not places:
        return {}
    start = _first(places) - BLOCK
    end = max(offset + size for offset, size in places.values())
    if end - start > sum(size for _, size in places.values()) + _GAP:
        parts = {kind: read(shard, offset - BLOCK, offset + size) for kind, (offset, size) in places.items()}
    else:
        span = read(shard, start, end)
        parts = {kind: span[at - BLOCK - start : at + size - start] for kind, (at, size) in places.items()}
    for kind, part in parts.items():
        if not is_header_of(part[:BLOCK], key, kind, places[kind][1]):
            raise changed(shard, places[kind][0] - BLOCK, sum(places[kind]))
    return {kind: part[BLOCK:] for kind, part in parts.items()}


def open_source(
    url: str,
    cache: BlockCache | None = None,
    filter: str | None = None,
    bad_shards: Literal["refuse", "skip"] = "refuse",
    workers: int | None = None,
    progress: Progress = silent,
    captions: bool = True,
) -> Source:
    """Opens `samples://NAME` or a glob/brace URL of tar shards, read through `cache` if they are remote and fit in it.

    `filter` keeps the samples that an expression over their metadata accepts (filter.py). A damaged shard is an error,
    or with `bad_shards="skip"` it is skipped and listed in `skipped`. A shard that is missing or unreachable is always
    an error, since it could come back and change the order. Shards without an index are indexed by `workers` processes
    (None: chosen automatically); `progress(done, total)` is called after each shard. Raises DataError, also if no
    sample is usable; with `captions=False` a sample needs no caption to be usable.
    """
    wanted = _read_filter(url, filter)
    pattern = pattern_of(url)
    with gc_paused():
        found = list_shards(pattern)
    read = cache.reader(found) if cache else read_range
    summary = summarize_shards(pattern, found, read, bad_shards == "skip", workers, progress)
    whole = [each for each in summary if not each.fault]
    skipped = [
        LedgerEntry(url, each.shard.url, "", each.offset, f"damaged shard: {each.fault}")
        for each in summary
        if each.fault
    ]
    digests = {each.shard.url: each.digest for each in whole}
    shards = Handles(
        [each.shard for each in whole],
        [each.samples for each in whole],
        lambda shard, anew: index_table(shard, read, anew, digests[shard.url]),
    )
    if not sum(each.usable if captions else each.samples for each in whole):
        raise DataError(_nothing_usable(url, shards, skipped))
    kept = apply_filter(pattern, wanted, whole, shards, workers, progress) if wanted else None
    limit = cache.limit if cache else None
    return Source(url, shards, _unpacking(url, whole, Unpacked(read, limit)), kept, skipped, summary)


def shards_of(url: str) -> list[ShardInfo]:
    """The shards behind `samples://NAME` or a glob/brace URL, sorted. Raises DataError if there are none."""
    return list_shards(pattern_of(url))


def _read_filter(url: str, text: str | None) -> Filter | None:
    try:
        return None if text is None else Filter(text)
    except ValueError as error:
        raise DataError(f"{shown_url(url)}: {error}") from None


def _unpacking(url: str, summary: Sequence[ShardSummary], unpacked: Unpacked) -> Reader:
    """The reader for shards that may be .tar.gz. Raises DataError if their unpacked copies do not fit in the cache."""
    packed = [each for each in summary if is_gzip(each.shard.url)]
    need = sum(each.content for each in packed)
    if not packed:
        return unpacked.inner
    if need > unpacked.limit:
        raise DataError(
            f"{shown_url(url)}: {len(packed)} of its shards are .tar.gz and need {need:,} bytes unpacked, but the "
            f"cache may hold {unpacked.limit:,}; unpack the shards with gunzip, or raise data.cache.limit"
        )
    logging.getLogger(__name__).warning(
        "%s: %d of %d shards are .tar.gz, which are read from unpacked copies in the cache folder (%s bytes); "
        "write plain .tar shards instead, since gzip does not make pictures smaller",
        shown_url(url),
        len(packed),
        len(summary),
        f"{need:,}",
    )
    return unpacked.read


def _nothing_usable(url: str, shards: Sequence[ShardIndex], skipped: Sequence[LedgerEntry]) -> str:
    total = sum(len(shard) for shard in shards)
    if skipped and not total:
        return f"{shown_url(url)}: all its shards with samples are damaged; {skipped[0].reason}"
    if not total:
        return (
            f"{shown_url(url)} is empty: {counted(len(shards), 'shard')} without a sample; check how they were written"
        )
    kinds = Counter(kind for shard in shards for sample in shard.samples for kind in sample)
    found = ", ".join("." + shown(kind, 20)[1:-1] for kind, _ in kinds.most_common(6))
    return (
        f"{shown_url(url)}: 0 of {counted(total, 'sample')} have a picture and a caption: found {found}; "
        f"a picture is .{', .'.join(IMAGE_KINDS)}, a caption .txt or .json"
    )


def pattern_of(url: str) -> str:
    """The glob/brace URL of a source; `samples://` names are resolved. Raises DataError for an unknown name."""
    found = sample_set(url)
    if found is None:
        return url
    if not url.endswith(HELD_OUT):
        return found.train()
    if found.held_out is None:
        raise DataError(f"{shown_url(url)}: the set has no held-out samples for evaluation; name other shards")
    return found.held_out()


def attribution(url: str) -> str | None:
    """The credit to show with pictures of a source, if their licence requires one."""
    found = _known(url)
    return None if found is None else found.attribution


def held_out(url: str) -> str | None:
    """The URL of a source's held-out samples for evaluation; None if it has no such split."""
    found = None if url.endswith(HELD_OUT) else _known(url)
    return url + HELD_OUT if found and found.held_out else None


def _known(url: str) -> SampleSet | None:
    """The named set of a URL; None if there is none or it cannot be loaded (opening the source reports why)."""
    try:
        return sample_set(url)
    except DataError:
        return None
