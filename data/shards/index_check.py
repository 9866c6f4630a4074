"""Checks an index that lay beside its shard, once, before it is taken: whoever wrote it may have meant another shard,
or harm.

The idea: all rows are checked against the rules of tars and of samples, which reads nothing; the headers of a few
members, and what lies between members, are compared with the shard. An index that passes and is wrong all the same is
found by the first sample whose header says otherwise (content.py).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..storage.files import Reader, ShardInfo
from .content import BLOCK, is_header_of
from .index import IMAGE_KINDS
from .table_file import DamagedTable, Table
from .tar_reader import DamagedShard, tar_members

_NARROW = 8 * BLOCK  # bytes between two members that the headers of one member may take (long names, exact times)
_MOST_WIDE = 16  # wider gaps that are looked into, and the bytes of one; with more the shard is walked
_WIDEST = 1 << 20
SplitName = Callable[[str], tuple[str, str | None]]
"""key and kind of a member's name, kind None if it belongs to no sample"""


class _Rows(NamedTuple):
    """The members of an index in the order of the shard, int64 [members]."""

    sample: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    kind: NDArray[np.int64]


def check_index(table: Table, shard: ShardInfo, read: Reader, split_name: SplitName) -> None:
    """Checks the index of a shard, which is read with `read`. Raises DamagedTable, DataError if reading fails."""
    rows, keys, kinds, content = _rows(table), table.texts("keys"), table.texts("kinds"), table.header["content"]
    _check_places(rows, content)
    _check_names(rows, keys, kinds, split_name)
    if not 0 <= table.header["usable"] <= len(keys):
        raise DamagedTable("its number of usable samples is wrong")
    if content == shard.size and keys:  # else it is packed, and unpacking it would cost what a walk does
        _check_headers(rows, keys, kinds, shard, read)
        _check_gaps(rows, shard, read, split_name)


def _rows(table: Table) -> _Rows:
    ends, members = table.rows("samples"), table.rows("members")
    counts = ends.astype(np.int64)
    counts[1:] -= counts[:-1].copy()
    if (int(ends[-1]) if len(ends) else 0) != len(members) or (len(ends) and int(counts.min()) < 1):
        raise DamagedTable("its members do not fit its samples")
    if any(int(members[name].max(initial=0)) >= 1 << 62 for name in ("offset", "size", "kind")):
        raise DamagedTable("its members lie outside of the shard")
    order = np.argsort(members["offset"], kind="stable")
    sample = np.repeat(np.arange(len(ends)), counts)[order]
    offset, size, kind = (members[name].astype(np.int64)[order] for name in ("offset", "size", "kind"))
    return _Rows(sample, offset, size, kind)


def _check_places(rows: _Rows, content: int) -> None:
    """Each member has a header of its own, and lies inside of the shard and behind the member before it."""
    ends = rows.offset + rows.size
    before = np.concatenate(([0], _padded(ends)))[: len(ends)]
    if int(ends.max(initial=0)) > content or (rows.offset % BLOCK).any() or (rows.offset < before + BLOCK).any():
        raise DamagedTable("its members overlap, or lie outside of the shard")


def _padded(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-ends // BLOCK) * BLOCK


def _check_names(rows: _Rows, keys: list[str], kinds: list[str], split_name: SplitName) -> None:
    """Keys and kinds are those that a walk could have found."""
    if len(set(keys)) != len(keys) or len(set(kinds)) != len(kinds) or int(rows.kind.max(initial=-1)) >= len(kinds):
        raise DamagedTable("it names a sample twice, or kinds that it has not")
    image = np.isin(np.arange(len(kinds)), [kinds.index(kind) for kind in IMAGE_KINDS if kind in kinds])
    once = np.where(image[rows.kind], len(kinds), rows.kind)  # a sample has one picture, and one member of a kind
    if len(np.unique(rows.sample * (len(kinds) + 1) + once)) != len(once):
        raise DamagedTable("it names a member twice")
    first = dict(zip(rows.sample.tolist(), rows.kind.tolist(), strict=True))
    pairs = [(key, kinds[first[number]]) for number, key in enumerate(keys)]
    pairs += [(keys[0], kind) for kind in kinds if keys]
    if any(split_name(f"{key}.{kind}") != (key, kind) for key, kind in pairs):
        raise DamagedTable("it has names that no member can have")


def _check_headers(rows: _Rows, keys: list[str], kinds: list[str], shard: ShardInfo, read: Reader) -> None:
    """The members of the first, the middle and the last sample have the headers that they should have."""
    for number in {0, len(keys) // 2, len(keys) - 1}:
        for i in np.flatnonzero(rows.sample == number).tolist():
            offset, size, kind = int(rows.offset[i]), int(rows.size[i]), kinds[int(rows.kind[i])]
            if not is_header_of(read(shard, offset - BLOCK, offset), keys[number], kind, size):
                raise DamagedTable("its members are not those of the shard")


def _check_gaps(rows: _Rows, shard: ShardInfo, read: Reader, split_name: SplitName) -> None:
    """No member of a sample lies between the members of the index, or behind them."""
    starts = np.concatenate(([0], _padded(rows.offset + rows.size)))
    stops = np.concatenate((rows.offset - BLOCK, [shard.size]))
    wide = np.flatnonzero(stops - starts > _NARROW)
    if len(wide) > _MOST_WIDE or (stops - starts).max() > _WIDEST:
        raise DamagedTable("it leaves out parts of the shard")
    for start, stop in zip(starts[wide].tolist(), stops[wide].tolist(), strict=True):
        gap = read(shard, start, stop) + bytes(2 * BLOCK)  # an end, for the reader
        try:
            left_out = [name for name, *_ in tar_members(io.BytesIO(gap), replace(shard, size=len(gap)))]
        except DamagedShard:
            raise DamagedTable("it leaves out parts of the shard") from None
        if any(split_name(name)[1] is not None for name in left_out):
            raise DamagedTable("it leaves out samples of the shard")
