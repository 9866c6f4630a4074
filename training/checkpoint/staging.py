"""Staging: the files of a snapshot wait for their upload on the node's own disk instead of in memory.

With a slow store an upload takes minutes, and the snapshot would occupy memory all that time. The files are in a folder
named after the run's store, the commit and the rank. It is removed when the upload ends; what a killed attempt left is
removed at the next attempt's first commit. A file that the disk refuses stays in memory.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Protocol

from ...data.order import stable_hash


class File(Protocol):
    """A file that waits to be uploaded."""

    def data(self) -> bytes | bytearray:
        """The bytes of the file."""


class Staged:
    """A file that waits on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def data(self) -> bytes:
        """The bytes of the file, which is removed from the disk."""
        data = self._path.read_bytes()
        self._path.unlink()
        return data


class Staging:
    """The staging folder of one commit and rank; it exists while the context is open."""

    def __init__(self, place: str, url: str, commit: str, rank: int) -> None:
        """`place` is the folder that the recipe names, `url` the store's."""
        self._place, run = Path(place), f"treering-{stable_hash('staging', url):016x}"
        self._folder = self._place / f"{run}-{rank:05d}-{commit}"
        self._before = f"{run}-{rank:05d}-*"

    def __enter__(self) -> Staging:
        with contextlib.suppress(OSError):
            for left in self._place.glob(self._before):
                shutil.rmtree(left, ignore_errors=True)
            self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def keep(self, name: str, file: File) -> File:
        """Move the file to disk under `name`; returns the file unchanged if it cannot be written there."""
        path = self._folder / name
        try:
            path.write_bytes(file.data())
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            return file
        return Staged(path)
