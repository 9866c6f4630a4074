"""Shards that are .tar.gz: unpacked once into the cache folder, and read there.

A sample in the middle of gzip data can only be reached through all that lies before it, and pictures do not get
smaller by it: so the way to exact order and ranged reads is a plain copy, which `Unpacked` keeps under a limit, by
evicting those that were longest unused; one that is missing is unpacked again. A source whose copies cannot all lie
there at once is refused, for they would be made over and over. Data that grows by more than a factor that no shard of
pictures reaches is a bomb, and refused when it has grown by that much, not later.
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
from pathlib import Path
from typing import BinaryIO, cast

from ..config import CacheConfig
from ..errors import DataError
from ..shards.tar_reader import DamagedShard
from .atomic_write import PARTIAL, atomic_file
from .files import Reader, ShardInfo, cache_folder, open_shard, read_range, shown_url

_MOST_GROWTH = 200  # times; deflate can reach 1,032 on zeros, pictures and captions stay below 20
_LEAST = 10 << 20  # bytes that any shard may unpack to
_CHUNK = 1 << 20  # bytes that are unpacked at a time
_TAKEN = 1 << 16  # bytes of gzip data that are taken at a time
_RESERVE = 1 << 30  # bytes of the disk that are left to others
_ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's any more


def is_packed(url: str) -> bool:
    """Whether a shard is gzip data by its name."""
    return url.endswith((".tar.gz", ".tgz"))


@contextmanager
def open_content(shard: ShardInfo, read: Reader) -> Iterator[tuple[BinaryIO, ShardInfo]]:
    """The tar that a shard is or holds, as a seekable file, and the shard with the size of that tar."""
    if not is_packed(shard.url):
        with open_shard(shard, read) as file:
            yield file, shard
        return
    with open(Unpacked(read).path(shard), "rb") as file:
        yield cast(BinaryIO, file), replace(shard, size=os.fstat(file.fileno()).st_size)


class Unpacked:
    """Reads shards by `read`, those that are .tar.gz from their unpacked copies, of which at most `limit` bytes are
    kept (None: as many as the block cache may hold by default)."""

    def __init__(self, read: Reader = read_range, limit: int | None = None) -> None:
        self.inner, self.limit = read, CacheConfig().bytes if limit is None else limit

    def read(self, shard: ShardInfo, start: int, end: int) -> bytes:
        """Bytes [start, end) of the tar that a shard is or holds; raises what `read_range` does, or DamagedShard."""
        if not is_packed(shard.url):
            return self.inner(shard, start, end)
        path = self.path(shard)
        return read_range(ShardInfo(str(path), shard.size, ""), start, end)

    def path(self, shard: ShardInfo) -> Path:
        """The unpacked copy, made now if it is not there."""
        path = cache_folder("unpacked") / sha256(json.dumps([*asdict(shard).values()]).encode()).hexdigest()
        with suppress(FileNotFoundError):
            os.utime(path)  # used
            return path
        try:
            with atomic_file(path) as file:
                self._unpack(shard, file)
        except OSError as error:
            raise DataError(
                f"cannot unpack {shown_url(shard.url)} into {path.parent}: {error.strerror}; free some space, "
                f"set TREERING_CACHE to another folder, or unpack the shards with gunzip"
            ) from None
        return path

    def _unpack(self, shard: ShardInfo, into: BinaryIO) -> None:
        most, written, looked = max(_LEAST, _MOST_GROWTH * shard.size), 0, 0
        with open_shard(shard, self.inner) as packed:
            for piece in _inflated(packed, shard):
                written += len(piece)
                if written > most:
                    raise DamagedShard(
                        f"{shown_url(shard.url)} is a decompression bomb: {shard.size:,} bytes that hold more than "
                        f"{most:,}, seen at byte {packed.tell()}; leave it out",
                        packed.tell(),
                    )
                if written - looked > 16 * _CHUNK:
                    self._make_room(Path(into.name), shard, written)
                    looked = written
                into.write(piece)
        self._make_room(Path(into.name), shard, written)

    def _make_room(self, growing: Path, shard: ShardInfo, need: int) -> None:
        """Evicts the copies longest unused until `need` bytes fit beside the others. DataError if they cannot."""
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
                f"{max(allowed, 0):,} are allowed; unpack the shards with gunzip, or raise data.cache.limit"
            )


def _kept_files(growing: Path) -> Iterator[tuple[float, int, Path]]:
    """Our files but the one that grows: when last used, size, path. Removes unfinished ones of those long gone."""
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
    """The content of gzip data (RFC 1952), of all its parts, in pieces of at most a chunk. Raises DamagedShard."""
    parts, part, data = 0, None, b""
    while True:
        data = data or packed.read(_TAKEN)
        if part is None:
            if data and parts:
                data = data.lstrip(b"\0")  # tapes pad with zeros
                if not data:
                    continue
            elif parts:
                return
            part, parts = zlib.decompressobj(31), parts + 1
        ended = not data
        try:
            piece = part.decompress(data, _CHUNK)
        except zlib.error:
            raise _broken(shard, packed.tell() - len(data), "it is no gzip data") from None
        data = part.unconsumed_tail
        if part.eof:
            data, part = part.unused_data, None
        elif ended and not piece:
            raise _broken(shard, packed.tell(), "it is cut short")
        if piece:
            yield piece


def _broken(shard: ShardInfo, position: int, what: str) -> DamagedShard:
    return DamagedShard(
        f"{shown_url(shard.url)} is damaged near byte {position} ({what}); copy it again or leave it out", position
    )
