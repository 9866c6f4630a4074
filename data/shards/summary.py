"""The summary of a source: the facts about its shards that opening needs, in one file instead of one per shard.

It lists the shards by name, size and stamp, each with its number of samples, the number of usable ones, the bytes of
its tar, the digest of its samples and the counts of what belongs to no sample, or with its fault. Opening lists the
shards again and uses the summary for unchanged ones; only new ones are indexed. It is stored in the cache folder, and
next to the shards if `treering data index --beside` wrote it; names in it are relative to the folder of the source, so
that it stays valid under any name of that folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..storage.files import SIDECAR_FOLDER, ShardInfo, cache_folder, is_remote
from .account import HEADINGS, Account
from .content import DIGEST
from .index import FORMAT
from .sidecar import fetch_sidecar, put
from .table_file import DamagedTable, Table, packed_texts, smallest, table_bytes, write_cache_file


class ShardSummary(NamedTuple):
    """One shard: its number of samples, the number with picture and caption, the bytes of its tar, and the digest of
    its samples; or its fault and the byte where it was found."""

    shard: ShardInfo
    samples: int = 0
    usable: int = 0
    content: int = 0
    digest: str = ""
    fault: str = ""
    offset: int = 0
    skipped_members: Account | None = None  # None: all its members belong to samples


def read_summary(url: str, shards: Sequence[ShardInfo]) -> list[ShardSummary | None]:
    """The summary of each of the shards behind a URL; None for shards without one for their current version."""
    place = _Place(url)
    try:
        return _parsed(Table.open(place.cached), place.folder, shards)
    except (OSError, DamagedTable):
        pass
    data = fetch_sidecar(place.beside)
    try:
        rows = [None] * len(shards) if data is None else _parsed(Table.parse(data), place.folder, shards)
        return [None if row is None or row.fault else row for row in rows]  # a fault is believed where it was found
    except DamagedTable:
        return [None] * len(shards)


def write_summary(url: str, shards: Iterable[ShardSummary], beside: bool = False) -> None:
    """Writes a summary to the cache folder, or with `beside` next to the shards. Raises DataError."""
    place = _Place(url)
    data = _packed(list(shards), place.folder)
    if beside:
        put(place.beside, data)
    else:
        write_cache_file(place.cached, data)


def fingerprint(shards: Sequence[ShardSummary]) -> str:
    """A hash of the samples of a source: equal for equal samples in the same shards, wherever these are."""
    digest = sha256(str(FORMAT).encode())
    for each in shards:
        digest.update(f"{each.samples} {each.digest}\n".encode())
    return digest.hexdigest()


class _Place:
    """The locations of a URL's summary, and the folder that names in it are relative to."""

    def __init__(self, url: str) -> None:
        literal = re.split(r"[*?\[{]", url, maxsplit=1)[0]
        folder = literal.rpartition("/")[0]
        rest = url[len(folder) :].lstrip("/")
        if not is_remote(url) and "://" not in url:
            folder = os.path.abspath(os.path.expanduser(folder or "/" if url.startswith("/") else folder))
        self.folder = folder.rstrip("/")
        self.cached: Path = cache_folder("sources") / _hash(self.folder, rest)
        self.beside = f"{self.folder}/{SIDECAR_FOLDER}/{_hash(rest)[:16]}.source"


def _hash(*parts: str) -> str:
    return sha256("\0".join((str(FORMAT), *parts)).encode("utf-8", "surrogatepass")).hexdigest()


def _packed(shards: list[ShardSummary], folder: str) -> bytes:
    numbers = {
        "size": [each.shard.size for each in shards],
        "samples": [each.samples for each in shards],
        "usable": [each.usable for each in shards],
        "content": [each.content for each in shards],
    }
    names = [each.shard.url.removeprefix(f"{folder}/") for each in shards]
    faults = [[i, each.offset, each.fault] for i, each in enumerate(shards) if each.fault]
    for heading, name in enumerate(HEADINGS):
        counts = [each.skipped_members.counts.get(name) if each.skipped_members else None for each in shards]
        if any(counts):
            numbers[f"members.{heading}"] = [count.members if count else 0 for count in counts]
            numbers[f"bytes.{heading}"] = [count.bytes if count else 0 for count in counts]
    arrays = {name: smallest(np.array(values, np.int64)) for name, values in numbers.items()}
    digests = b"".join(bytes.fromhex(each.digest or "00" * DIGEST) for each in shards)
    arrays["digests"] = np.frombuffer(digests, np.uint8)
    arrays |= packed_texts("names", names) | packed_texts("stamps", [each.shard.stamp for each in shards])
    return table_bytes({"format": FORMAT, "faults": faults}, arrays)


def _parsed(table: Table, folder: str, shards: Sequence[ShardInfo]) -> list[ShardSummary | None]:
    """The entry of each shard in a summary, None without one. Raises DamagedTable."""
    try:
        if table.header["format"] != FORMAT:
            raise DamagedTable("it is of another version")
        names = [name if name[:1] == "/" or "://" in name else f"{folder}/{name}" for name in table.texts("names")]
        sizes, *numbers = (table.rows(name).tolist() for name in ("size", "samples", "usable", "content"))
        stamps, counts = table.texts("stamps"), list(zip(*numbers, strict=True))
        digests = table.rows("digests").tobytes().hex()
        faults = {int(i): (str(reason), int(offset)) for i, offset, reason in table.header["faults"]}
        others = _skipped_members(table, len(names))
    except (KeyError, TypeError, ValueError):
        raise DamagedTable("it is not a summary of a source") from None
    if not len(names) == len(sizes) == len(stamps) == len(counts) == len(digests) / (2 * DIGEST):
        raise DamagedTable("its lists differ in length")
    rows = {name: i for i, name in enumerate(names)}
    found: list[ShardSummary | None] = []
    for shard in shards:
        i = rows.get(shard.url, -1)
        if i < 0 or sizes[i] != shard.size or stamps[i] != shard.stamp or not shard.is_dated:
            found.append(None)
        elif i in faults:
            found.append(ShardSummary(shard, fault=faults[i][0], offset=faults[i][1]))
        else:
            samples, usable, content = counts[i]
            digest = digests[2 * DIGEST * i : 2 * DIGEST * (i + 1)]
            found.append(ShardSummary(shard, samples, usable, content, digest, skipped_members=others.get(i)))
    return found


def _skipped_members(table: Table, shards: int) -> dict[int, Account]:
    """What belongs to no sample, by the row of the shard. Raises ValueError if the lists do not fit."""
    found: dict[int, Account] = {}
    for heading, name in enumerate(HEADINGS):
        if f"members.{heading}" in table:
            members, sizes = table.rows(f"members.{heading}"), table.rows(f"bytes.{heading}")
            if not len(members) == len(sizes) == shards:
                raise ValueError
            for i in np.flatnonzero(sizes).tolist():
                found.setdefault(i, Account()).add(name, int(members[i]), int(sizes[i]))
    return found
    return found
