"""Lists the shards behind a URL, and indexes a shard.

The index of a shard (index.py) is built by one walk over the tar's headers, which also reads the metadata of each
sample. Members are grouped by WebDataset's rule: the key is the path up to the first dot of its last part, the kind is
the rest in lower case.

Names in a tar are untrusted: they are only used as dictionary keys.
"""

from __future__ import annotations

import re
from math import prod
from typing import BinaryIO

from braceexpand import braceexpand

from ..errors import DataError, shown
from ..storage.credentials import holds_secret
from ..storage.files import Reader, ShardInfo, changed, listed_again, read_range, shown_url
from ..storage.find import find_all
from ..storage.gzip_cache import open_content
from ..storage.names import refuse_other_syntax, split_braces
from .account import HIDDEN, NO_EXTENSION, OTHER, PICTURES, SAMPLES, TWICE, UNDERSCORED, UNREAD, Account
from .columns import LONGEST_JSON, Collector
from .content import ContentDigest
from .index import IMAGE_KINDS as IMAGE_KINDS
from .index import READ_KINDS, Samples, cached_at, fits, index_bytes
from .index import ShardIndex as ShardIndex
from .index import is_usable as is_usable
from .index_check import check_index
from .sidecar import fetch_index
from .table_file import DamagedTable, Table, write_cache_file
from .tar_reader import DamagedShard, TarMember, tar_members

_MOST_SHARDS = 10_000_000
_NUMBER = r"(-?\d{1,4300})"  # Python's limit for parsing integers
_RANGE = re.compile(rf"{_NUMBER}\.\.{_NUMBER}(?:\.\.-?(\d{{1,4300}}))?")


def list_shards(url: str) -> list[ShardInfo]:
    """The shards behind a URL, sorted. Braces are ranges {000..012} or lists {a,b}; *, ? and [] are globs. What
    exists under exactly this name is that name.

    Raises DataError if nothing matches, or a shard named without a glob is missing.
    """
    if holds_secret(url):
        raise DataError(
            f"{shown_url(url)}: the URL holds a user or a secret, which would get into indexes, ledgers and logs; give "
            "credentials by environment variables or a credentials file"
        )
    refuse_other_syntax(url)
    literal, rest = split_braces(url)
    found = {shard.url: shard for shard in find_all([literal + each for each in expand_braces(rest)])}
    return [found[name] for name in sorted(found)]


def expand_braces(url: str) -> list[str]:
    """`a{08..10}b{x,y}` -> a08bx, a08by, a09bx, ...: braces as in bash and WebDataset, nested ones and steps included.

    Raises DataError for a range that runs backwards, unbalanced braces, or more than ten million names.
    """
    for braces in re.findall(r"\{([^{}]*)\}", url):
        numbers = _RANGE.fullmatch(braces)
        if numbers and int(numbers[1]) > int(numbers[2]):
            right = f"{{{numbers[2]}..{numbers[1]}}}"
            raise DataError(f"{shown_url(url)}: the range {{{braces}}} runs backwards; write {right}")
    count = _names(url)
    if count > _MOST_SHARDS:
        raise DataError(
            f"{shown_url(url)} names {count:,} shards; at most {_MOST_SHARDS:,} are allowed, check the ranges"
        )
    try:
        return list(braceexpand(url, escape=False))
    except ValueError:  # UnbalancedBracesError, or a number too long for Python
        raise DataError(
            f"{shown_url(url)}: the braces are not balanced; write a range as {{000..012}}, a list as {{a,b}}"
        ) from None


def _names(url: str) -> int:
    """The number of names that a URL with braces expands to, computed without expanding it: from the innermost braces
    outwards, each is replaced by its count."""

    def product(text: str) -> int:
        return prod(int(count) for count in re.findall("\0([0-9]+)\0", text))

    def counted(braces: re.Match[str]) -> str:
        numbers = _RANGE.fullmatch(braces[1])
        if numbers:
            count = (int(numbers[2]) - int(numbers[1])) // (int(numbers[3] or 1) or 1) + 1
        else:
            count = sum(product(each) for each in braces[1].split(","))
        return f"\0{count}\0"

    left, found = url.replace("\0", ""), 1
    while found:
        left, found = re.subn(r"\{([^{}]*)\}", counted, left)
    return product(left)


def index_shard(shard: ShardInfo, read: Reader = read_range, anew: bool = False) -> ShardIndex:
    """The index of a shard: from the cache folder, from its sidecar, or built from the shard through `read` and cached.

    With `anew`, or if its stamp could be that of another version, it is built whatever there is. Raises DamagedShard if
    the shard is damaged, DataError if it cannot be read."""
    return ShardIndex.of(shard, index_table(shard, read, anew or not shard.is_dated))


