"""Opening a source: a summary of each of its shards, and the samples that its filter accepts.

The idea: every result that needs a walk over the shards is cached (a shard's index, the summary of a source, the result
of a filter), so that opening a source again only lists its shards and reads one file, or two with a filter. Cached
results of a shard whose size or stamp has changed are not used, nor those of a shard whose stamp cannot tell.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, shown
from ..storage.files import Reader, ShardInfo, cache_folder, listed_again, read_range, shown_url
from .account import Account
from .filter import Filter, Known
from .index import ShardIndex
from .listing import index_shard
from .parallel import Progress, enough_workers, silent, sweep
from .summary import ShardSummary, fingerprint, read_summary, write_summary
from .table_file import DamagedTable, Table, smallest, table_bytes, write_cache_file
from .tar_reader import DamagedShard

_SHARDS_PER_WORKER = 8  # minimum shards per process, else starting it is not worth it
_MAX_COMPARED_KEYS = 1 << 20  # up to this many samples keys are compared across shards
_CACHED_SHARDS = 256  # shards whose accepted sample numbers are kept in memory


def summarize_shards(
    url: str,
    shards: Sequence[ShardInfo],
    read: Reader = read_range,
    skip_damaged: bool = False,
    workers: int | None = None,
    progress: Progress = silent,
) -> list[ShardSummary]:
    """The summary of each shard; new or changed shards are indexed now (in parallel if there are many).

    Raises DataError if a shard cannot be read, DamagedShard for the first damaged one unless `skip_damaged`, and
    DataError if two shards hold the same key. Keys are compared when the shards change, in sources of up to a million
    samples; `lint` compares all.
    """
    with gc_paused():
        before = read_summary(url, shards)
    wanted = [s for s, row in zip(shards, before, strict=True) if row is None or (row.fault and not skip_damaged)]
    if not wanted:
        return [row for row in before if row is not None]
    new: dict[ShardInfo, ShardSummary] = {}
    for row in sweep(lambda shard: _summarize(shard, read), wanted, workers or _worker_count(url, wanted), progress):
        if row.fault and not skip_damaged:
            raise DamagedShard(row.fault, row.offset)
        new[row.shard] = row
    rows = [new.get(shard, row) for shard, row in zip(shards, before, strict=True)]
    summary = [row for row in rows if row is not None]
    assert len(summary) == len(shards)
    if sum(each.samples for each in summary) <= _MAX_COMPARED_KEYS:
        _check_keys(summary, read)
    write_summary(url, summary)
    return summary


def _summarize(shard: ShardInfo, read: Reader) -> ShardSummary:
    try:
        found = index_shard(shard, read)
    except DamagedShard as error:
        return ShardSummary(shard, fault=str(error), offset=error.offset)
    return _summary_of(found)


def _summary_of(index: ShardIndex) -> ShardSummary:
    skipped = index.account.skipped_members
    return ShardSummary(
        index.shard,
        len(index),
        index.usable,
        index.content_size,
        index.digest,
        skipped_members=Account(skipped) if skipped else None,
    )


def summarize_anew(url: str, summary: Sequence[ShardSummary], place: int, read: Reader) -> ShardSummary:
    """The present entry of shard `place` of a summary, whose index and entry in the cache folder are made anew.

    Raises DataError if the shard cannot be read."""
    row = _summary_of(index_shard(listed_again(summary[place].shard), read, anew=True))
    others = (*summary[:place], *summary[place + 1 :])
    write_summary(url, [row, *others] if row.shard != summary[place].shard else [row])  # else the summary was wrong
    return row


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses garbage collection while tens of thousands of long-lived objects are created: traversing them repeatedly
    would take a third of the time of opening a source."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _worker_count(url: str, work: Sequence[object]) -> int:
    """The number of worker processes that pays for this many shards."""
    return max(1, min(enough_workers(url), len(work) // _SHARDS_PER_WORKER))


def _check_keys(summary: Sequence[ShardSummary], read: Reader) -> None:
    first: dict[str, str] = {}
    for each in summary:
        for key in index_shard(each.shard, read).keys if each.samples else ():
            other = first.setdefault(key, each.shard.url)
            if other != each.shard.url:
                raise DataError(
                    f"{shown_url(other)} and {shown_url(each.shard.url)} both hold a sample with key {shown(key)}; "
                    f"keys must be unique within a source, so repack one of them"
                )


class Accepted:
    """The samples that a filter accepts: `counts` per shard, and `numbers(shard)`, their numbers within a shard."""

    def __init__(self, table: Table, samples: Sequence[int]) -> None:
        self.counts: NDArray[np.int64] = table.rows("counts").astype(np.int64)
        self._table, self._samples = table, samples
        self._ends = np.cumsum([-(-count // 8) for count in samples], dtype=np.int64).tolist()
        if len(self.counts) != len(samples) or table.count("bits") != (self._ends[-1] if self._ends else 0):
            raise DamagedTable("it belongs to other shards")
        self._numbers: OrderedDict[int, NDArray[np.int32]] = OrderedDict()

    def bits(self, shard: int) -> bytes:
        """A bit per sample of shard `shard`, 1 if it is accepted, as np.packbits packs them."""
        return self._table.rows("bits", self._ends[shard - 1] if shard else 0, self._ends[shard]).tobytes()

    def numbers(self, shard: int) -> NDArray[np.int32]:
        """The numbers of the accepted samples within shard `shard`, int32."""
        found = self._numbers.get(shard)
        if found is None:
            bits = np.unpackbits(np.frombuffer(self.bits(shard), np.uint8), count=self._samples[shard])
            found = np.flatnonzero(bits).astype(np.int32)
            self._numbers[shard] = found
            if len(self._numbers) > _CACHED_SHARDS:
                self._numbers.popitem(last=False)
        else:
            self._numbers.move_to_end(shard)
        return found


def apply_filter(
    url: str,
    wanted: Filter,
    summary: Sequence[ShardSummary],
    indexes: Sequence[ShardIndex],
    workers: int | None = None,
    progress: Progress = silent,
) -> Accepted:
    """The samples of the shards in `summary` that a filter accepts, from the cache folder or evaluated and cached now.

    Raises DataError if no shard has a column that the filter names, or if it accepts no sample.
    """
    samples = [each.samples for each in summary]
    name = sha256(f"{fingerprint(summary)}\0{wanted.text}".encode("utf-8", "surrogatepass")).hexdigest()
    path = cache_folder("filters") / name
    try:
        return Accepted(Table.open(path), samples)
    except (OSError, DamagedTable, KeyError):
        pass
    counts, bits, known = [], [], Known()

    def evaluate(shard: ShardIndex) -> tuple[int, bytes, Known]:
        columns = shard.columns
        mask = wanted.accepted(columns)
        return int(mask.sum()), np.packbits(mask).tobytes(), Known().add(columns)

    workers = workers or _worker_count(url, indexes)
    for count, packed, seen in sweep(evaluate, indexes, workers, progress):
        counts.append(count)
        bits.append(packed)
        known.merge(seen)
    known.check(wanted, shown_url(url))
    if not any(counts):
        known = Known()
        for seen in sweep(lambda shard: Known().add(shard.columns, ranges=True), indexes, workers):
            known.merge(seen)
        raise DataError(
            f"{shown_url(url)}: the filter {shown(wanted.text)} accepts 0 of {sum(samples):,} samples; the values "
            f"of its columns are\n{known.ranges(wanted)}\nchange the filter or remove it"
        )
    arrays = {"counts": smallest(np.array(counts, np.int64)), "bits": np.frombuffer(b"".join(bits), np.uint8)}
    write_cache_file(path, table_bytes({"filter": ascii(wanted.text), "samples": sum(samples)}, arrays))
    return Accepted(Table.open(path), samples)
