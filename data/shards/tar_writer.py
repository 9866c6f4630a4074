"""Writes tar files whose bytes depend only on the samples: no times, no user, members sorted by kind.

webdataset's TarWriter writes them; this module adds what packing also needs: sizes known before anything is written
(`member_size`). webdataset imports torch, which takes a second, so it is imported on first use; `import_writer` does
so before a fork.
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
    """Imports webdataset. Call it before forking processes that write, so that the import is done once."""
    return import_module("webdataset")


class TarWriter:
    """Writes samples to an open file; a context manager that ends the archive on exit."""

    def __init__(self, file: BinaryIO) -> None:
        self._writer = import_writer().TarWriter(file, encoder=False, keep_meta=True, mtime=0)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Writes the members of one sample (bytes by kind). Kinds must not begin with two underscores."""
        self._writer.write({"__key__": key, **members})


def member_size(name: str, size: int) -> int:
    """The bytes that a member of `size` bytes occupies in the archive, including headers and padding."""
    header = tarfile.TarInfo(name)
    header.size = size
    plain = len(name) <= 100 and name.isascii()
    return (BLOCK if plain else len(header.tobuf(tarfile.PAX_FORMAT))) + -(-size // BLOCK) * BLOCK


def archive_size(members: int) -> int:
    """The bytes of an archive whose members occupy `members` bytes."""
    return -(-(members + 2 * BLOCK) // RECORD) * RECORD


def write_shards(
    folder: Path, name: str, samples: Iterable[tuple[str, dict[str, bytes]]], total: int, shard_size: int
) -> list[str]:
    """Writes `total` samples (key, bytes by kind), in order, into the fewest shards of at most `shard_size` samples, of
    nearly equal length. Returns the file names. Equal samples give equal bytes."""
    count = -(-total // shard_size)
    samples = iter(samples)
    names = []
    for i in range(count):
        names.append(f"{name}-{i:06d}.tar")
        with open(folder / names[-1], "wb") as file, TarWriter(file) as writer:
            for _ in range(total * i // count, total * (i + 1) // count):
                writer.write(*next(samples))
    return names
