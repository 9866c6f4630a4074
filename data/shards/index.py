"""The index of a shard: the location of each sample's members, the samples' keys, and the scalars of their metadata.

It is a table (table_file.py) of about 50 bytes per sample, stored in one of two places: in the cache folder, under a
hash of the shard's URL, size and stamp; or, if `treering data index --beside` wrote it, as a sidecar in the folder
`.treering` next to the shard, possibly in a bucket, so that other nodes need no walk over the shards.

Validity. The table's checksum detects a torn or corrupted index. The shard's size and stamp (etag in a store, times
of modification and change on a disk) are part of the index and must equal those of the listing: an index of another
version of the shard is ignored and rebuilt. Copied shards have new stamps, so they must be indexed again at their new
place. Every read then requests that version (read_range) and compares the headers before the bytes (content.py), which
show an index that is not that of its shard whatever its stamp says. An index also has the digest of the samples.

Reading a sample never loads a whole index: a `ShardIndex` is a handle that opens its table on first use, keeps only the
table's header (at most `MOST_OPEN` per process) and reads the rows of one sample.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import numpy as np

from ..errors import DataError
from ..storage.files import ShardInfo, cache_folder, changed, shown_url
from .account import Account, parsed
from .columns import Collector, Columns
from .content import BLOCK
from .table_file import DamagedTable, Table, packed_texts, smallest, table_bytes

T = TypeVar("T")
FORMAT = 3  # raise it when what is in an index changes
MOST_OPEN = 2048
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
READ_KINDS = frozenset((*IMAGE_KINDS, "txt", "json"))
Samples = dict[str, dict[str, tuple[int, int]]]
"""{key: {kind: (offset, size)}}"""


Make = Callable[[ShardInfo, bool], Table]
"""the index of a shard; True: built from the shard, whatever index there is"""


class _Open(NamedTuple):
    table: Table
    kinds: list[str]


class Indexes:
    """Opens the indexes of shards on demand with `make`, and keeps the last MOST_OPEN of them open."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._open: OrderedDict[ShardInfo, _Open] = OrderedDict()

    def get(self, shard: ShardInfo, anew: bool = False) -> _Open:
        """The open index of a shard; with `anew` built from the shard. Raises as `make` does."""
        found = None if anew else self._open.get(shard)
        if found is None:
            table = self._make(shard, anew)
            found = self._open[shard] = _Open(table, table.texts("kinds"))
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(shard)
        return found


class ShardIndex:
    """The samples of one shard. Sample i has the key `key(i)` and the members `places(i)`."""

    __slots__ = ("_count", "_indexes", "shard")

    def __init__(self, shard: ShardInfo, count: int, indexes: Indexes) -> None:
        self.shard, self._count, self._indexes = shard, count, indexes

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"ShardIndex({shown_url(self.url)}, {self._count} samples)"

    @property
    def url(self) -> str:
        """The shard's URL."""
        return self.shard.url

    @property
    def size(self) -> int:
        """The shard's size in bytes."""
        return self.shard.size

    @property
    def keys(self) -> list[str]:
        """The keys of all samples."""
        return self._read(lambda found: found.table.texts("keys"))

    @property
    def samples(self) -> list[dict[str, tuple[int, int]]]:
        """The members of all samples: [{kind: (offset, size)}], in bytes."""
        return self._read(lambda found: _places(found, 0, self._count))

    @property
    def columns(self) -> Columns:
        """The scalars of the samples' metadata."""
        return self._read(lambda found: Columns(found.table.rows("columns").tobytes()))

    @property
    def content_size(self) -> int:
        """The size of the tar in bytes; for a .tar.gz, unpacked."""
        return self._read(lambda found: int(found.table.header["content"]))

    @property
    def digest(self) -> str:
        """The digest of the samples (content.py)."""
        return self._read(lambda found: str(found.table.header["digest"]))

    @property
    def account(self) -> Account:
        """What all members and bytes of the shard are."""
        return self._read(lambda found: parsed(found.table.header["account"]) or Account())

    @property
    def usable(self) -> int:
        """The number of samples with a picture and a member that may hold a caption."""
        return self._read(lambda found: int(found.table.header["usable"]))

    def key(self, number: int) -> str:
        """The key of one sample."""
        return self._read(lambda found: found.table.texts("keys", number, number + 1)[0])

    def places(self, number: int) -> dict[str, tuple[int, int]]:
        """The members of one sample: {kind: (offset, size)}, in bytes."""
        return self._read(lambda found: _places(found, number, number + 1)[0])

    @classmethod
    def of(cls, shard: ShardInfo, table: Table) -> ShardIndex:
        """The index stored in `table`."""
        return cls(shard, table.count("samples"), Indexes(lambda *_: table))

    def __reduce__(self) -> tuple[Callable[..., ShardIndex], tuple[ShardInfo, Table]]:
        return ShardIndex.of, (self.shard, self._indexes.get(self.shard).table)

    def _read(self, read: Callable[[_Open], T]) -> T:
        """The result of `read` on the open index. An index damaged or removed since it was opened is rebuilt once."""
        for attempt in range(2):
            try:
                found = self._indexes.get(self.shard, anew=attempt > 0)
                if found.table.count("samples") != self._count:
                    if attempt:
                        raise changed(self.shard, 0, self.size)
                    raise DamagedTable("it has another number of samples")
                return read(found)
            except (DamagedTable, OSError) as error:
                if attempt:
                    reason = error.strerror if isinstance(error, OSError) else error
                    raise DataError(
                        f"the index of {shown_url(self.url)} cannot be read ({reason}); start again"
                    ) from None
        raise AssertionError("the second attempt returns or raises")


