"""The output of packing: a folder or a bucket in which every file appears complete or not at all.

In a folder a file is written under a hidden name, flushed to disk and renamed; to a store a temporary file is sent in
one upload, which the store makes visible when it is complete. Leftovers of a killed process are removed by the next
process that writes the same file.
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
from .files import readable_errors, shown_url
from .filesystems import filesystem


class Target:
    """The files of one folder or prefix. Fork-safe: no file stays open."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self.name = self._url.rpartition("/")[2]
        if not self.name or self.name.startswith(".") or not self.name.isprintable():
            raise DataError(f"{shown_url(url)}: name the folder of the shards, as in shards/photos")
        with readable_errors(url):
            system, path = filesystem(self._url)
        self._folder = Path(path) if isinstance(system, LocalFileSystem) else None
        self._existed = self._folder is not None and self._folder.exists()

    def url(self, name: str) -> str:
        """The URL of a file."""
        return f"{self._url}/{name}"

    def shown(self, name: str = "") -> str:
        """The URL of a file, or of the folder, safe to show in a message."""
        return shown_url(self.url(name) if name else self._url)

    def sizes(self) -> dict[str, int]:
        """The existing complete files and their sizes in bytes."""
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
            raise DataError(f"{self.shown()} already exists; remove it or choose another name")
        if not folder.exists():
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if not entry.name.startswith(".")}

    def text(self, name: str) -> str:
        """The content of a small text file. Raises DataError."""
        with readable_errors(self.url(name)):
            system, path = filesystem(self.url(name))
            return cast(bytes, system.cat_file(path)).decode("utf-8")

    def put_text(self, name: str, text: str) -> None:
        """Writes a small file, replacing an existing one."""
        with self.writing(name) as file:
            file.write(text.encode("utf-8"))

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, which becomes `name` at the end unless an error is raised."""
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
        except FileNotFoundError:  # another process finished the same file and removed our partial one
            if not (folder / name).exists():
                raise
        self.clean(name)

    def clean(self, name: str) -> None:
        """Removes partial files of a file that is complete now."""
        if self._folder is not None:
            for left in self._folder.glob(f".{glob.escape(name)}.*{PARTIAL}"):
                with suppress(FileNotFoundError):
                    left.unlink()

    def remove_empty_folder(self) -> None:
        """Removes the folder if it was created here and is still empty."""
        if self._folder is not None and not self._existed:
            with suppress(OSError):  # not empty, or never created
                self._folder.rmdir()
