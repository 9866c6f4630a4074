"""Tar shards: from a URL to the list of shards, and from a shard to its index.

The index of a shard (index.py) is made by one walk over the tar's headers, which also reads the metadata of each
sample. Members are grouped by WebDataset's rule: the key is the path up to the first dot of its last part, the kind is
the rest in lower case.

Names in a tar are hostile until shown otherwise: they are only ever dictionary keys.
"""

from __future__ import annotations

import os
import re
from itertools import product

from ..errors import DataError, shown
from ..storage.files import Reader, ShardInfo, changed, find_all, read_range, shown_url
from ..storage.gzip_cache import open_content
from .columns import LONGEST_JSON, Collector
from .index import IMAGE_KINDS as IMAGE_KINDS
from .index import Samples, cached_at, fits, index_bytes
from .index import ShardIndex as ShardIndex
from .index import is_usable as is_usable
from .sidecar import fetch_index
from .table_file import DamagedTable, Table, write_whole
from .tar_reader import DamagedShard, tar_members

_MOST_SHARDS = 10_000_000


def expand(url: str) -> list[ShardInfo]:
    """The shards a URL stands for, sorted. Braces are ranges {000..012} or lists {a,b}; *, ? and [] are globs.

    Raises DataError where nothing matches, or a shard named without a glob is missing.
    """
    found = {shard.url: shard for shard in find_all(expand_braces(url))}
    return [found[name] for name in sorted(found)]


def expand_braces(url: str) -> list[str]:
    """`a{08..10}b{x,y}` -> a08bx, a08by, a09bx, ...; a range keeps the width of its first number."""
    parts = re.split(r"\{([^{}]*)\}", url)
    choices: list[list[str] | range] = []
    widths = []
    for i, part in enumerate(parts):
        numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", part) if i % 2 else None
        widths.append(len(numbers[1]) if numbers else 0)
        if numbers:
            first, last = numbers.groups()
            if int(first) > int(last):
                raise DataError(f"{shown_url(url)}: the range {{{part}}} runs backwards; write {{{last}..{first}}}")
            choices.append(range(int(first), int(last) + 1))
        else:
            choices.append(part.split(",") if i % 2 else [part])
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST_SHARDS:
        raise DataError(f"{shown_url(url)} names {count:,} shards; {_MOST_SHARDS:,} are the most, check the ranges")
    return [
        "".join(f"{each:0{width}}" if width else str(each) for each, width in zip(combination, widths, strict=True))
        for combination in product(*choices)
    ]


def index_shard(shard: ShardInfo, read: Reader = read_range) -> ShardIndex:
    """The index of a shard: from the cache folder, from beside the shard, or made from the shard through `read` and
    kept in the cache folder. Raises DamagedShard if the shard is damaged, DataError if it cannot be read."""
    return ShardIndex.of(shard, index_table(shard, read))


def index_table(shard: ShardInfo, read: Reader = read_range) -> Table:
    """What `index_shard` gives, as the table that the index is."""
    cached = cached_at(shard)
    try:
        table = Table.open(cached)
        if fits(table, shard):
            return table
    except (OSError, DamagedTable):  # none yet, or damaged: made anew
        pass
    data = fetch_index(shard)
    if data is None:
        data, faults = _walked(shard, read)
        if faults:
            raise faults[0]
    write_whole(cached, data)
    return Table.open(cached)


def walk(shard: ShardInfo, read: Reader = read_range) -> tuple[ShardIndex, list[str]]:
    """What a walk over the shard's headers finds, as far as it gets, and everything that is wrong with the shard."""
    data, faults = _walked(shard, read)
    return ShardIndex.of(shard, Table.parse(data)), [str(fault) for fault in faults]


def _walked(shard: ShardInfo, read: Reader) -> tuple[bytes, list[DataError]]:
    """The index of a shard as far as a walk gets, and everything that is wrong with the shard."""
    samples: Samples = {}
    rows: dict[str, int] = {}
    columns = Collector()
    faults: list[DataError] = []
    content = shard.size
    try:
        with open_content(shard, read) as (file, tar):
            content = tar.size
            for name, offset, size in tar_members(file, tar):
                key, kind = split_name(name)
                if kind is None:
                    continue
                members = samples.setdefault(key, {})
                rows.setdefault(key, len(rows))
                clash = next((k for k in members if k == kind or {k, kind} <= set(IMAGE_KINDS)), None)
                if clash is not None:
                    faults.append(_two_members(shard, key, clash, kind, offset))
                    continue
                members[kind] = (offset, size)
                if kind == "json" and size <= LONGEST_JSON:
                    file.seek(offset)
                    columns.add(rows[key], file.read(size))
    except DataError as error:
        faults.append(_changed_meanwhile(shard) or error)
        if samples and not is_usable(samples[last := next(reversed(samples))]):
            del samples[last]  # the rest of it lies beyond the damage
    return index_bytes(shard, content, samples, columns), faults


def _two_members(shard: ShardInfo, key: str, one: str, other: str, offset: int) -> DamagedShard:
    return DamagedShard(
        f"{shown_url(shard.url)} holds two members for key {shown(key)}: {shown(one)} and {shown(other)}, "
        f"at byte {offset}; rename one of them and pack the shard again",
        offset,
    )


def _changed_meanwhile(shard: ShardInfo) -> DataError | None:
    """What looks like damage because the file is no longer the one that was listed."""
    try:
        same = "://" in shard.url or os.stat(shard.url).st_size == shard.size
    except OSError:
        return None
    return None if same else changed(shard, 0, shard.size)


def split_name(name: str) -> tuple[str, str | None]:
    """WebDataset's rule: `a/b.c.TXT` -> key `a/b`, kind `c.txt`. Kind None: the member belongs to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    if not stem or not dot or (not slash and name.startswith("__")):
        return name, None
    return folder + slash + stem, kind.lower()
