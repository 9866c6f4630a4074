"""Packing pictures and captions into WebDataset shards: NAME-000000.tar with key.jpg, key.txt and key.json.

Pictures keep their bytes; each is decoded once to see that it can be. The shards appear under their final name only
when all of them are whole: a refused input or a kill leaves nothing half-written. Equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from .config import DataError
from .files import filesystem, readable_errors, shown_url
from .ledger import BadSample, shown
from .shards import IMAGE_KINDS, split_name

_HEADERS = {"image", "path", "file", "filename", "filepath", "image_path", "image path", "picture", "key"}
Members = tuple[str, dict[str, bytes]]  # a sample's key, and its bytes by kind


@dataclass(frozen=True, slots=True)
class Packed:
    """What was written."""

    shards: tuple[str, ...]
    samples: int
    captions: int


@dataclass(frozen=True, slots=True)
class Item:
    """A picture to pack. `where` says, in words, which file or line it came from."""

    key: str
    picture: Path
    captions: tuple[str, ...]
    metadata: dict[str, object]
    where: str


def pack(input: Path, output: str, shard_size: int = 1000, images: Path | None = None) -> Packed:
    """Packs a table (.tsv or .csv: picture path, caption; several lines for a picture are several captions) or a folder
    of key.jpg and key.txt into shards OUTPUT/NAME-000000.tar of at most `shard_size` samples, NAME being OUTPUT's last
    part. Paths in a table are relative to `images`, else to the table's folder, and may not leave it.

    Raises DataError, and then leaves nothing behind, at the first thing that is wrong.
    """
    if shard_size < 1:
        raise DataError(f"shard_size = {shard_size} must be at least 1")
    if not input.exists():
        raise DataError(f"{input}: nothing is there; name a .tsv or .csv table, or a folder of key.jpg and key.txt")
    _refuse_existing(output)
    items = folder_items(input) if input.is_dir() else table_items(input, images or input.parent)
    name = output.rstrip("/").rpartition("/")[2]
    final = _local_path(output)
    try:
        if final is not None:
            final.parent.mkdir(parents=True, exist_ok=True)
        beside = final.absolute().parent if final is not None else None
        with tempfile.TemporaryDirectory(prefix=".packing-", dir=beside) as temporary:
            folder = Path(temporary) / "shards"
            folder.mkdir()
            names = write_shards(folder, name, (_checked(item) for item in items), len(items), shard_size)
            if final is not None:
                os.rename(folder, final)
            else:
                _upload(folder, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{shown_url(output)}: the disk is full; free some space or choose another place") from None
        raise DataError(f"cannot write {shown_url(output)}: {error.strerror or error}; choose another place") from None
    shards = tuple(f"{output.rstrip('/')}/{shard}" for shard in names)
    return Packed(shards, len(items), sum(len(item.captions) for item in items))


def write_shards(folder: Path, name: str, samples: Iterable[Members], total: int, shard_size: int) -> list[str]:
    """Writes `total` samples into as few shards as hold them at `shard_size` each, all of nearly the same length.
    Returns the file names. Equal samples give equal bytes."""
    from webdataset import TarWriter  # 2 s

    count = -(-total // shard_size)
    samples = iter(samples)
    names = []
    for i in range(count):
        names.append(f"{name}-{i:06d}.tar")
        with open(folder / names[-1], "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for _ in range(total * i // count, total * (i + 1) // count):
                key, members = next(samples)
                writer.write({"__key__": key, **members})
    return names


def table_items(table: Path, images: Path) -> list[Item]:
    """The pictures of a table, in the order of their first lines."""
    if table.suffix.lower() not in (".tsv", ".csv"):
        raise DataError(f"{table}: a table must end in .tsv or .csv, or name a folder of key.jpg and key.txt")
    captions: dict[Path, list[str]] = {}
    lines: dict[Path, int] = {}
    for line, path, caption in _rows(table):
        picture = _inside(images, path, f"{table}, line {line}")
        captions.setdefault(picture, []).append(caption)
        lines.setdefault(picture, line)
    if not captions:
        raise DataError(f"{table} is empty: each line must hold a picture's path and a caption")
    root = images.resolve()
    items = []
    for picture, texts in captions.items():
        key = picture.relative_to(root).with_suffix("").as_posix().replace(".", "_")
        items.append(Item(key, picture, tuple(dict.fromkeys(texts)), {}, f"{table}, line {lines[picture]}"))
    _refuse_equal_keys(items)
    return items


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, path and caption of each row; a first line of column names is passed over."""
    tabs = table.suffix.lower() == ".tsv"
    reader = csv.reader(
        _decoded_lines(table), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    first = True
    try:
        for row in reader:
            header = first and bool(row) and row[0].strip().lower() in _HEADERS
            first = False
            if header or not any(cell.strip() for cell in row):
                continue
            if len(row) != 2:
                remedy = (
                    "separate path and caption by one tab" if tabs else 'put the caption in "quotes" if it holds commas'
                )
                raise DataError(f"{table}, line {reader.line_num}: {len(row)} columns instead of 2; {remedy}")
            if not row[1].strip():
                raise DataError(f"{table}, line {reader.line_num}: the caption is empty; write one or drop the line")
            yield reader.line_num, row[0].strip(), row[1].strip()
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: {error}; check the quotes") from None


def _decoded_lines(table: Path) -> Iterator[str]:
    with open(table, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{table}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}); save the table as UTF-8"
                ) from None


