"""A source: one collection of shards, opened by URL, whose samples have numbers 0 .. len - 1.

Samples are numbered by shard (sorted by URL), then in the order of the tar; with a filter, those that it accepts are
the source, and only they are numbered. Opening reads one small file whatever the number of shards (opening.py): the
index of a shard is not touched before one of its samples is asked for, and the sample's bytes are then read by one
range, through the node's cache where it has room for the source (blocks.py).

Keys must differ within a shard. Whether two shards hold one key is looked for in small sources alone (opening.py):
at a billion samples the keys would not fit in memory, and `treering data lint` is the place to find out.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..builtin.registry import HELD_OUT, SampleSet, sample_set
from ..errors import BadSample, DataError, shown
from ..ledger import LedgerEntry
from ..storage.block_cache import BlockCache
from ..storage.files import Reader, ShardInfo, is_remote, read_range, shown_url
from ..storage.gzip_cache import Unpacked, is_packed
from .filter import Filter
from .index import IMAGE_KINDS, Handles, ShardIndex
from .listing import index_table, list_shards
from .opening import Accepted, accepted, summed_up, undisturbed
from .parallel import Told, silent
from .record import Record
from .summary import ShardSummary

READ_KINDS = frozenset((*IMAGE_KINDS, "txt", "json"))
MOST_BYTES = 1 << 28  # of a member; a photo of 64 megapixels has a tenth of it
_GAP = 1 << 16  # bytes between two members that are cheaper read than skipped


class Source:
    """The samples of a URL. Reading is safe in any process and thread."""

    def __init__(
        self,
        url: str,
        shards: Sequence[ShardIndex],
        read: Reader | None = None,
        accepted: Accepted | None = None,
        left_out: Sequence[LedgerEntry] = (),
    ) -> None:
        """`read` reads ranges of shards (None: as they lie, .tar.gz unpacked); `accepted` says which samples are the
        source (None: all); `left_out` names damaged shards."""
        whole = [len(shard) for shard in shards]
        lengths = whole if accepted is None else accepted.counts.tolist()
        self.url, self.left_out = url, tuple(left_out)
        self.samples_before_filter = sum(whole)
        self._read, self._accepted = read or Unpacked().read, accepted
        self._shards = shards
        self._places = [i for i, length in enumerate(lengths) if length]  # in `shards`, of those that hold samples
        self._ends = list(accumulate(length for length in lengths if length))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shard_lengths(self) -> NDArray[np.int64]:
        """The samples of each shard that holds some, int64 [shards]; numbers run through the shards in order."""
        ends = np.array(self._ends, np.int64)
        return ends - np.concatenate(([0], ends[:-1]))

    @property
    def shard_sizes(self) -> list[int]:
        """The bytes of each shard that holds samples."""
        return [self._shards[place].size for place in self._places]

    @property
    def size(self) -> int:
        """The bytes of all shards that hold samples."""
        return sum(self.shard_sizes)

    def record(self, number: int, kinds: frozenset[str] = READ_KINDS) -> Record:
        """The raw members of sample `number` that are of these kinds: picture, caption and metadata. DataError if the
        shard is gone, BadSample if a member is too large to be read."""
        shard, i = self._place(number)
        places = shard.places(i)
        wanted = {kind: place for kind, place in places.items() if kind in kinds}
        check_sizes({kind: size for kind, (_, size) in wanted.items()})
        fields = read_members(self._read, shard.shard, wanted)
        return Record(shard.key(i), shard.url, _first(places), fields, tuple(places))

    def kinds(self, number: int) -> tuple[str, ...]:
        """The kinds of all members of sample `number`; nothing but the shard's index is read."""
        shard, i = self._place(number)
        return tuple(shard.places(i))

    def span(self, number: int) -> tuple[ShardInfo, int, int]:
        """The shard of sample `number`, and from where to where in it the sample lies, in bytes."""
        shard, i = self._place(number)
        places = shard.places(i)
        return shard.shard, _first(places), max(offset + size for offset, size in places.values())

    @property
    def identity(self) -> str:
        """A hash of the shards with their sizes and stamps: other data has another."""
        digest = sha256()
        for place in self._places:
            shard = self._shards[place].shard
            digest.update(f"{shard.url}\0{shard.size}\0{shard.stamp}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def is_remote(self) -> bool:
        """Whether its shards come over the network."""
        return any(is_remote(shard.url) for shard in self._shards[:1])

    @property
    def is_cached(self) -> bool:
        """Whether it is read through the node's cache."""
        return isinstance(getattr(self._read, "__self__", None), BlockCache)

    def read_through(self, cache: BlockCache, need: int) -> None:
        """Read through the cache if that has room for the `need` bytes that are drawn from at a time."""
        if self._read is read_range:
            self._read = cache.reader([shard.shard for shard in self._shards], need)

    def key(self, number: int) -> str:
        """The key of sample `number`; nothing but the shard's index is read."""
        shard, i = self._place(number)
        return shard.key(i)

    def shard(self, number: int) -> str:
        """The URL of the shard that holds sample `number`; nothing is read."""
        return self._shards[self._places[self._shard_of(number)]].url

    def offset(self, number: int) -> int:
        """Where the data of the sample's first member starts in its shard (of a .tar.gz, in the unpacked tar), in
        bytes."""
        shard, i = self._place(number)
        return _first(shard.places(i))

    def _shard_of(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return bisect_right(self._ends, number)

    def _place(self, number: int) -> tuple[ShardIndex, int]:
        """The shard of a sample, and the sample's number in it."""
        shard = self._shard_of(number)
        i = number - (self._ends[shard - 1] if shard else 0)
        if self._accepted is not None:
            i = int(self._accepted.numbers(self._places[shard])[i])
        return self._shards[self._places[shard]], i


def _first(places: dict[str, tuple[int, int]]) -> int:
    return min(offset for offset, _ in places.values())


def check_sizes(sizes: dict[str, int]) -> None:
    """Raises BadSample for members (bytes by kind) that are too large to be read into memory."""
    for kind, size in sizes.items():
        if size > MOST_BYTES:
            raise BadSample(f"member too large: .{shown(kind, 20)[1:-1]} has {size:,} bytes")


def read_members(read: Reader, shard: ShardInfo, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """The members at `places`, by one read where they lie close together, as those of one sample do."""
    if not places:
        return {}
    start = _first(places)
    end = max(offset + size for offset, size in places.values())
    if end - start > sum(size for _, size in places.values()) + _GAP:
        return {kind: read(shard, offset, offset + size) for kind, (offset, size) in places.items()}
    span = read(shard, start, end)
    return {kind: span[offset - start : offset - start + size] for kind, (offset, size) in places.items()}


def open_source(
    url: str,
    cache: BlockCache | None = None,
    filter: str | None = None,
    bad_shards: Literal["refuse", "skip"] = "refuse",
    workers: int | None = None,
    told: Told = silent,
    captions: bool = True,
) -> Source:
    """Opens `samples://NAME` or a glob/brace URL of tar shards, read through `cache` if they are remote and it has room
    for them.

    `filter` keeps the samples that an expression over their metadata accepts (filter.py). A damaged shard refuses the
    source, or is left out of it (`bad_shards="skip"`) and named in `left_out`: a shard that is only out of reach, or
    missing, always refuses it, for it would come back and change the order. Shards without an index get one, by
    `workers` processes (None: as many as are useful); `told` hears of shards. Raises DataError, also if there is no
    usable sample; `captions=False`: one without a caption is usable too.
    """
    wanted = _read_filter(url, filter)
    pattern = pattern_of(url)
    with undisturbed():
        found = list_shards(pattern)
    read = cache.reader(found) if cache else read_range
    summary = summed_up(pattern, found, read, bad_shards == "skip", workers, told)
    whole = [each for each in summary if not each.fault]
    left_out = [
        LedgerEntry(url, each.shard.url, "", each.offset, f"damaged shard: {each.fault}")
        for each in summary
        if each.fault
    ]
    shards = Handles(
        [each.shard for each in whole], [each.samples for each in whole], lambda shard: index_table(shard, read)
    )
    if not sum(each.usable if captions else each.samples for each in whole):
        raise DataError(_nothing_usable(url, shards, left_out))
    kept = accepted(pattern, wanted, whole, shards, workers, told) if wanted else None
    limit = cache.limit if cache else None
    return Source(url, shards, _unpacking(url, whole, Unpacked(read, limit)), kept, left_out)


def shards_of(url: str) -> list[ShardInfo]:
    """The shards behind `samples://NAME` or a glob/brace URL, sorted. DataError if there is none."""
    return list_shards(pattern_of(url))


def _read_filter(url: str, text: str | None) -> Filter | None:
    try:
        return None if text is None else Filter(text)
    except ValueError as error:
        raise DataError(f"{shown_url(url)}: {error}") from None


def _unpacking(url: str, summary: Sequence[ShardSummary], unpacked: Unpacked) -> Reader:
    """How to read shards that may be .tar.gz. DataError if their copies do not fit in the cache."""
    packed = [each for each in summary if is_packed(each.shard.url)]
    need = sum(each.content for each in packed)
    if not packed:
        return unpacked.inner
    if need > unpacked.limit:
        raise DataError(
            f"{shown_url(url)}: {len(packed)} of its shards are .tar.gz and need {need:,} bytes unpacked, the cache "
            f"may hold {unpacked.limit:,}; unpack the shards with gunzip, or raise data.cache.limit"
        )
    logging.getLogger(__name__).warning(
        "%s: %d of %d shards are .tar.gz, which can only be read from unpacked copies in the cache folder (%s bytes); "
        "write plain .tar shards, pictures do not get smaller by gzip",
        shown_url(url),
        len(packed),
        len(summary),
        f"{need:,}",
    )
    return unpacked.read


def _nothing_usable(url: str, shards: Sequence[ShardIndex], left_out: Sequence[LedgerEntry]) -> str:
    total = sum(len(shard) for shard in shards)
    if left_out and not total:
        return f"{shown_url(url)}: nothing is left of it, all shards with samples are damaged; {left_out[0].reason}"
    if not total:
        return f"{shown_url(url)} is empty: {len(shards)} shards and no sample in them; check how they were written"
    kinds = Counter(kind for shard in shards for sample in shard.samples for kind in sample)
    found = ", ".join("." + shown(kind, 20)[1:-1] for kind, _ in kinds.most_common(6))
    return (
        f"{shown_url(url)}: 0 of {total} samples have a picture and a caption: found {found}; "
        f"a picture is .{', .'.join(IMAGE_KINDS)}, a caption .txt or .json"
    )


def pattern_of(url: str) -> str:
    """The glob/brace URL of a source, which samples:// stands for. DataError for a name that nobody offers."""
    found = sample_set(url)
    if found is None:
        return url
    if not url.endswith(HELD_OUT):
        return found.train()
    if found.held_out is None:
        raise DataError(f"{shown_url(url)}: the set has no samples kept apart for evaluation; give shards of your own")
    return found.held_out()


def attribution(url: str) -> str | None:
    """The credit to show beside pictures of a source, where its licence asks for one."""
    found = _known(url)
    return None if found is None else found.attribution


def held_out(url: str) -> str | None:
    """The URL of the samples kept apart for evaluation, where a source has such a split."""
    found = None if url.endswith(HELD_OUT) else _known(url)
    return url + HELD_OUT if found and found.held_out else None


def _known(url: str) -> SampleSet | None:
    """The set that a URL is of, None where there is none: whoever opens it says why."""
    try:
        return sample_set(url)
    except DataError:
        return None
