"""Staging: where the files of a snapshot wait for their upload on the node's own disk instead of in memory.

A snapshot that a slow store takes minutes to swallow would hold that much memory all the while. Files lie in a folder
of their own, named after the place of the run, the commit and the rank; it goes when the upload ends, and what a killed
attempt left there goes with the next one's first commit. A disk that refuses a file costs nothing but memory.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Protocol

from ...data.order import stable_hash


class File(Protocol):
    """One file to be, wherever its bytes wait."""

    def data(self) -> bytes | bytearray:
        """The bytes of the file."""


class Staged:
    """A file that waits on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def data(self) -> bytes:
        """The bytes of the file, which the disk then need not hold any longer."""
        data = self._path.read_bytes()
        self._path.unlink()
        return data


class Staging:
    """The folder of one commit and rank, for as long as the context is open."""

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
        """The file, under `name` on disk if it could be written there."""
        path = self._folder / name
        try:
            path.write_bytes(file.data())
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            return file
        return Staged(path)
