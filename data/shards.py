"""Tar shards: from a URL to the list of shards, and from a shard to its index.

The index of a shard says where each sample's members lie (offset and size in bytes), so that any sample can be read
by one ranged read, from a local path or a store. It is made by one walk over the tar's headers and kept in the cache
folder under a name that changes with the shard. Members are grouped by WebDataset's rule: the key is the path up to
the first dot of its last part, the kind is the rest in lower case.

Names in a tar are hostile until shown otherwise: they are only ever dictionary keys.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import BinaryIO

from .config import DataError
from .files import Reader, ShardInfo, cache_folder, find, open_shard, read_range, shown_url
from .ledger import shown

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
_INDEX_FORMAT = 1
_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # bytes of an extended header (a long name); more is an attack or damage
_PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_NEVER_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the samples of one shard lie: samples[i] = {kind: (offset, size)} in bytes, for the key keys[i]."""

    shard: ShardInfo
    keys: list[str]
    samples: list[dict[str, tuple[int, int]]]

    @property
    def url(self) -> str:
        """Where the shard lies."""
        return self.shard.url

    @property
    def size(self) -> int:
        """Bytes of the shard."""
        return self.shard.size


def expand(url: str) -> list[ShardInfo]:
    """The shards a URL stands for, sorted. Braces are ranges {000..012} or lists {a,b}; *, ? and [] are globs.

    Raises DataError where nothing matches, or a shard named without a glob is missing.
    """
    found: dict[str, ShardInfo] = {}
    for part in expand_braces(url):
        for shard in find(part):
            found[shard.url] = shard
    return [found[name] for name in sorted(found)]


def expand_braces(url: str) -> list[str]:
    """`a{08..10}b{x,y}` -> a08bx, a08by, a09bx, ...; a range keeps the width of its first number."""
    parts = re.split(r"\{([^{}]*)\}", url)
    choices = []
    for i, part in enumerate(parts):
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        if numbers:
            first, last = numbers.groups()
            if int(first) > int(last):
                raise DataError(f"{shown_url(url)}: the range {{{part}}} runs backwards; write {{{last}..{first}}}")
            choices.append([f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    return ["".join(combination) for combination in product(*choices)]


def index_shard(shard: ShardInfo, read: Reader = read_range) -> ShardIndex:
    """The index of a shard, from the cache folder if it is there, else from the shard through `read`. Raises DataError
    if the shard is damaged."""
    name = sha256(json.dumps([_INDEX_FORMAT, *asdict(shard).values()]).encode()).hexdigest()
    cached = cache_folder("index") / f"{name}.json"
    try:
        stored = json.loads(cached.read_text(encoding="ascii"))
        samples = [{kind: (offset, size) for kind, (offset, size) in sample.items()} for sample in stored["samples"]]
        return ShardIndex(shard, stored["keys"], samples)
    except (OSError, ValueError, KeyError):  # none yet, or damaged: made anew
        pass
    index, faults = walk(shard, read)
    if faults:
        raise DataError(faults[0])
    write_whole(cached, json.dumps({"keys": index.keys, "samples": index.samples}))
    return index


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that no reader, of any process, ever sees a part of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="ascii")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {path}: {error.strerror}; free some space or set TREERING_CACHE to another folder"
        ) from None


def walk(shard: ShardInfo, read: Reader = read_range) -> tuple[ShardIndex, list[str]]:
    """What a walk over the shard's headers finds, as far as it gets, and everything that is wrong with the shard."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    faults = []
    try:
        with open_shard(shard, read) as file:
            for name, offset, size in tar_members(file, shard):
                key, kind = split_name(name)
                if kind is None:
                    continue
                members = samples.setdefault(key, {})
                clash = next((k for k in members if k == kind or {k, kind} <= set(IMAGE_KINDS)), None)
                if clash is None:
                    members[kind] = (offset, size)
                    continue
                faults.append(
                    f"{shown_url(shard.url)} holds two members for key {shown(key)}: {shown(clash)} and {shown(kind)}; "
                    f"rename one of them and pack the shard again"
                )
    except DataError as error:
        faults.append(str(error))
        if samples and not is_usable(samples[last := next(reversed(samples))]):
            del samples[last]  # the rest of it lies beyond the damage
    return ShardIndex(shard, list(samples), list(samples.values())), faults


def is_usable(sample: dict[str, tuple[int, int]]) -> bool:
    """Whether a sample has a picture and something that may hold a caption."""
    return any(kind in sample for kind in IMAGE_KINDS) and ("txt" in sample or "json" in sample)


def split_name(name: str) -> tuple[str, str | None]:
    """WebDataset's rule: `a/b.c.TXT` -> key `a/b`, kind `c.txt`. Kind None: the member belongs to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    if not stem or not dot or (not slash and name.startswith("__")):
        return name, None
    return folder + slash + stem, kind.lower()


