"""Sidecar files of shards: indexes and summaries in a folder `.treering` next to the shards, on a disk or in a bucket.

Anyone who can write there can also write shards, so sidecars are checked like shards and trusted no more than they are:
a file that does not fit its shard is ignored. Writing is optional: only `treering data index --beside` does it, never
a run.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from ..storage.files import SIDECAR_FOLDER, ShardInfo, is_remote, read_range, readable_errors, shown_url
from ..storage.filesystems import filesystem
from ..storage.find import find
from ..storage.retries import retry
from .index import cached_at, fits
from .table_file import DamagedTable, Table, write_cache_file

_LARGEST = 1 << 30  # bytes of an index


def fetch_index(shard: ShardInfo) -> bytes | None:
    """The bytes of a shard's sidecar index; None if there is none for this version of the shard."""
    data = fetch_sidecar(_index_url(shard))
    if data is None:
        return None
    try:
        return data if fits(Table.parse(data), shard) else None
    except DamagedTable:
        return None


def put_index(shard: ShardInfo) -> None:
    """Writes the cached index as a sidecar of the shard, unless a fitting one is there. Raises DataError."""
    if fetch_index(shard) is None:
        put(_index_url(shard), cached_at(shard).read_bytes())


def fetch_sidecar(url: str) -> bytes | None:
    """The bytes of a file in a `.treering` folder; None if it is missing or unreadable."""
    if "?" in url:  # a signed URL is valid for its own file only
        return None
    try:
        (found,) = find(url)
        return read_range(found, 0, found.size) if found.size <= _LARGEST else None
    except DataError:
        return None


def put(url: str, data: bytes) -> None:
    """Writes a file of a `.treering` folder atomically. Raises DataError."""
    with readable_errors(url):
        if not is_remote(url):
            path = Path(url.removeprefix("file://").removeprefix("local://"))
            try:
                path.parent.mkdir(exist_ok=True)
                write_cache_file(path, data)
            except (OSError, DataError) as error:
                what = error.strerror if isinstance(error, OSError) else "no space or no permission"
                raise DataError(
                    f"cannot write {shown_url(url)}: {what}; check the folder, or run without --beside"
                ) from None
            return
        system, path_ = filesystem(url)
        retry(shown_url(url), lambda: system.pipe_file(path_, data))


def _index_url(shard: ShardInfo) -> str:
    folder, _, name = shard.url.rpartition("/")
    return f"{folder}/{SIDECAR_FOLDER}/{name}.index"
