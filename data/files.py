"""Where bytes come from: local paths and stores (fsspec), and the cache folder.

File systems are opened where they are used: fsspec keeps its instances per process, so nothing crosses a fork.
What a store refuses becomes a DataError with the remedy; its own words are not echoed, for they may hold secrets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec.core

from .config import DataError

_GLOB = frozenset("*?[")
# What a process opened stays alive in its forked children: collected there, it would close the parent's connections.
_OPENED: dict[int, Any] = {}


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard and what tells one version of it from another."""

    url: str
    size: int  # bytes
    stamp: str  # modification time or etag


def shown_url(url: str) -> str:
    """A URL fit for a message: without passwords and signatures, and without control characters."""
    parts = urlsplit(url) if "://" in url else None
    if parts and (parts.query or "@" in parts.netloc):
        url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in url)


def cache_folder(name: str) -> Path:
    """The folder `name` in $TREERING_CACHE, else ~/.cache/treering; made if missing."""
    root = os.environ.get("TREERING_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "treering") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make {folder}: {error.strerror}; set TREERING_CACHE to a folder you can write to"
        ) from None
    return folder


def find(url: str) -> list[ShardInfo]:
    """The files a URL without braces stands for. DataError if there is none, or the store does not answer."""
    with readable_errors(url):
        system, path = filesystem(url)
        if _GLOB & set(path):
            matches = list(system.glob(path, detail=True).values())
        elif not system.exists(path):
            matches = []
        elif system.isdir(path):
            raise DataError(
                f"{shown_url(url)} is a folder; name the tar files in it, as in {shown_url(url).rstrip('/')}/*.tar"
            )
        else:
            matches = [system.info(path)]
        files = [match for match in matches if match["type"] == "file"]
        if not files:
            where = "the bucket and the names in it" if "://" in url else "the path"
            raise DataError(f"no shards match {shown_url(url)}: nothing is there; check {where}")
        return [ShardInfo(_with_protocol(url, m["name"]), int(m["size"]), _stamp(m)) for m in files]


def _with_protocol(url: str, name: str) -> str:
    protocol, separator, _ = url.partition("://")
    return name if not separator or "://" in name else f"{protocol}://{name}"


def _stamp(info: dict[str, Any]) -> str:
    for field in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated"):
        if info.get(field) is not None:
            return str(info[field])
    return ""


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, as this process may use it, and the path in it."""
    system, path = fsspec.core.url_to_fs(url)
    _OPENED[id(system)] = system
    return system, path


@contextmanager
def open_shard(shard: ShardInfo) -> Iterator[BinaryIO]:
    """The shard as a seekable file."""
    with readable_errors(shard.url):
        system, path = filesystem(shard.url)
        with system.open(path, "rb") as file:
            yield cast(BinaryIO, file)


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. DataError where they are not there."""
    with readable_errors(url):
        if "://" not in url:
            data = _read_local(url, start, end)
        else:
            system, path = filesystem(url)
            data = system.cat_file(path, start=start, end=end)
    if len(data) != end - start:
        raise DataError(
            f"{shown_url(url)} changed while it was read: bytes {start} to {end} are not all there; start again"
        )
    return data


def _read_local(path: str, start: int, end: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


@contextmanager
def readable_errors(url: str) -> Iterator[None]:
    """Turns what a file system raises into a DataError that names the place and the remedy."""
    name = shown_url(url)
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"{name}: nothing is there; check the {'bucket and the name' if '://' in url else 'path'}"
        ) from None
    except PermissionError:
        remedy = "check that the credentials in use may read it" if "://" in url else "check the file's permissions"
        raise DataError(f"{name}: access refused; {remedy}") from None
    except (ImportError, ValueError) as error:  # fsspec: unknown protocol, or its package is missing
        raise DataError(
            f"cannot open {name}: {type(error).__name__}; check the protocol, or install its fsspec package"
        ) from None
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            raise DataError(
                f"{name}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
                f"(and AWS_ENDPOINT_URL for a store that is not Amazon's)"
            ) from None
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in (
            "botocore",
            "aiohttp",
            "aiobotocore",
        ):
            reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise DataError(f"cannot read {name}: {reason}; check that the store is reachable and try again") from None
        raise
