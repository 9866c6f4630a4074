"""Files that appear whole or not at all: written beside their place under another name, then renamed.

Only the standard library is imported, so that the batch script's helper starts at once.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".part"
"""ending of a file that is being written, or was when its process died"""


def partial_path(path: Path) -> Path:
    """A new hidden name beside `path`, for what is to be renamed to it when it is whole."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")


@contextmanager
def atomic_file(path: Path, durable: bool = False, exclusive: bool = False) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, unless an error passes through.

    With `durable` it survives a power cut from then on; with `exclusive` an existing file is kept and FileExistsError
    raised. Raises OSError.
    """
    partial = partial_path(path)
    try:
        with open(partial, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if exclusive:
            os.link(partial, path)  # unlike a rename, it refuses an existing name
        else:
            os.replace(partial, path)
        if durable:
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | bytearray | str, durable: bool = False, exclusive: bool = False) -> None:
    """Write a whole file, text as UTF-8. The rest is as in `atomic_file`."""
    with atomic_file(path, durable, exclusive) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def remove_partials(folder: Path) -> None:
    """Remove what a process that died while it wrote left in a folder; nobody may be writing there."""
    for left in folder.glob(f".*{PARTIAL}"):
        left.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
