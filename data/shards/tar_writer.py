"""Writing tar files whose bytes depend on the samples alone: no clock, no user, members sorted by kind.

webdataset's TarWriter writes them; this adds what packing needs beside it: sizes that are known before anything is
written (`member_size`). webdataset imports torch, which takes a second, so it is imported at first use;
`import_writer` does that ahead of a fork.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import BinaryIO

BLOCK = 512
RECORD = tarfile.RECORDSIZE


def import_writer() -> ModuleType:
    """webdataset. A process that forks others which write calls this first, so that the import is paid once."""
    return import_module("webdataset")


class TarWriter:
    """Writes samples to an open file; a context manager, which ends the archive."""

    def __init__(self, file: BinaryIO) -> None:
        self._writer = import_writer().TarWriter(file, encoder=False, keep_meta=True, mtime=0)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Writes the members of one sample, by kind. Kinds must not begin with two underscores."""
        self._writer.write({"__key__": key, **members})


def member_size(name: str, size: int) -> int:
    """Bytes that a member of `size` bytes takes in the archive, headers and padding included."""
    header = tarfile.TarInfo(name)
    header.size = size
    plain = len(name) <= 100 and name.isascii()
    return (BLOCK if plain else len(header.tobuf(tarfile.PAX_FORMAT))) + -(-size // BLOCK) * BLOCK


def archive_size(members: int) -> int:
    """Bytes of an archive whose members take `members` bytes."""
    return -(-(members + 2 * BLOCK) // RECORD) * RECORD


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