def _inside(folder: Path, path: str, where: str) -> Path:
    """The file a table names, shown to lie inside the folder and to exist."""
    if "\0" in path or len(path) > 4096:
        raise DataError(f"{where}: {shown(path)} is no path")
    full = (folder / path).resolve()
    if not full.is_relative_to(folder.resolve()):
        raise DataError(
            f"{where}: {shown(path)} lies outside {folder}; name the folder of the pictures, or move the file there"
        )
    if not full.is_file():
        raise DataError(f"{where}: the picture {shown(path)} is missing from {folder}")
    if full.suffix[1:].lower() not in IMAGE_KINDS:
        raise DataError(f"{where}: {shown(path)} is not .{', .'.join(IMAGE_KINDS)}; convert it")
    return full


def folder_items(folder: Path) -> list[Item]:
    """The pictures of a folder of key.jpg, key.txt and perhaps key.json, sorted by name."""
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.rglob("*")):
        key, kind = split_name(path.relative_to(folder).as_posix())
        if path.is_file() and kind in (*IMAGE_KINDS, "txt", "json"):
            members = files.setdefault(key, {})
            other = next((k for k in members if k == kind or {k, kind} <= set(IMAGE_KINDS)), None)
            if other:
                raise DataError(f"{path} and {members[other]} are two files for one key, {shown(key)}; rename one")
            members[kind] = path
    items = [_folder_item(folder, key, members) for key, members in files.items()]
    if not items:
        raise DataError(f"{folder} is empty: it must hold key.jpg (or .png, .webp) and key.txt files")
    return items


def _folder_item(folder: Path, key: str, members: dict[str, Path]) -> Item:
    from .decode import captions_and_labels

    picture = next((members[kind] for kind in IMAGE_KINDS if kind in members), None)
    if picture is None:
        raise DataError(
            f"{next(iter(members.values()))}: no picture with that name lies beside it; add one or drop the file"
        )
    texts = {kind: members[kind] for kind in ("txt", "json") if kind in members}
    try:
        captions, labels = captions_and_labels({kind: path.read_bytes() for kind, path in texts.items()})
    except BadSample as error:
        where = " and ".join(str(path) for path in texts.values()) or f"{picture}"
        raise DataError(f"{where}: {error}; mend it or drop the key") from None
    return Item(key, picture, captions, {"labels": labels} if labels else {}, str(picture))


def _refuse_equal_keys(items: list[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        other = seen.setdefault(item.key, item)
        if other is not item:
            raise DataError(
                f"{other.picture} and {item.picture} are two files for one key, {shown(item.key)}; rename one"
            )


def _checked(item: Item) -> Members:
    """An item's members, its picture decoded once."""
    from .decode import decode_image

    data = item.picture.read_bytes()
    try:
        decode_image(data)
    except BadSample as error:
        raise DataError(f"{item.where}: {item.picture}: {error}; replace the picture or drop its lines") from None
    kind = item.picture.suffix[1:].lower()
    metadata = {"captions": list(item.captions), **item.metadata}
    return item.key, {
        kind: data,
        "txt": item.captions[0].encode("utf-8"),
        "json": json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode("utf-8"),
    }


def _local_path(output: str) -> Path | None:
    """The output as a path, or None where it lies in a store."""
    with readable_errors(output):
        system, path = filesystem(output)
    return Path(path) if isinstance(system, LocalFileSystem) else None


def _refuse_existing(output: str) -> None:
    with readable_errors(output):
        system, path = filesystem(output)
        if system.exists(path):
            raise DataError(f"{shown_url(output)} is there already; remove it or choose another name")


def _upload(folder: Path, output: str) -> None:
    with readable_errors(output):
        system, path = filesystem(output)
        for shard in sorted(folder.iterdir()):
            system.put_file(str(shard), f"{path.rstrip('/')}/{shard.name}")
        shutil.rmtree(folder)
