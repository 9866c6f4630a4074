"""Lists the members of a tar from its headers: name, offset and size of every member, and what the member is.

The members tile the file: each begins where the one before it ends, and the last one ends with the file. So nothing in
it can be skipped unseen: not a link, not a sparse file, not a second archive behind the first.

Why not `tarfile` alone (it parses the headers here): it accepts a truncated shard as a smaller one, and reads a header
of any size that a hostile file declares.

Stricter than `tarfile`: data past the end of the file, a missing end-of-archive block and an invalid header are errors,
because a truncated shard must not pass as a smaller one. What lies behind the end of the archive is listed, never read
as samples, as `tarfile` and WebDataset do not see it either. Each error names the shard, the byte and the remedy.
"""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from typing import BinaryIO, NamedTuple

from ..errors import DataError
from ..storage.files import ShardInfo, shown_url
from .account import BEHIND, DIRECTORIES, END, LINKS, SPARSE, SPECIAL, TRAILING

_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # bytes of an extended header (a long name); a larger one is damage or an attack
_LONGEST_NUMBER = 20  # digits of a size
_CHUNK = 1 << 20  # bytes read at a time, a multiple of a block
_OTHER = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), ""),
    **dict.fromkeys((tarfile.LNKTYPE, tarfile.SYMTYPE), LINKS),
    tarfile.DIRTYPE: DIRECTORIES,
    tarfile.GNUTYPE_SPARSE: SPARSE,
}  # the heading of each type; of others: SPECIAL
_NEVER_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class DamagedShard(DataError):
    """A shard with damaged content, which reading again cannot fix; `offset` is the byte where it was found."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


class TarMember(NamedTuple):
    """One member of a tar, with `size` bytes of data from `offset` on; with headers and padding it reaches from the end
    of the member before it to `end`."""

    name: str
    offset: int
    size: int
    end: int
    other: str = ""  # empty for a plain file, else the heading of the account that it belongs to (account.py)


def tar_members(file: BinaryIO, shard: ShardInfo) -> Iterator[TarMember]:
    """The members of the shard opened as `file`, from byte 0 to its end. Raises DamagedShard."""
    position = yield from _archive(file, 0, shard)
    while position < shard.size:
        start = _after_zeros(file, position, shard)
        yield TarMember("", position, 0, start, END)
        position = start
        try:
            behind = _archive(file, start, shard)
            while position < shard.size:
                member = next(behind)
                position = member.end
                yield member._replace(other=BEHIND)
        except StopIteration as end:
            position = end.value
        except DamagedShard:  # no archive, or one that is cut short
            yield TarMember("", position, 0, shard.size, TRAILING)
            return


def _archive(file: BinaryIO, position: int, shard: ShardInfo) -> Generator[TarMember, None, int]:
    """The members of the archive that begins at `position`; returns the byte behind the first block of its end mark."""
    name, size_override, sparse = None, None, False
    while True:
        header = _header(file, position, shard)
        if header is None:
            return position
        data = position + _BLOCK
        size = header.size if size_override is None else size_override
        if header.type in _NEVER_DATA:
            size = 0
        if header.type == tarfile.GNUTYPE_SPARSE:
            data = _after_sparse_map(file, position, shard)
        if not 0 <= size <= shard.size - data:  # a negative size would loop forever
            raise _cut_short(shard) if size > 0 else _damaged(shard, position, "negative size")
        position = min(data + -(-size // _BLOCK) * _BLOCK, shard.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(_extended(file, size, data, shard).split(b"\0")[0])
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            fields = _pax_fields(_extended(file, size, data, shard), data, shard)
            sparse = any(field.startswith("GNU.sparse.") for field in fields)
            path = fields.get("GNU.sparse.name", fields.get("path"))
            name = name if path is None else _text(path)
            digits = fields.get("size", b"")
            size_override = int(digits) if digits.isdigit() and len(digits) <= _LONGEST_NUMBER else None
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            other = SPARSE if sparse else _OTHER.get(header.type, SPECIAL)
            yield TarMember(header.name if name is None else name, data, size, position, other)
            name, size_override, sparse = None, None, False


def _after_zeros(file: BinaryIO, position: int, shard: ShardInfo) -> int:
    """The start of the first block from `position` on that holds a byte other than zero; the shard's size if none
    does."""
    file.seek(position)
    while position < shard.size:
        chunk = file.read(min(_CHUNK, shard.size - position))
        if not chunk:
            raise _cut_short(shard)
        rest = len(chunk.lstrip(b"\0"))
        if rest:
            return position + (len(chunk) - rest) // _BLOCK * _BLOCK
        position += len(chunk)
    return shard.size


def _after_sparse_map(file: BinaryIO, position: int, shard: ShardInfo) -> int:
    """The byte behind the header at `position` of a GNU sparse file, and behind the further blocks of its map."""
    file.seek(position)
    more = file.read(_BLOCK)[482:483]
    position += _BLOCK
    while more not in (b"", b"\0"):
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise _cut_short(shard)
        more, position = block[504:505], position + _BLOCK
    return position


def _header(file: BinaryIO, position: int, shard: ShardInfo) -> tarfile.TarInfo | None:
    file.seek(position)
    block = file.read(_BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if len(block) < _BLOCK and (position or len(block) == 0):
            raise _cut_short(shard) from None
        if block.count(0) == _BLOCK:  # the end-of-archive mark
            return None
        if position == 0:
            zipped = block.startswith(b"\x1f\x8b")
            remedy = (
                "it is gzip data: unpack it with gunzip, or rename it to .tar.gz"
                if zipped
                else "name tar files, or remove it from the source"
            )
            raise DamagedShard(f"{shown_url(shard.url)} is not a tar file at byte 0; {remedy}") from None
        raise _damaged(shard, position, str(error)) from None


def _damaged(shard: ShardInfo, position: int, what: str) -> DamagedShard:
    return DamagedShard(
        f"{shown_url(shard.url)} is damaged at byte {position} ({what}); copy it again or remove it from the source",
        position,
    )


def _cut_short(shard: ShardInfo) -> DamagedShard:
    return DamagedShard(
        f"{shown_url(shard.url)} is cut short: it ends at byte {shard.size} before the end of the archive; "
        f"copy it again or remove it from the source",
        shard.size,
    )


def _extended(file: BinaryIO, size: int, position: int, shard: ShardInfo) -> bytes:
    if size > _LONGEST_HEADER:
        raise DamagedShard(
            f"{shown_url(shard.url)} holds a header of {size:,} bytes at byte {position}; "
            f"it is damaged or hostile, remove it from the source",
            position,
        )
    return file.read(size)


def _pax_fields(block: bytes, position: int, shard: ShardInfo) -> dict[str, bytes]:
    """Records `LENGTH key=value\\n` of a pax extended header (POSIX.1-2001)."""
    fields = {}
    while block:
        digits, _, _ = block.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = block[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) + 1 < length <= len(block) or not equals:
            raise _damaged(shard, position, "bad extended header")
        fields[_text(key)] = value
        block = block[length:]
        if not block.strip(b"\0"):
            break
    return fields


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
