"""What is known about shards, kept beside them: in a folder `.treering` where they lie, be it on a disk or in a bucket.

Whoever can write there can write shards, so what is found is checked like a shard and no more is believed of it: a file
that does not fit its shard is passed over, as if there were none. Writing is optional and never done by a run: only
`treering data index --beside` does.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from ..storage.files import BESIDE, ShardInfo, filesystem, find, is_remote, read_range, readable_errors, shown_url
from ..storage.retries import persist
from .index import cached_at, fits
from .table_file import DamagedTable, Table, write_whole

_LARGEST = 1 << 30  # bytes of an index


def fetch_index(shard: ShardInfo) -> bytes | None:
    """The index that lies beside a shard, if it is one of this version of it."""
    data = fetch_sidecar(_index_url(shard))
    if data is None:
        return None
    try:
        return data if fits(Table.parse(data), shard) else None
    except DamagedTable:
        return None


def put_index(shard: ShardInfo) -> None:
    """Puts the index in the cache folder beside the shard, if none is there that fits. Raises DataError."""
    if fetch_index(shard) is None:
        put(_index_url(shard), cached_at(shard).read_bytes())


def fetch_sidecar(url: str) -> bytes | None:
    """A small file of a folder `.treering`; None if there is none, or it cannot be read."""
    if "?" in url:  # a signed URL is good for its own file alone
        return None
    try:
        (found,) = find(url)
        return read_range(found, 0, found.size) if found.size <= _LARGEST else None
    except DataError:
        return None


def put(url: str, data: bytes) -> None:
    """Writes a file of a folder `.treering`, all of it or nothing. Raises DataError."""
    with readable_errors(url):
        if not is_remote(url):
            path = Path(url.removeprefix("file://").removeprefix("local://"))
            try:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, data)
            except (OSError, DataError) as error:
                what = error.strerror if isinstance(error, OSError) else "no space or no permission"
                raise DataError(
                    f"cannot write {shown_url(url)}: {what}; check the folder, or do without --beside"
                ) from None
            return
        system, path_ = filesystem(url)
        persist(shown_url(url), lambda: system.pipe_file(path_, data))


def _index_url(shard: ShardInfo) -> str:
    folder, _, name = shard.url.rpartition("/")
    return f"{folder}/{BESIDE}/{name}.index"
