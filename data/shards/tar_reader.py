"""Lists the members of a tar from its headers: name, offset and size of every regular file.

Why not `tarfile` alone (it parses the headers here): it accepts a truncated shard as a smaller one, and reads a header
of any size that a hostile file declares.

Stricter than `tarfile`: data past the end of the file, a missing end-of-archive block and an invalid header are errors,
because a truncated shard must not pass as a smaller one. Each error names the shard, the byte and the remedy.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import DataError
from ..storage.files import ShardInfo, shown_url

_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # bytes of an extended header (a long name); a larger one is damage or an attack
_LONGEST_NUMBER = 20  # digits of a size
_PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NEVER_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class DamagedShard(DataError):
    """A shard with damaged content, which reading again cannot fix; `offset` is the byte where it was found."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


def tar_members(file: BinaryIO, shard: ShardInfo) -> Iterator[tuple[str, int, int]]:
    """Name, data offset and size of every regular file in the shard opened as `file`. Raises DamagedShard."""
    position, name, size_override = 0, None, None
    while True:
        header = _header(file, position, shard)
        if header is None:
            return
        data = position + _BLOCK
        size = header.size if size_override is None else size_override
        if header.type in _NEVER_DATA:
            size = 0
        if not 0 <= size <= shard.size - data:  # a negative size would loop forever
            raise _cut_short(shard) if size > 0 else _damaged(shard, position, "negative size")
        position = data + -(-size // _BLOCK) * _BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(_extended(file, size, data, shard).split(b"\0")[0])
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            fields = _pax_fields(_extended(file, size, data, shard), data, shard)
            name = _text(fields["path"]) if "path" in fields else name
            digits = fields.get("size", b"")
            size_override = int(digits) if digits.isdigit() and len(digits) <= _LONGEST_NUMBER else None
        elif header.type == tarfile.GNUTYPE_SPARSE:
            raise DamagedShard(
                f"{shown_url(shard.url)} holds a sparse file at byte {data - _BLOCK}; "
                f"repack the shard without --sparse",
                data - _BLOCK,
            )
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if header.type in _PLAIN_FILES:
                yield header.name if name is None else name, data, size
            name, size_override = None, None


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
