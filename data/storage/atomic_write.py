"""Atomic writes: a file is written under a temporary name in the same folder, then renamed.

Only the standard library is imported, so that the batch script's helper starts fast.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".part"
"""suffix of a file that is being written, or was left by a killed process"""


def partial_path(path: Path) -> Path:
    """A new hidden name in the folder of `path`, to be renamed to `path` when complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")


@contextmanager
def atomic_file(path: Path, durable: bool = False, exclusive: bool = False) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, unless an error is raised inside the block.

    With `durable` it is flushed to disk, to survive a power cut; with `exclusive` an existing file is kept and
    FileExistsError is raised. Raises OSError.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = partial_path(path)
    try:
        with open(partial, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)  # unlike a rename, a link fails if the name exists
        else:
            os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | bytearray | str, durable: bool = False, exclusive: bool = False) -> None:
    """Write a file atomically, text as UTF-8. Options and errors as for `atomic_file`."""
    with atomic_file(path, durable, exclusive) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def remove_partials(folder: Path) -> None:
    """Remove partial files that killed processes left in a folder; no process may be writing there."""
    for left in folder.glob(f".*{PARTIAL}"):
        left.unlink(missing_ok=True)


def durable_folder(folder: Path) -> None:
    """Create a folder and its missing parents, so that they survive a power cut. Raises OSError."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that they survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network disks flush files only
            raise
    finally:
        os.close(handle)
