"""From a URL to what is known of its shards, and to what its filter accepts: all that must be worked out, once, before
a source can be read.

The idea: whatever costs a walk over the shards is written down (a shard's index, the summary of a source, the outcome
of a filter), so that opening a source again is to list its shards, read one file, and a second one where there is a
filter. Nothing that is written down is believed of a shard whose size or stamp has changed.
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
from ..storage.files import Reader, ShardInfo, cache_folder, read_range, shown_url
from .filter import Filter, Known
from .index import ShardIndex
from .listing import index_shard
from .parallel import Told, enough_workers, silent, sweep
from .summary import ShardSummary, fingerprint, read_summary, write_summary
from .table_file import DamagedTable, Table, smallest, table_bytes, write_whole
from .tar_reader import DamagedShard

_FEW = 8  # shards, for each process that is worth starting
_MOST_COMPARED = 1 << 20  # samples up to which keys are compared over all shards
_KEPT = 256  # shards whose accepted samples are kept in memory


def summed_up(
    url: str,
    shards: Sequence[ShardInfo],
    read: Reader = read_range,
    skip_damaged: bool = False,
    workers: int | None = None,
    told: Told = silent,
) -> list[ShardSummary]:
    """What is known of each shard, those that are new or changed indexed now (in parallel where they are many).

    Raises DataError if a shard cannot be read, DamagedShard for the first that is damaged unless `skip_damaged`, and
    DataError if two shards hold one key. The last is looked for when the shards change, among as many samples as a
    process can compare (a million); `lint` looks at all.
    """
    with undisturbed():
        before = read_summary(url, shards)
    wanted = [s for s, row in zip(shards, before, strict=True) if row is None or (row.fault and not skip_damaged)]
    if not wanted:
        return [row for row in before if row is not None]
    made: dict[ShardInfo, ShardSummary] = {}
    for row in sweep(lambda shard: _looked_at(shard, read), wanted, workers or _useful(url, wanted), told):
        if row.fault and not skip_damaged:
            raise DamagedShard(row.fault, row.offset)
        made[row.shard] = row
    rows = [made.get(shard, row) for shard, row in zip(shards, before, strict=True)]
    summary = [row for row in rows if row is not None]
    assert len(summary) == len(shards)
    if sum(each.samples for each in summary) <= _MOST_COMPARED:
        _check_keys(summary, read)
    write_summary(url, summary)
    return summary


def _looked_at(shard: ShardInfo, read: Reader) -> ShardSummary:
    try:
        found = index_shard(shard, read)
    except DamagedShard as error:
        return ShardSummary(shard, fault=str(error), offset=error.offset)
    return ShardSummary(shard, len(found), found.usable, found.content_size)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While tens of thousands of objects are made that all stay, collecting garbage only looks at them again and
    again: a third of the time that opening takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _useful(url: str, work: Sequence[object]) -> int:
    """Processes that are worth starting for so many shards."""
    return max(1, min(enough_workers(url), len(work) // _FEW))


def _check_keys(summary: Sequence[ShardSummary], read: Reader) -> None:
    first: dict[str, str] = {}
    for each in summary:
        for key in index_shard(each.shard, read).keys if each.samples else ():
            other = first.setdefault(key, each.shard.url)
            if other != each.shard.url:
                raise DataError(
                    f"{shown_url(other)} and {shown_url(each.shard.url)} both hold a sample with key {shown(key)}; "
                    f"keys must differ within a source, so pack one of them again"
                )


class Accepted:
    """Which samples of each shard a filter accepts: `counts` of them a shard, `numbers(shard)` for which."""

    def __init__(self, table: Table, samples: Sequence[int]) -> None:
        self.counts: NDArray[np.int64] = table.rows("counts").astype(np.int64)
        self._table, self._samples = table, samples
        self._ends = np.cumsum([-(-count // 8) for count in samples], dtype=np.int64).tolist()
        if len(self.counts) != len(samples) or table.count("bits") != (self._ends[-1] if self._ends else 0):
            raise DamagedTable("it is of other shards")
        self._kept: OrderedDict[int, NDArray[np.int32]] = OrderedDict()

    def numbers(self, shard: int) -> NDArray[np.int32]:
        """The numbers, within the shard at this place of the list, of its accepted samples."""
        found = self._kept.get(shard)
        if found is None:
            bits = self._table.rows("bits", self._ends[shard - 1] if shard else 0, self._ends[shard])
            found = np.flatnonzero(np.unpackbits(bits, count=self._samples[shard])).astype(np.int32)
            self._kept[shard] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(shard)
        return found


def accepted(
    url: str,
    wanted: Filter,
    summary: Sequence[ShardSummary],
    indexes: Sequence[ShardIndex],
    workers: int | None = None,
    told: Told = silent,
) -> Accepted:
    """What a filter accepts of the shards of `summary`, from the cache folder or worked out now and kept there.

    Raises DataError if no shard has a column it names, or if it accepts nothing.
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

    workers = workers or _useful(url, indexes)
    for count, packed, seen in sweep(evaluate, indexes, workers, told):
        counts.append(count)
        bits.append(packed)
        known.merge(seen)
    known.check(wanted, shown_url(url))
    if not any(counts):
        known = Known()
        for seen in sweep(lambda shard: Known().add(shard.columns, ranges=True), indexes, workers):
            known.merge(seen)
        raise DataError(
            f"{shown_url(url)}: the filter {shown(wanted.text)} accepts 0 of {sum(samples):,} samples; its columns "
            f"hold\n{known.ranges(wanted)}\nchange the filter, or leave it out"
        )
    arrays = {"counts": smallest(np.array(counts, np.int64)), "bits": np.frombuffer(b"".join(bits), np.uint8)}
    write_whole(path, table_bytes({"filter": ascii(wanted.text), "samples": sum(samples)}, arrays))
    return Accepted(Table.open(path), samples)
