"""Where packed shards go: a folder or a bucket, in which a file appears whole or not at all.

In a folder a file is written under a hidden name, flushed to the disk and renamed; to a store it goes from a temporary
file in one upload, which a store shows when it is complete. What a killed process left behind is removed by whoever
writes that file the next time.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from ..errors import DataError
from .atomic_write import PARTIAL, atomic_file
from .files import filesystem, readable_errors, shown_url


class Target:
    """The files of one folder or prefix. Survives a fork: nothing is kept open."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = self._url.rpartition("/")[2]
        if not self.name or self.name.startswith(".") or not self.name.isprintable():
            raise DataError(f"{shown_url(url)}: name the folder of the shards, as in shards/photos")
        with readable_errors(url):
            system, path = filesystem(self._url)
        self._folder = Path(path) if isinstance(system, LocalFileSystem) else None
        self._there = self._folder is not None and self._folder.exists()

    def url(self, name: str) -> str:
        """Where a file lies."""
        return f"{self._url}/{name}"

    def shown(self, name: str = "") -> str:
        """Where a file, or all of it, lies, fit for a message."""
        return shown_url(self.url(name) if name else self._url)

    def sizes(self) -> dict[str, int]:
        """The files that are there, with their bytes; unfinished ones are not."""
        if self._folder is not None:
            return self._local_sizes(self._folder)
        with readable_errors(self._url):
            system, path = filesystem(self._url)
            system.invalidate_cache()
            try:
                found: list[dict[str, Any]] = system.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        return {each["name"].rpartition("/")[2]: int(each["size"]) for each in found if each["type"] == "file"}

    def _local_sizes(self, folder: Path) -> dict[str, int]:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{self.shown()} is there already; remove it or choose another name")
        if not folder.exists():
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")}

    def text(self, name: str) -> str:
        """A small file's text."""
        with readable_errors(self.url(name)):
            system, path = filesystem(self.url(name))
            return cast(bytes, system.cat_file(path)).decode("utf-8")

    def put_text(self, name: str, text: str) -> None:
        """Writes a small file, in place of one that is there."""
        with self.writing(name) as file:
            file.write(text.encode("utf-8"))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write; at the end it is `name`, unless an error passes through."""
        if self._folder is not None:
            with self._writing_here(self._folder, name) as file:
                yield file
            return
        with tempfile.TemporaryDirectory(prefix="packing-") as folder:
            with open(Path(folder) / name, "xb") as file:
                yield file
            with readable_errors(self.url(name)):
                system, path = filesystem(self.url(name))
                system.put_file(str(Path(folder) / name), path)

    @contextmanager
    def _writing_here(self, folder: Path, name: str) -> Iterator[BinaryIO]:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(folder / name, durable=True) as file:
                yield file
        except FileNotFoundError:  # another process finished the same file, and cleaned up
            if not (folder / name).exists():
                raise
        self.clean(name)

    def clean(self, name: str) -> None:
        """Removes what was begun for a file that is there now."""
        if self._folder is not None:
            for left in self._folder.glob(f".{glob.escape(name)}.*{PARTIAL}"):
                with suppress(FileNotFoundError):
                    left.unlink()

    def forsake(self) -> None:
        """Removes a folder that was made and in which nothing came to lie."""
        if self._folder is not None and not self._there:
            with suppress(OSError):  # not empty, or never made
                self._folder.rmdir()
