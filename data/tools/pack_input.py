"""The input of packing: a folder of pictures and captions, a table of them, or shards to repack.

Each becomes a list of items whose order depends only on the input, so that every process and machine that packs a part
of it has the same list. An item knows its key and the sizes of its members; its bytes are read when it is written.
Names are untrusted: a path may not leave its folder, and a key that could do so is a bad sample (`check_key`).
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import BadSample, DataError, shown
from ..shards.listing import IMAGE_KINDS, split_name
from ..shards.parallel import Progress, index_all, silent
from ..shards.source import read_members, shards_of
from ..storage.files import ShardInfo, shown_url
from ..storage.gzip_cache import Unpacked
from .input_table import InputTable, Row, RowTally

_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LONGEST_KEY = 1024  # bytes


@dataclass(frozen=True, slots=True)
class FileItem:
    """A picture file with its captions. `where` describes the file or line it came from, for messages."""

    key: str
    picture: str
    size: int  # bytes of the picture
    txt: bytes
    json: bytes
    captions: int
    where: str

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each member."""
        return {self.kind: self.size, **{kind: len(text) for kind, text in self._texts.items()}}

    @property
    def kind(self) -> str:
        """The picture's kind: its lower-case extension."""
        return os.path.splitext(self.picture)[1][1:].lower()

    def members(self) -> dict[str, bytes]:
        """The bytes of each member, by kind."""
        return {self.kind: Path(self.picture).read_bytes(), **self._texts}

    @property
    def _texts(self) -> dict[str, bytes]:
        """The .txt, which a picture with labels alone does not have, and the .json."""
        return {"txt": self.txt, "json": self.json} if self.txt else {"json": self.json}


