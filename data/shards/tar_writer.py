"""Writing tar files whose bytes depend on the samples alone: no clock, no user, members sorted by kind.

The headers are those of webdataset's TarWriter; `tarfile` alone writes them, which spares every packing process the
seconds of importing webdataset, and their sizes are known before anything is written (`member_size`).
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

BLOCK = 512
RECORD = tarfile.RECORDSIZE


class TarWriter:
    """Writes samples to an open file; a context manager, which ends the archive unless an error passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._tar.close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Writes the members of one sample, by kind."""
        for kind, data in sorted(members.items()):
            self._tar.addfile(_header(f"{key}.{kind}", len(data)), io.BytesIO(data))


def member_size(name: str, size: int) -> int:
    """Bytes that a member of `size` bytes takes in the archive, headers and padding included."""
    plain = len(name) <= 100 and name.isascii()
    header = BLOCK if plain else len(_header(name, size).tobuf(tarfile.PAX_FORMAT))
    return header + -(-size // BLOCK) * BLOCK


def archive_size(members: int) -> int:
    """Bytes of an archive whose members take `members` bytes."""
    return -(-(members + 2 * BLOCK) // RECORD) * RECORD


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode, header.uname, header.gname = size, 0, 0o444, "bigdata", "bigdata"
    return header


def write_shards(
    folder: Path, name: str, samples: Iterable[tuple[str, dict[str, bytes]]], total: int, shard_size: int
) -> list[str]:
    """Writes `total` samples (key, bytes by kind), in their order, into as few shards as hold them at `shard_size`
    each, all of nearly the same length. Returns the file names. Equal samples give equal bytes."""
    count = -(-total // shard_size)
    samples = iter(samples)
    names = []
    for i in range(count):
        names.append(f"{name}-{i:06d}.tar")
        with open(folder / names[-1], "wb") as file, TarWriter(file) as writer:
            for _ in range(total * i // count, total * (i + 1) // count):
                writer.write(*next(samples))
    return names