def index_table(shard: ShardInfo, read: Reader = read_range, anew: bool = False, digest: str | None = None) -> Table:
    """Like `index_shard`, but returns the index as a table; with `digest` only an index of these samples is used.

    Raises ShardChanged if the shard itself has other samples."""
    cached = cached_at(shard)
    if not anew:
        try:
            table = Table.open(cached)
            if fits(table, shard) and digest in (None, table.header["digest"]):
                return table
        except (OSError, DamagedTable):  # none yet, or damaged: rebuild it
            pass
    data = None if anew else _beside(shard, read, digest)
    if data is None:
        data, faults = _walked(shard, read)
        if faults:
            raise faults[0]
    write_cache_file(cached, data)
    table = Table.open(cached)
    if digest not in (None, table.header["digest"]):
        raise changed(shard, 0, shard.size)
    return table


def _beside(shard: ShardInfo, read: Reader, digest: str | None) -> bytes | None:
    """The bytes of the index beside a shard; None if there is none of this version, or of these samples."""
    data = fetch_index(shard)
    try:
        table = None if data is None else Table.parse(data)
        if table is None or digest not in (None, table.header["digest"]):
            return None
        check_index(table, shard, read, split_name)
        return data
    except DamagedTable:
        return None


def walk(shard: ShardInfo, read: Reader = read_range) -> tuple[ShardIndex, list[str]]:
    """The index from a walk over the shard's headers, up to the first damage, and all faults found in the shard."""
    data, faults = _walked(shard, read)
    return ShardIndex.of(shard, Table.parse(data)), [str(fault) for fault in faults]


def _walked(shard: ShardInfo, read: Reader) -> tuple[bytes, list[DataError]]:
    """The bytes of a shard's index, up to the first damage, and all faults found in the shard."""
    samples: Samples = {}
    rows: dict[str, int] = {}
    columns, account, digest = Collector(), Account(), ContentDigest()
    faults: list[DataError] = []
    content, reached = shard.size, 0
    try:
        with open_content(shard, read) as (file, tar):
            content = tar.size
            for member in tar_members(file, tar):
                size, reached = member.end - reached, member.end
                key, kind = split_name(member.name)
                if member.other or kind is None:
                    account.add(*_no_sample(member, file), size, member.name)
                    continue
                members = samples.setdefault(key, {})
                rows.setdefault(key, len(rows))
                clash = next((k for k in members if k == kind or {k, kind} <= set(IMAGE_KINDS)), None)
                if clash is not None:
                    account.add(TWICE, 1, size, member.name)
                    faults.append(_two_members(shard, key, clash, kind, member.offset))
                    continue
                account.add(SAMPLES if kind in READ_KINDS else OTHER, 1, size)
                members[kind] = (member.offset, member.size)
                if kind == "json" and member.size <= LONGEST_JSON:
                    file.seek(member.offset)
                    columns.add(rows[key], file.read(member.size))
                digest.add(file, member.name, member.offset, member.size)
    except DataError as error:
        faults.append(_changed_meanwhile(shard) or error)
        account.add(UNREAD, 0, content - reached)
        if samples and not is_usable(samples[last := next(reversed(samples))]):
            del samples[last]  # its other members lie beyond the damage
    return index_bytes(shard, content, samples, columns, account, digest.hex()), faults


def _no_sample(member: TarMember, file: BinaryIO) -> tuple[str, int]:
    """The heading for what belongs to no sample, and the number of members that it counts for."""
    if member.other:
        return member.other, int(bool(member.name))
    file.seek(member.offset)
    if is_picture(file.read(min(member.size, 16))):
        return PICTURES, 1
    last = member.name.rpartition("/")[2]
    return UNDERSCORED if last.startswith("__") else HIDDEN if last.startswith(".") else NO_EXTENSION, 1


def is_picture(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a JPEG, PNG or WebP."""
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _two_members(shard: ShardInfo, key: str, one: str, other: str, offset: int) -> DamagedShard:
    return DamagedShard(
        f"{shown_url(shard.url)} holds two members for key {shown(key)}: {shown(one)} and {shown(other)}, "
        f"at byte {offset}; rename one of them and repack the shard",
        offset,
    )


def _changed_meanwhile(shard: ShardInfo) -> DataError | None:
    """The error if a shard looks damaged because it was replaced since it was listed; None if it was not."""
    try:
        same = "://" in shard.url or listed_again(shard) == shard
    except DataError:
        return None
    return None if same else changed(shard, 0, shard.size)


def split_name(name: str) -> tuple[str, str | None]:
    """WebDataset's rule: `a/b.c.TXT` -> key `a/b`, kind `c.txt`; `a/.txt` -> key `a/`, kind `txt`. Kind None: the
    member is not part of a sample, as `__x__` at the top level, or a hidden file."""
    folder, slash, last = name.rpartition("/")
    stem, dot, kind = last.partition(".")
    kind = kind.lower()
    underscored = not slash and name.startswith("__") and name.endswith("__")
    nameless = not stem and not (slash and kind in READ_KINDS)
    if not dot or underscored or nameless:
        return name, None
    return folder + slash + stem, kind
