"""Packed shards as plain `tarfile` reads them."""

from __future__ import annotations

import tarfile
from pathlib import Path


def members(path: str) -> dict[str, bytes]:
    """The members of a shard by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def keys(folder: Path) -> list[list[str]]:
    """The keys of the samples that have a .txt, by shard."""
    shards = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            shards.append([name.removesuffix(".txt") for name in tar.getnames() if name.endswith(".txt")])
    return shards
