""".tar.gz shards: unpacked once into the cache folder and read from there.

A sample inside gzip data can only be reached by decompressing everything before it, and gzip does not make pictures
smaller. So exact order and ranged reads need a plain copy. `Unpacked` keeps the copies below a size limit by evicting
the least recently used; a missing one is unpacked again. A source whose copies do not all fit is refused, since they
would be unpacked over and over. Data that expands by more than any shard of pictures does is refused as a decompression
bomb, as soon as that limit is reached.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from ..config import CacheConfig
from ..errors import DataError
from ..shards.tar_reader import DamagedShard
from .atomic_write import PARTIAL, atomic_file
from .files import Reader, ShardInfo, cache_folder, changed, open_shard, read_range, shown_url
from .names import is_local

_MOST_GROWTH = 200  # expansion factor; deflate reaches 1,032 on zeros, pictures and captions stay below 20
_ALWAYS_ALLOWED = 10 << 20  # bytes that any shard may unpack to
_CHUNK = 1 << 20  # bytes unpacked at a time
_READ = 1 << 16  # bytes of gzip data read at a time
_RESERVE = 1 << 30  # bytes of disk space left free
_ABANDONED = 3600.0  # seconds after which an unfinished file counts as abandoned


def is_gzip(url: str) -> bool:
    """Whether a shard's name says that it is gzip data."""
    name = url if is_local(url) else url.partition("?")[0]
    return name.endswith((".tar.gz", ".tgz"))


@contextmanager
def open_content(shard: ShardInfo, read: Reader) -> Iterator[tuple[BinaryIO, ShardInfo]]:
    """The (unpacked) tar of a shard as a seekable file, and the shard with that tar's size."""
    if not is_gzip(shard.url):
        with open_shard(shard, read) as file:
            yield file, shard
        return
    with Unpacked(read).open(shard, anew=not shard.is_dated) as file:
        yield cast(BinaryIO, file), replace(shard, size=os.fstat(file.fileno()).st_size)


class Unpacked:
    """Reads shards with `read`, and .tar.gz shards from unpacked copies.

    At most `limit` bytes of copies are kept (None: the default limit of the block cache)."""

    def __init__(self, read: Reader = read_range, limit: int | None = None) -> None:
        self.inner, self.limit = read, CacheConfig().bytes if limit is None else limit

    def read(self, shard: ShardInfo, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard's (unpacked) tar. Raises as `read_range` does, or DamagedShard."""
        if not is_gzip(shard.url):
            return self.inner(shard, start, end)
        with self.open(shard) as copy:
            data = os.pread(copy.fileno(), end - start, start)
        if len(data) != end - start:
            raise changed(shard, start, end)
        return data

    def open(self, shard: ShardInfo, anew: bool = False) -> FileIO:
        """The unpacked copy as an open file, which stays readable when other processes evict it; made if missing, or
        with `anew`. Raises DataError, DamagedShard for damaged data."""
        path = cache_folder("unpacked") / sha256(json.dumps([*asdict(shard).values()]).encode()).hexdigest()
        if not anew:
            with suppress(FileNotFoundError):
                copy = FileIO(path)
                os.utime(copy.fileno())  # mark as recently used
                return copy
        try:
            with atomic_file(path) as growing:
                self._unpack(shard, growing)
                growing.flush()
                return FileIO(growing.name)
        except OSError as error:
            raise DataError(
                f"cannot unpack {shown_url(shard.url)} into {path.parent}: {error.strerror}; free some space, "
                f"set TREERING_CACHE to another folder, or unpack the shards with gunzip"
            ) from None

    def _unpack(self, shard: ShardInfo, into: BinaryIO) -> None:
        most, written, checked = max(_ALWAYS_ALLOWED, _MOST_GROWTH * shard.size), 0, 0
        with open_shard(shard, self.inner) as packed:
            for piece in _inflated(packed, shard):
                written += len(piece)
                if written > most:
                    raise DamagedShard(
                        f"{shown_url(shard.url)} is a decompression bomb: {shard.size:,} bytes that hold more than "
                        f"{most:,}, found at byte {packed.tell()}; remove it from the source",
                        packed.tell(),
                    )
                if written - checked > 16 * _CHUNK:
                    self._make_room(Path(into.name), shard, written)
                    checked = written
                into.write(piece)
        self._make_room(Path(into.name), shard, written)

    def _make_room(self, growing: Path, shard: ShardInfo, need: int) -> None:
        """Evicts the least recently used copies until `need` bytes fit. Raises DataError if they cannot."""
        files = sorted(_kept_files(growing))
        free = shutil.disk_usage(growing.parent).free - _RESERVE
        held = sum(size for _, size, _ in files)
        allowed = min(self.limit, held + max(free, 0))
        for _, size, path in files:
            if held + need <= allowed:
                return
            path.unlink(missing_ok=True)
            held -= size
        if held + need > allowed:
            raise DataError(
                f"{shown_url(shard.url)} does not fit in the cache: unpacked it has {need:,} bytes or more, "
                f"at most {max(allowed, 0):,} are available; unpack the shards with gunzip, or raise data.cache.limit"
            )


def _kept_files(growing: Path) -> Iterator[tuple[float, int, Path]]:
    """The kept copies except the growing one: last use, size, path. Removes abandoned unfinished files."""
    with os.scandir(growing.parent) as entries:
        for entry in entries:
            if entry.name == growing.name:
                continue
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if entry.name.endswith(PARTIAL) and time.time() - found.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
                elif not entry.name.endswith(PARTIAL):
                    yield found.st_mtime, found.st_size, Path(entry.path)


def _inflated(packed: BinaryIO, shard: ShardInfo) -> Iterator[bytes]:
    """The content of gzip data (RFC 1952), all members of it, in pieces of at most a chunk. Raises DamagedShard."""
    parts, part, data = 0, None, b""
    while True:
        data = data or packed.read(_READ)
        if part is None:
            if data and parts:
                data = data.lstrip(b"\0")  # zero padding after the last member
                if not data:
                    continue
            elif parts:
                return
            part, parts = zlib.decompressobj(31), parts + 1
        ended = not data
        try:
            piece = part.decompress(data, _CHUNK)
        except zlib.error:
            raise _broken(shard, packed.tell() - len(data), "it is not gzip data") from None
        data = part.unconsumed_tail
        if part.eof:
            data, part = part.unused_data, None
        elif ended and not piece:
            raise _broken(shard, packed.tell(), "it is cut short")
        if piece:
            yield piece


def _broken(shard: ShardInfo, position: int, what: str) -> DamagedShard:
    return DamagedShard(
        f"{shown_url(shard.url)} is damaged near byte {position} ({what}); copy it again or remove it from the source",
        position,
    )
