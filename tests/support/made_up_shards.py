"""Shards of chosen members, also as no well-behaved writer writes them: a name twice, any order, no partner."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

Members = list[tuple[str, bytes]]
"""names and contents, in the order of the file"""


def shard(path: Path, members: Members) -> Path:
    """Write the members as a tar file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
