"""The node's cache of remote shards: aligned blocks, stored as files in the cache folder that all processes share.

Why not fsspec's blockcache or filecache: they have no disk limit that several processes can keep without locks, and
they do not verify a block when they read it.

The one idea: no waiting and no trust. A block is written under a temporary name and renamed, so it is there completely
or not at all; every piece of it has a checksum that each read verifies; a block that is missing, torn or evicted is
fetched again. So it needs no locks, a killed process leaves nothing that affects others, and several processes that
miss one block at the same time each fetch it, which costs bandwidth but never correctness.

Files are named by a hash of shard, version and block number: no outside text becomes a path.

The order of samples (order.py) reads a small source all over, and a large one from a window in each of its lanes. If
the part being read at a time exceeds the limit, every sample would fetch a block: such a source is not cached at all.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from .atomic_write import PARTIAL, atomic_write
from .files import Reader, ShardInfo, cache_folder, is_remote, read_range

_FORMAT = 1
_BLOCK = 8 << 20  # bytes of a shard per file and per request
_PIECE = 1 << 14  # bytes per checksum: at most two pieces are read beyond a sample
_SUM = 4  # bytes of a checksum (CRC-32), stored before its piece
_TOUCH = 60.0  # seconds between updates of a block's last use
_ABANDONED = 600.0  # seconds after which an unfinished file counts as abandoned
_RESERVE = 5 * 10**9  # bytes of disk space (or 1/20 of the disk, if less) left free for commits and other uses
_NAME = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{16}\.part")

CachedBlock = tuple[ShardInfo, int]  # a shard and the number of the block in it


class BlockCache:
    """Reads shards through the cache folder, which holds at most `limit` bytes (0: no cache).

    Each process may exceed the limit by 1/512 before it measures the folder again."""

    def __init__(self, limit: int, block: int = _BLOCK) -> None:
        self.limit, self.block = limit, block
        self._admitted = 0  # bytes admitted by `reader`
        self._stopped = False  # writing failed; nothing is cached any more
        self._measured, self._written_since = (
            0,
            limit + 1,
        )  # bytes at the last measurement, and bytes written since then

    def reader(self, shards: Sequence[ShardInfo], need: int | None = None) -> Reader:
        """The reader for these shards: through the cache if they are remote and their working set fits.

        `need` is the number of bytes being read from at a time (None: all), in addition to what was admitted before."""
        size = sum(shard.size for shard in shards)
        need = size if need is None else min(need, size)
        if not all(is_remote(shard.url) for shard in shards) or self._admitted + need > self.limit:
            return read_range
        self._admitted += need
        return self.read

    def blocks(self, shard: ShardInfo, start: int, end: int) -> list[CachedBlock]:
        """The blocks that hold bytes [start, end) of a shard."""
        return [(shard, number) for number in range(start // self.block, (end - 1) // self.block + 1)]

    def fetch(self, block: CachedBlock) -> int:
        """Fetches a block unless it is cached; returns the bytes received over the network. Raises as `read_range`
        does."""
        shard, number = block
        path = cache_folder("blocks") / _name(shard, self.block, number)
        if self._stopped or path.exists():
            return 0
        first = number * self.block
        data = read_range(shard, first, min(first + self.block, shard.size))
        self._store(path, data)
        return len(data)

    def read(self, shard: ShardInfo, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard. Raises as `read_range` does."""
        if not 0 <= start < end <= shard.size:
            return read_range(shard, start, end)
        parts = []
        for number in range(start // self.block, (end - 1) // self.block + 1):
            first = number * self.block
            size = min(self.block, shard.size - first)
            parts.append(self._part(shard, number, size, max(start - first, 0), min(end - first, size)))
        return b"".join(parts)

    def _part(self, shard: ShardInfo, number: int, size: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of block `number`, which is `size` bytes long."""
        name = _name(shard, self.block, number)
        path = cache_folder("blocks") / name
        cached = _read_cached(path, size, start, end)
        if cached is not None:
            return cached
        first = number * self.block
        if self._stopped:
            return read_range(shard, first + start, first + end)
        data = read_range(shard, first, first + size)
        self._store(path, data)
        return data[start:end]

    def _store(self, path: Path, data: bytes) -> None:
        """Stores a block. If that fails, caching stops but reading continues."""
        stored = _with_sums(data, path.name)
        try:
            self._make_room(path.parent, len(stored))
            atomic_write(path, stored)
            self._written_since += len(stored)
        except OSError as error:
            self._stopped = True
            logging.getLogger(__name__).warning(
                "cannot cache shards in %s: %s; reading continues without the cache: free some space, set "
                "TREERING_CACHE to another folder, or lower data.cache.limit",
                path.parent,
                error.strerror,
            )

    def _make_room(self, folder: Path, need: int) -> None:
        """Evicts the least recently used blocks until `need` more bytes fit. Raises OSError if they cannot."""
        disk = shutil.disk_usage(folder)
        spare = disk.free - min(_RESERVE, disk.total // 20)
        if self._written_since <= self.limit // 512 and need <= min(
            self.limit - self._measured - self._written_since, spare
        ):
            return
        files = _cached_files(folder)
        self._measured, self._written_since = sum(size for _, size, _ in files), 0
        allowed = min(self.limit, self._measured + spare)
        if self._measured + need <= allowed:
            return
        for _, size, path in sorted(files):
            if (
                self._measured + need <= allowed * 7 // 8
            ):  # evict down to 7/8, so that the folder is not measured for every block
                return
            with suppress(FileNotFoundError):  # another process removed it
                path.unlink()
            self._measured -= size
        if need > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _name(shard: ShardInfo, block: int, number: int) -> str:
    return sha256(json.dumps([_FORMAT, shard.url, shard.size, shard.stamp, block, number]).encode()).hexdigest()


def _cached_files(folder: Path) -> list[tuple[float, int, Path]]:
    """The cached files: last use, size, path. Removes abandoned unfinished files."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _NAME.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if entry.name.endswith(PARTIAL) and time.time() - found.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
                else:
                    files.append((found.st_mtime, found.st_size, Path(entry.path)))
    return files


def _with_sums(data: bytes, name: str) -> bytes:
    """The block's pieces, each preceded by its checksum."""
    pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
    return b"".join(_sum(piece, name, i) + piece for i, piece in enumerate(pieces))


def _sum(piece: bytes, name: str, number: int) -> bytes:
    """A checksum that also differs between places and files, so that a misplaced piece is detected."""
    return zlib.crc32(piece, int(name[:8], 16) ^ number).to_bytes(_SUM, "little")


def _read_cached(path: Path, size: int, start: int, end: int) -> bytes | None:
    """Bytes [start, end) of a cached block of `size` bytes; None if it is missing or damaged."""
    first, last = start // _PIECE, (end - 1) // _PIECE + 1
    stride = _PIECE + _SUM
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        stored = os.pread(descriptor, (last - first) * stride, first * stride)
        if time.time() - os.fstat(descriptor).st_mtime > _TOUCH:
            os.utime(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if len(stored) != min(last * _PIECE, size) - first * _PIECE + (last - first) * _SUM:
        return None
    pieces = []
    for i, at in enumerate(range(0, len(stored), stride)):
        piece = stored[at + _SUM : at + stride]
        if stored[at : at + _SUM] != _sum(piece, path.name, first + i):
            return None
        pieces.append(piece)
    return b"".join(pieces)[start - first * _PIECE : end - first * _PIECE]