@dataclass(frozen=True, slots=True)
class ShardItem:
    """A sample of a shard, with all its members unchanged."""

    key: str
    own_key: str  # in its shard
    shard: ShardInfo
    places: dict[str, tuple[int, int]]  # offset and size by kind

    @property
    def where(self) -> str:
        """Its location, for messages."""
        return f"{shown_url(self.shard.url)} at byte {min((offset for offset, _ in self.places.values()), default=0)}"

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each member."""
        return {kind: size for kind, (_, size) in self.places.items()}

    def members(self) -> dict[str, bytes]:
        """The bytes of each member, by kind; one read if the members are close together."""
        return read_members(_read, self.shard, self.own_key, self.places)


_read = Unpacked().read  # also of .tar.gz
Item = FileItem | ShardItem


def items_of(
    input: str, images: Path | None, workers: int = 1, progress: Progress = silent, tally: RowTally | None = None
) -> list[Item]:
    """The items of a folder, a table (.tsv, .csv, .jsonl; paths relative to `images`, else to the table's folder), or
    a URL of shards (indexed by `workers` processes; `progress(done, total)` counts shards). Raises DataError; with a
    `tally`, rows of a table that cannot be used are skipped and listed in it."""
    path = Path(input)
    items: list[Item]
    if path.is_dir():
        items = [*folder_items(path)]
    elif names_shards(input):
        items = [*shard_items(input, workers, progress)]
    elif path.exists():
        items = [*table_items(path, images or path.parent, tally)]
    else:
        raise DataError(
            f"{shown_url(input)}: not found; name a .tsv, .csv or .jsonl table, a folder of key.jpg and "
            f"key.txt, or shards"
        )
    _refuse_equal_keys(items)
    return items


def names_shards(input: str) -> bool:
    """Whether `input` is a URL of shards and not a folder or table."""
    is_pattern = set("*?[{") & set(input) and not Path(input).exists()
    return bool(input.lower().endswith((".tar", ".tar.gz", ".tgz")) or "://" in input or is_pattern)


def check_key(key: str, kinds: Iterable[str]) -> None:
    """Raises BadSample for a name that could do harm when a shard is unpacked, or that readers would not find."""
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\\" in key:
        raise BadSample(f"key is unsafe: {shown(key)} is not a path inside a folder")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in key):
        raise BadSample(f"key is unsafe: {shown(key)} holds control characters or is not Unicode")
    if len(key.encode("utf-8")) > _LONGEST_KEY:
        raise BadSample(f"key is unsafe: {shown(key)} is longer than {_LONGEST_KEY:,} bytes")
    for kind in kinds:
        if not _KIND.fullmatch(kind) or split_name(f"{key}.{kind}") != (key, kind):
            raise BadSample(f"key is unsafe: readers would not find {shown(f'{key}.{kind}')}")


# Shards


def shard_items(url: str, workers: int, progress: Progress) -> Iterator[ShardItem]:
    """The samples of shards, in the order of shards and offsets. A key used in several shards is prefixed with the
    number of its shard (`00003/key`), since keys must be unique within a source."""
    indexes = []
    for shard, index in index_all(shards_of(url), workers, progress):
        if isinstance(index, DataError):
            raise index
        indexes.append((shard, index))
    seen: set[str] = set()
    several = {key for _, index in indexes for key in index.keys if key in seen or seen.add(key)}  # type: ignore[func-returns-value]
    if not seen:
        raise DataError(f"{shown_url(url)} is empty: its shards hold no samples; check how they were written")
    for number, (shard, index) in enumerate(indexes):
        for key, places in zip(index.keys, index.samples, strict=True):
            yield ShardItem(f"{number:05d}/{key}" if key in several else key, key, shard, places)


# Folders


def folder_items(folder: Path) -> Iterator[FileItem]:
    """The pictures of a folder of key.jpg with key.txt, key.json or both, sorted by name."""
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*")):
        kind = path.suffix[1:].lower()
        if kind not in (*IMAGE_KINDS, "txt", "json") or path.name.startswith(".") or not path.is_file():
            continue
        members = files.setdefault(path.relative_to(folder).with_suffix("").as_posix(), {})
        other = next((k for k in members if k == kind or {k, kind} <= set(IMAGE_KINDS)), None)
        if other:
            name = path.relative_to(folder).with_suffix("").as_posix()
            raise DataError(f"{path} and {members[other]} are two files for one key, {shown(name)}; rename one")
        members[kind] = path
    if not files:
        tars = next(folder.glob("*.tar"), None)
        remedy = f"name its shards as {folder}/*.tar" if tars else "it must hold key.jpg (or .png, .webp) and key.txt"
        raise DataError(f"{folder} is empty: {remedy} files" if not tars else f"{folder} holds shards: {remedy}")
    for name, members in files.items():
        yield _folder_item(name, members)


def _folder_item(name: str, members: dict[str, Path]) -> FileItem:
    picture = next((members[kind] for kind in IMAGE_KINDS if kind in members), None)
    if picture is None:
        raise DataError(
            f"{next(iter(members.values()))}: no picture with that name in the folder; add one or remove the file"
        )
    texts = {kind: members[kind] for kind in ("txt", "json") if kind in members}
    where = " and ".join(str(path) for path in texts.values()) or f"{picture}"
    return _item(name, picture, {kind: path.read_bytes() for kind, path in texts.items()}, where, str(picture))


def _item(name: str, picture: Path, texts: dict[str, bytes], where: str, picture_where: str) -> FileItem:
    """The item of a picture and its .txt or .json or both, which are parsed as in training. Raises DataError."""
    from ..samples.captions import read_texts

    try:
        found = read_texts(texts, bare=True)
        metadata = dict(found.whole_metadata())
    except BadSample as error:
        raise DataError(f"{where}: {error}; fix it or remove the key") from None
    captions = tuple(dict.fromkeys(caption.text for caption in found.captions))
    metadata.setdefault("captions", list(captions))
    encoded = json.dumps(metadata, sort_keys=True).encode()
    size = picture.stat().st_size
    return FileItem(
        name.replace(".", "_"),
        str(picture),
        size,
        "".join(captions[:1]).encode(),
        encoded,
        len(captions),
        picture_where,
    )


def _refuse_equal_keys(items: Iterable[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(item.key, item)
        if other is not item:
            one, two = (each.picture if isinstance(each, FileItem) else each.where for each in (other, item))
            raise DataError(f"{one} and {two} are two files for one key, {shown(item.key)}; rename one")


# Tables


def table_items(path: Path, images: Path, tally: RowTally | None = None) -> Iterator[FileItem]:
    """The pictures of a table, in the order of their first lines; more lines for a picture add captions.

    Raises DataError for the rows that cannot be used; with a `tally` they are skipped and listed in it."""
    table, folder, count = InputTable(path), PictureFolder(images), tally or RowTally()
    rows: dict[Path, list[Row]] = {}
    for row in table.rows(count):
        try:
            picture = folder.file(row.path, f"{path}, line {row.line}")
            _check_captions(row, f"{path}, line {row.line}")
        except DataError as error:
            count.refused.append(str(error))
        else:
            rows.setdefault(picture, []).append(row)
    items = []
    for picture, own in rows.items():
        try:
            items.append(_table_item(path, folder, picture, own))
            count.used += len(own)
        except DataError as error:
            count.refused += [str(error), *(f"{path}, line {row.line}: see line {own[0].line}" for row in own[1:])]
    if tally is None:
        count.check(path)
    if not items:
        raise DataError(f"{path} is empty: each line must hold a picture's path and a caption")
    yield from items


def _check_captions(row: Row, where: str) -> None:
    """Raises DataError if a caption of a row cannot be used, which its other captions would hide."""
    from ..samples.captions import read_texts

    try:
        faults = read_texts({"json": json.dumps({"captions": row.captions}).encode()}).faults if row.captions else ()
    except BadSample as error:
        faults = (str(error),)
    if faults:
        raise DataError(f"{where}: {faults[0]}; fix it or remove the line")


def _table_item(path: Path, folder: PictureFolder, picture: Path, rows: Sequence[Row]) -> FileItem:
    captions: list[Any] = []
    for caption in (each for row in rows for each in row.captions):
        if caption not in captions:
            captions.append(caption)
    metadata = json.dumps({**rows[0].columns, "captions": captions}).encode()
    name = picture.relative_to(folder.root).with_suffix("").as_posix()
    where = f"{path}, line {rows[0].line}"
    return _item(name, picture, {"json": metadata}, where, where)


class PictureFolder:
    """The folder of a table's pictures; paths may not leave it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def root(self) -> Path:
        return self.path.resolve()

    def file(self, path: str, where: str) -> Path:
        """The file at `path`, after checking that it is inside the folder and exists. Raises DataError."""
        if "\0" in path or len(path) > 4096:
            raise DataError(f"{where}: {shown(path)} is not a valid path; name a picture in {self.path}")
        try:
            full = (self.root / path).resolve()
            found = full.is_file()
        except (OSError, UnicodeEncodeError):  # a component too long, or half of a surrogate pair
            raise DataError(f"{where}: {shown(path)} is not a valid path; name a picture in {self.path}") from None
        if not full.is_relative_to(self.root):
            raise DataError(
                f"{where}: {shown(path)} lies outside {self.path}; name the folder of the pictures, or move the file "
                f"there"
            )
        if not found:
            raise DataError(f"{where}: the picture {shown(path)} is missing from {self.path}")
        if full.suffix[1:].lower() not in IMAGE_KINDS:
            raise DataError(f"{where}: {shown(path)} is not .{', .'.join(IMAGE_KINDS)}; convert it")
        return full