class Handles(Sequence[ShardIndex]):
    """The indexes of many shards; handles are created on access."""

    def __init__(self, shards: Sequence[ShardInfo], counts: Sequence[int], make: Make) -> None:
        """`counts`: the number of samples of each shard."""
        self._shards, self._counts, self._indexes = list(shards), counts, Indexes(make)

    def replace(self, place: int, shard: ShardInfo) -> None:
        """Read another version of a shard, with the same samples, from now on."""
        self._shards[place] = shard

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, place: int) -> ShardIndex: ...
    @overload
    def __getitem__(self, place: slice) -> list[ShardIndex]: ...
    def __getitem__(self, place: int | slice) -> ShardIndex | list[ShardIndex]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return ShardIndex(self._shards[place], self._counts[place], self._indexes)


def index_bytes(
    shard: ShardInfo, content: int, samples: Samples, columns: Collector, account: Account, digest: str
) -> bytes:
    """The bytes of the index of a shard whose (unpacked) tar has `content` bytes, all of them in `account`."""
    assert account.bytes == content
    kinds: dict[str, int] = {}
    members = [place for own in samples.values() for place in own.items()]
    codes = np.array([kinds.setdefault(kind, len(kinds)) for kind, _ in members], np.int64)
    places = np.array([place for _, place in members], np.int64).reshape(-1, 2)
    parts = {"offset": smallest(places[:, 0]), "size": smallest(places[:, 1]), "kind": smallest(codes)}
    table = np.empty(len(members), [(name, part.dtype) for name, part in parts.items()])
    for name, part in parts.items():
        table[name] = part
    ends = np.cumsum([len(own) for own in samples.values()], dtype=np.int64)
    arrays = {
        "samples": smallest(ends),  # where the members of each sample end
        "members": table,
        **packed_texts("keys", list(samples)),
        **packed_texts("kinds", list(kinds)),
        "columns": np.frombuffer(columns.table(len(samples)), np.uint8),
    }
    usable = sum(is_usable(own) for own in samples.values())
    header = {"format": FORMAT, "size": shard.size, "stamp": shard.stamp, "content": content, "usable": usable}
    return table_bytes({**header, "account": account.json(), "digest": digest}, arrays)


def cached_at(shard: ShardInfo) -> Path:
    """The path of a shard's index in the cache folder."""
    name = sha256(json.dumps([FORMAT, *asdict(shard).values()]).encode()).hexdigest()
    return cache_folder("index") / name


def fits(table: Table, shard: ShardInfo) -> bool:
    """Whether a table is an index of this version of the shard."""
    header = table.header
    same = (header.get("format"), header.get("size"), header.get("stamp")) == (FORMAT, shard.size, shard.stamp)
    numbers = all(type(header.get(name)) is int for name in ("content", "usable"))
    numbers = numbers and (header["content"] == shard.size or shard.url.endswith("gz"))
    numbers = numbers and re.fullmatch(r"[0-9a-f]{32}", str(header.get("digest"))) is not None
    account = parsed(header.get("account"))
    numbers = numbers and account is not None and account.bytes == header["content"]
    arrays = all(name in table for name in ("keys.ends", "keys.bytes", "kinds.ends", "kinds.bytes", "columns"))
    whole = table.fields("samples") == ("",) and table.fields("members") == ("offset", "size", "kind")
    return same and numbers and arrays and whole and table.count("samples") == table.count("keys.ends")


def is_usable(sample: dict[str, tuple[int, int]]) -> bool:
    """Whether a sample has a picture and a member that may hold a caption."""
    return any(kind in sample for kind in IMAGE_KINDS) and ("txt" in sample or "json" in sample)


def _places(found: _Open, start: int, stop: int) -> list[dict[str, tuple[int, int]]]:
    ends = found.table.rows("samples", max(start - 1, 0), stop).tolist()
    base = ends.pop(0) if start else 0
    members = found.table.rows("members", base, ends[-1] if ends else base).tolist()
    content = found.table.header["content"]
    if sorted(ends) != ends or any(k >= len(found.kinds) or o < BLOCK or o + size > content for o, size, k in members):
        raise DamagedTable("its members do not fit its samples")
    return [
        {found.kinds[kind]: (offset, size) for offset, size, kind in members[a - base : b - base]}
        for a, b in zip([base, *ends], ends, strict=False)
    ]
