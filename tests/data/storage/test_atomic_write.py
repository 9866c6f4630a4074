"""Files that appear whole or not at all, against a process that is killed at every write, and a listing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from treering.data.storage.atomic_write import atomic_file, atomic_write, remove_partials

KILLED = """
import os, signal, sys
from pathlib import Path
from treering.data.storage.atomic_write import atomic_file
with atomic_file(Path(sys.argv[1]), durable=True) as file:
    file.write(b"new" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    for data in ("Grüße", b"bytes", bytearray(b"more")):
        atomic_write(path, data, durable=True)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
        assert list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_exclusive_lets_one_writer_win(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"second", exclusive=True)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_durable_syncs_the_file_before_its_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of calls is the promise: a power cut between any two leaves the old file or the new one."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    atomic_write(tmp_path / "file", b"data", durable=True)
    assert calls[0].endswith(".part")
    assert calls[1:] == ["rename", str(tmp_path)]


def test_a_folder_in_the_place_is_named_itself(tmp_path: Path) -> None:
    """Not the hidden partial file beside it, which nobody has heard of."""
    (tmp_path / "page.html").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        atomic_write(tmp_path / "page.html", "text")
    assert refused.value.filename == str(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