def tar_members(file: BinaryIO, shard: ShardInfo) -> Iterator[tuple[str, int, int]]:
    """Name, data offset and size of every plain file in a tar, by its headers alone.

    Stricter than `tarfile`: data past the end of the file, a missing end-of-archive block and a header that is not one
    are DataErrors, for a shard that was cut short must not pass as a smaller shard.
    """
    position, name, size_override = 0, None, None
    while True:
        header = _header(file, position, shard)
        if header is None:
            return
        data = position + _BLOCK
        size = header.size if size_override is None else size_override
        if header.type in _NEVER_DATA:
            size = 0
        if not 0 <= size <= shard.size - data:  # a negative one would lead round in circles
            raise _cut_short(shard) if size > 0 else _damaged(shard, data - _BLOCK, "negative size")
        position = data + -(-size // _BLOCK) * _BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(_extended(file, size, shard).split(b"\0")[0])
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            fields = _pax_fields(_extended(file, size, shard), shard)
            name = _text(fields["path"]) if "path" in fields else name
            size_override = int(fields["size"]) if fields.get("size", b"").isdigit() else None
        elif header.type == tarfile.GNUTYPE_SPARSE:
            raise DataError(f"{shown_url(shard.url)} holds a sparse file; pack the shard again without --sparse")
        elif header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if header.type in _PLAIN_FILES:
                yield header.name if name is None else name, data, size
            name, size_override = None, None


def _header(file: BinaryIO, position: int, shard: ShardInfo) -> tarfile.TarInfo | None:
    file.seek(position)
    block = file.read(_BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if len(block) < _BLOCK and (position or len(block) == 0):
            raise _cut_short(shard) from None
        if block.count(0) == _BLOCK:  # the end-of-archive mark
            return None
        if position == 0:
            remedy = "unpack it with gunzip" if block.startswith(b"\x1f\x8b") else "name tar files"
            raise DataError(f"{shown_url(shard.url)} is not a tar file; {remedy}") from None
        raise _damaged(shard, position, str(error)) from None


def _damaged(shard: ShardInfo, position: int, what: str) -> DataError:
    return DataError(f"{shown_url(shard.url)} is damaged at byte {position} ({what}); copy it again or leave it out")


def _cut_short(shard: ShardInfo) -> DataError:
    return DataError(
        f"{shown_url(shard.url)} is cut short: it ends after {shard.size:,} bytes in mid-archive; "
        f"copy it again or leave it out"
    )


def _extended(file: BinaryIO, size: int, shard: ShardInfo) -> bytes:
    if size > _LONGEST_HEADER:
        raise DataError(
            f"{shown_url(shard.url)} holds a header of {size:,} bytes; it is damaged or hostile, leave it out"
        )
    return file.read(size)


def _pax_fields(block: bytes, shard: ShardInfo) -> dict[str, bytes]:
    """Records `LENGTH key=value\\n` of a pax extended header (POSIX.1-2001)."""
    fields = {}
    while block:
        digits, _, _ = block.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = block[len(digits) + 1 : length - 1].partition(b"=")
        if not len(digits) + 1 < length <= len(block) or not equals:
            raise DataError(f"{shown_url(shard.url)} holds a damaged extended header; copy it again or leave it out")
        fields[_text(key)] = value
        block = block[length:]
        if not block.strip(b"\0"):
            break
    return fields


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
