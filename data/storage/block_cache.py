"""The node's cache of remote shards: aligned blocks of them, as files in the cache folder that all processes share.

Why not fsspec's blockcache or filecache: they have no limit on the disk that several processes keep together without
locks, and check no block when they read it.

The one idea: nothing is ever waited for or believed. A block is written beside its place and renamed to it, so it is
there whole or not at all; every piece of it carries a checksum that each read tests; a block that is missing, torn or
evicted is simply fetched again. So there are no locks, nobody's death leaves anything that others stumble over, and
several processes that miss one block at once fetch it several times, which costs bytes but never the right answer.

Files are named by a hash of shard, version and block number: nothing from outside becomes a path.

The order of samples (order.py) draws a small source from all over, and a large one from a window in each of its lanes.
Where what is drawn from at a time is more than the limit, blocks would be fetched over and over, one for every sample:
such a source is not cached at all.
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
_BLOCK = 8 << 20  # bytes of a shard in one file, and in one request
_PIECE = 1 << 14  # bytes under one checksum: what is read and tested beyond a sample is at most two of these
_SUM = 4  # bytes of a checksum (CRC-32), in front of its piece
_TOUCH = 60.0  # seconds within which a block is not marked as used again
_ABANDONED = 600.0  # seconds after which an unfinished file is nobody's any more
_RESERVE = 5 * 10**9  # bytes of the disk, or a twentieth of it, that are left for commits and others
_NAME = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{16}\.part")

CachedBlock = tuple[ShardInfo, int]  # a shard and the number of the block in it


class BlockCache:
    """Reads shards through the cache folder, which holds at most `limit` bytes (0: it is not used); each process may
    pass it by a 512th before it looks again."""

    def __init__(self, limit: int, block: int = _BLOCK) -> None:
        self.limit, self.block = limit, block
        self._admitted = 0  # bytes of the shards that are read through it
        self._stopped = False  # nothing can be written
        self._held, self._unseen = 0, limit + 1  # bytes at the last look, and written since then

    def reader(self, shards: Sequence[ShardInfo], need: int | None = None) -> Reader:
        """How to read these shards: through the cache if they are remote and it has room for the `need` bytes that are
        drawn from at a time (None: all of them) beside what was admitted before."""
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
        """Sees to it that a block is there, and returns how many bytes came over the network for it. Raises what
        `read_range` does."""
        shard, number = block
        path = cache_folder("blocks") / _name(shard, self.block, number)
        if self._stopped or path.exists():
            return 0
        first = number * self.block
        data = read_range(shard, first, min(first + self.block, shard.size))
        self._keep(path, data)
        return len(data)

    def read(self, shard: ShardInfo, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard; raises what `read_range` does."""
        if not 0 <= start < end <= shard.size:
            return read_range(shard, start, end)
        parts = []
        for number in range(start // self.block, (end - 1) // self.block + 1):
            first = number * self.block
            size = min(self.block, shard.size - first)
            parts.append(self._part(shard, number, size, max(start - first, 0), min(end - first, size)))
        return b"".join(parts)

    def _part(self, shard: ShardInfo, number: int, size: int, start: int, end: int) -> bytes:
        """Bytes [start, end) of block `number`, which has `size` of them."""
        name = _name(shard, self.block, number)
        path = cache_folder("blocks") / name
        kept = _read_kept(path, size, start, end)
        if kept is not None:
            return kept
        first = number * self.block
        if self._stopped:
            return read_range(shard, first + start, first + end)
        data = read_range(shard, first, first + size)
        self._keep(path, data)
        return data[start:end]

    def _keep(self, path: Path, data: bytes) -> None:
        """Writes a block. Where that fails, nothing is written any more: reading is what matters."""
        stored = _with_sums(data, path.name)
        try:
            self._make_room(path.parent, len(stored))
            atomic_write(path, stored)
            self._unseen += len(stored)
        except OSError as error:
            self._stopped = True
            logging.getLogger(__name__).warning(
                "cannot cache shards in %s: %s; reading goes on without: free some space, or set TREERING_CACHE to "
                "another folder, or data.cache.limit to less",
                path.parent,
                error.strerror,
            )

    def _make_room(self, folder: Path, need: int) -> None:
        """Evicts the blocks longest unused until `need` bytes more fit. OSError if they cannot."""
        disk = shutil.disk_usage(folder)
        spare = disk.free - min(_RESERVE, disk.total // 20)
        if self._unseen <= self.limit // 512 and need <= min(self.limit - self._held - self._unseen, spare):
            return
        files = _kept_files(folder)
        self._held, self._unseen = sum(size for _, size, _ in files), 0
        allowed = min(self.limit, self._held + spare)
        if self._held + need <= allowed:
            return
        for _, size, path in sorted(files):
            if self._held + need <= allowed * 7 // 8:  # a little more than needed, so as not to look every time
                return
            with suppress(FileNotFoundError):  # another process was faster
                path.unlink()
            self._held -= size
        if need > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _name(shard: ShardInfo, block: int, number: int) -> str:
    return sha256(json.dumps([_FORMAT, shard.url, shard.size, shard.stamp, block, number]).encode()).hexdigest()


def _kept_files(folder: Path) -> list[tuple[float, int, Path]]:
    """Our files: when last used, size, path. Removes unfinished ones whose writer is long gone."""
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
    """Each piece of the block behind its checksum."""
    pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
    return b"".join(_sum(piece, name, i) + piece for i, piece in enumerate(pieces))


def _sum(piece: bytes, name: str, number: int) -> bytes:
    """A checksum that also tells a piece from one of another place or file."""
    return zlib.crc32(piece, int(name[:8], 16) ^ number).to_bytes(_SUM, "little")


def _read_kept(path: Path, size: int, start: int, end: int) -> bytes | None:
    """Bytes [start, end) of a kept block of `size` bytes; None if it is not there or not as it was written."""
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
