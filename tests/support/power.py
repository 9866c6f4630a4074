"""A disk that loses its power: what was written and not flushed is gone.

`recorded` notes every call that changes files; `Disk` replays them on a model of a disk that keeps what was flushed:
the bytes of a file after an fsync of it, the names in a folder after an fsync of that folder. A real disk may also keep
what was not flushed; that removals are early is the worse case, and is tried too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_CHANGES = ("fsync", "replace", "link", "unlink", "remove", "mkdir", "rmdir")


@dataclass(frozen=True)
class Call:
    """One call: `flush` of a file or a folder, `name` (a rename or a link), `folder`, or `remove`."""

    what: str
    path: str
    """relative to the folder; "." is the folder itself"""
    file: int = 0
    """the inode that was flushed or named; 0 for a folder"""
    data: bytes = b""
    """of a flushed file"""


@contextmanager
def recorded(folder: Path) -> Iterator[list[Call]]:
    """The calls that change files below the empty `folder`, in order, while the context is open."""
    calls: list[Call] = []

    def noted(name: str, path: str) -> Call | None:
        place = Path(path)
        if place != folder and folder not in place.parents:
            return None
        inside = str(place.relative_to(folder))
        if name == "fsync":
            is_file = place.is_file()
            return Call("flush", inside, place.stat().st_ino * is_file, place.read_bytes() if is_file else b"")
        if name in ("replace", "link"):
            return Call("name", inside, place.stat().st_ino)
        return Call("folder" if name == "mkdir" else "remove", inside)

    def spy(name: str) -> Any:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            target = arguments[1] if name in ("replace", "link") else arguments[0]
            path = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else os.path.abspath(target)
            found = real(*arguments, **options)
            if note := noted(name, path):
                calls.append(note)
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(os, name, spy(name))
        yield calls


@dataclass
class Disk:
    """What is in the folder, and what of it is safe, after the calls so far."""

    now: dict[str, int] = field(default_factory=dict)
    safe: dict[str, int] = field(default_factory=dict)
    flushed: dict[int, bytes] = field(default_factory=dict)

    def apply(self, call: Call) -> None:
        """What a call changes."""
        if call.what in ("name", "folder"):
            self.now[call.path] = call.file
        elif call.what == "remove":
            self.now.pop(call.path, None)
        elif call.file:
            self.flushed[call.file] = call.data
        else:
            names = {name for name in {*self.safe, *self.now} if (os.path.dirname(name) or ".") == call.path}
            self.safe = {name: file for name, file in self.safe.items() if name not in names}
            self.safe |= {name: file for name, file in self.now.items() if name in names}

    def after_a_cut(self, removals: bool) -> dict[str, bytes]:
        """The files after a power cut; with `removals`, those that were not flushed have reached the disk."""
        return {
            name: self.flushed.get(file, b"")
            for name, file in self.safe.items()
            if file
            and all(str(parent) in (".", *self.safe) for parent in Path(name).parents)
            and not (removals and name not in self.now)
        }
