"""Reading bytes from local paths and stores (fsspec), and the location of the cache folder.

A read from a store is one ranged request, received in chunks: after a transient failure (retries.py) the next request
continues after the last byte received.

A store's refusal becomes a DataError with the remedy; the store's error text is not shown, since it may hold secrets.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ..errors import DataError
from .credentials import without_user
from .failures import Failure, settings_remedy
from .filesystems import failure_at, filesystem, single_try_filesystem, with_code
from .names import is_local
from .retries import http_status, reason, retry

T = TypeVar("T")
SIDECAR_FOLDER = ".treering"
"""the sidecar folder next to shards, which holds their indexes"""
_LOCAL = frozenset(("file", "local", "memory"))
_AHEAD = 8 << 20  # bytes requested at a time by a walk over a remote shard
_CHUNK = 1 << 18  # bytes read at a time from a response
_UNDATED = "?"  # ends a stamp that says nothing
_EARLIEST = 315_532_800 * 10**9  # 1980: earlier times are those that an archive was made with


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard, with the size and stamp that identify its version."""

    url: str
    size: int  # bytes
    stamp: str  # etag, or on a disk the times of the last change

    @property
    def is_dated(self) -> bool:
        """Whether another version of the shard would have another size or stamp."""
        return not self.stamp.endswith(_UNDATED)


class ShardChanged(DataError):
    """A shard that is no longer the version that was listed, or not what its index says."""


def shown_url(url: str) -> str:
    """A URL safe to show in a message: without users, secrets and control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in without_user(url))


def cache_folder(name: str) -> Path:
    """The folder `name` in $TREERING_CACHE, else ~/.cache/treering; created if missing. Raises DataError."""
    root = os.environ.get("TREERING_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "treering") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create {folder}: {error.strerror}; set TREERING_CACHE to a folder you can write to"
        ) from None
    return folder


Reader = Callable[[ShardInfo, int, int], bytes]  # the bytes [start, end) of a shard


def is_remote(url: str) -> bool:
    """Whether a URL is read over the network."""
    protocol, separator, _ = url.partition("://")
    return bool(separator) and protocol not in _LOCAL


def info_of(system: Any, path: str) -> dict[str, Any] | None:
    """What a store says of an object; None if there is none."""
    try:
        found: dict[str, Any] = system.info(path)
        return found
    except FileNotFoundError as error:
        if http_status(error) not in (None, 404, 410):  # fsspec's http reports any failure as FileNotFoundError
            raise
        return None
    except OSError as error:
        raise with_code(system, path, error) from None


def stamp_of(info: dict[str, Any]) -> str:
    """The stamp of an object, from what its store says of it; empty if that has none."""
    for field in ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "last_modified", "updated"):
        if info.get(field) is not None:
            return str(info[field])
    return ""


def version_of(stat: os.stat_result) -> str:
    """The stamp of a file: its times of modification and change. Tools restore the former after a change (rsync -a,
    touch -r); the latter cannot be set. In images of file systems (squashfs) both may be 0 for every version.

    Why not the inode number: it differs at every mount of a bucket (FUSE), which would index all shards again."""
    undated = "" if stat.st_ctime_ns >= _EARLIEST else f"-{stat.st_ino}{_UNDATED}"
    return f"{stat.st_mtime_ns}-{stat.st_ctime_ns}{undated}"


def listed_again(shard: ShardInfo) -> ShardInfo:
    """The present version of a shard. Raises DataError if it is gone."""
    with readable_errors(shard.url):
        if is_local(shard.url):
            stat = os.stat(_local_path(shard.url))
            return ShardInfo(shard.url, stat.st_size, version_of(stat))
        system, path = single_try_filesystem(shard.url)
        match = retry(shown_url(shard.url), lambda: info_of(system, path))
        if match is None:
            raise FileNotFoundError
        return ShardInfo(shard.url, int(match["size"]), stamp_of(match))


def read_range(shard: ShardInfo, start: int, end: int) -> bytes:
    """Bytes [start, end) of a shard. Raises ShardChanged if it is another version than the listed one, DataError."""
    with readable_errors(shard.url):
        data = _read_local(shard, start, end) if is_local(shard.url) else _received(shard, start, end)
    if len(data) != end - start:
        raise changed(shard, start, end)
    return data


def changed(shard: ShardInfo, start: int, end: int) -> ShardChanged:
    """The error for a shard that changed since it was listed."""
    return ShardChanged(
        f"{shown_url(shard.url)} changed while it was read, at bytes {start} to {end}; start again when it is complete"
    )


def _received(shard: ShardInfo, start: int, end: int) -> bytes:
    """Bytes [start, end) from a store, fewer if the shard ends before."""
    received = bytearray()
    reached = -1
    while reached < len(received) < end - start:
        reached = len(received)
        try:
            retry(shown_url(shard.url), lambda: _receive(shard, start, end, received), lambda: len(received))
        except DataError:
            raise
        except Exception as error:
            if http_status(error) in (412, 416):
                raise changed(shard, start, end) from None
            raise
    return bytes(received)


def _receive(shard: ShardInfo, start: int, end: int, received: bytearray) -> None:
    """One request for the part of [start, end) not yet in `received`; appends what arrives, even if it then fails."""
    from fsspec.asyn import sync

    system, path = single_try_filesystem(shard.url)
    at = start + len(received)
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    if "s3" in protocols:
        sync(system.loop, _receive_s3, system, path, shard, at, end, received)
    elif "http" in protocols:
        sync(system.loop, _receive_http, system, path, at, end, received)
    else:
        received += system.cat_file(path, start=at, end=end)


async def _receive_s3(system: Any, path: str, shard: ShardInfo, start: int, end: int, received: bytearray) -> None:
    bucket, key, version = system.split_path(path)
    options = {"VersionId": version} if version else {}
    if shard.stamp.startswith('"'):  # an etag: a rewritten shard must not be mixed with the old one
        options["IfMatch"] = shard.stamp
    answer = await system._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **options)
    body = answer["Body"]
    try:
        _check_range("ContentRange" in answer, shard.url)
        while chunk := await body.read(_CHUNK):
            received += chunk
    finally:
        body.close()


async def _receive_http(system: Any, path: str, start: int, end: int, received: bytearray) -> None:
    options = dict(system.kwargs)
    options["headers"] = {**options.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    session = await system.set_session()
    async with session.get(system.encode_url(path), **options) as answer:
        if answer.status in (401, 403):
            raise PermissionError
        system._raise_not_found_for_status(answer, path)
        _check_range(answer.status == 206, path)
        async for chunk in answer.content.iter_chunked(_CHUNK):
            received += chunk


def _check_range(is_range: bool, url: str) -> None:
    if not is_range:
        raise DataError(
            f"{shown_url(url)}: the server does not support range requests; copy the shards to another server"
        )


@contextmanager
def open_shard(shard: ShardInfo, read: Reader = read_range) -> Iterator[BinaryIO]:
    """The shard as a seekable file; a remote one is read in large ranges through `read`. At the end raises ShardChanged
    if it is not the listed version."""
    with readable_errors(shard.url):
        if is_local(shard.url):
            with open(_local_path(shard.url), "rb") as file:
                yield file
                _check_times(file, shard)
            return
        if is_remote(shard.url):
            yield cast(BinaryIO, io.BufferedReader(_Ranges(shard, read), _AHEAD))
            return
        system, path = filesystem(shard.url)
        with system.open(path, "rb") as file:
            yield cast(BinaryIO, file)


class _Ranges(io.RawIOBase):
    """A shard as an unbuffered file."""

    def __init__(self, shard: ShardInfo, read: Reader) -> None:
        self._shard, self._read, self._position = shard, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shard.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._shard.size)
        if end <= self._position:
            return 0
        data = self._read(self._shard, self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)


def _read_local(shard: ShardInfo, start: int, end: int) -> bytes:
    file = _kept_open(shard)
    data = os.pread(file.fileno(), end - start, start)
    _check_times(file, shard)  # after reading: what was written before it has changed the times
    return data


def _check_times(file: BinaryIO | io.FileIO, shard: ShardInfo) -> None:
    """Raises ShardChanged if an open file is not the listed version of a shard, or no longer."""
    if shard.stamp and version_of(os.fstat(file.fileno())) != shard.stamp:
        raise changed(shard, 0, shard.size)


@lru_cache(maxsize=64)  # an evicted file is closed
def _kept_open(shard: ShardInfo) -> io.FileIO:
    return io.FileIO(_local_path(shard.url))


def _local_path(url: str) -> str:
    return url.removeprefix("file://").removeprefix("local://")


@contextmanager
def readable_errors(url: str) -> Iterator[None]:
    """Turns a file system's errors into a DataError that names the place and the remedy."""
    name = shown_url(url)
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        failure = failure_at(url, error)
        if failure is None:
            raise
        raise DataError(_sentence(failure, error, name, "://" in url)) from None


def _sentence(failure: Failure, error: Exception, name: str, remote: bool) -> str:
    """The error message for a failed read, with the remedy."""
    if failure == "missing":
        return f"{name}: not found; check the {'bucket and the name' if remote else 'path'}"
    if failure == "denied":
        remedy = "check that the credentials in use may read it" if remote else "check the file's permissions"
        return f"{name}: access refused; {remedy}"
    if settings := settings_remedy(failure):
        return f"{name}: {settings}"
    if failure == "credentials":
        return (
            f"{name}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE "
            f"(and AWS_ENDPOINT_URL for a store that is not Amazon's)"
        )
    if failure == "unsupported":
        return f"cannot open {name}: {type(error).__name__}; check the protocol, or install its fsspec package"
    return f"cannot read {name}: {reason(error)}; check that the store is reachable and try again"
