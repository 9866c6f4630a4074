"""Evaluation sets in the forms that benchmarks come in: folders of classes, tables, and shards.

The one idea: whatever its form, a set is a list of samples in a fixed order, each with the texts its use needs:
captions (`captions`), the class (`class`), or a caption and a wrong one with words swapped (`swap`). Files are listed
and their texts checked when a set is opened; a picture's bytes are read when its sample is requested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from .config import CacheConfig
from .errors import BadSample, DataError, shown
from .ledger import LedgerEntry
from .samples.captions import read_texts
from .samples.clip_tokenizer import TextTokenizer
from .samples.decode import captions_and_labels, centre_crop, decode_image, picture
from .samples.sample import Sample
from .samples.tokenizer import open_tokenizer
from .shards.listing import IMAGE_KINDS
from .shards.parallel import Progress, silent
from .shards.source import READ_KINDS, check_sizes, open_source
from .storage.block_cache import BlockCache
from .storage.files import shown_url, version_of
from .tools.input_table import InputTable, RowTally
from .tools.pack_input import FileItem, PictureFolder, folder_items, names_shards, table_items

PictureFields = Literal["captions", "class", "swap"]
Preprocess = Callable[[Any], Any]
"""from a decoded picture, uint8 [h, w, 3], to the model's input, uint8 [resolution, resolution, 3]"""
CLASS = "class"
"""the label that holds the class of a sample"""
_CLASS_COLUMNS = ("label", "class", "cls")


class Pictures(Protocol):
    """A set of samples in a fixed order."""

    tokenizer: TextTokenizer

    @property
    def url(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def contents(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def sample(self, number: int) -> Sample | LedgerEntry: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """A picture file with its texts."""

    key: str
    path: Path
    captions: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True)
class Form:
    """The texts a set must provide, and where to find them if not in the default place."""

    need: PictureFields
    images: str | None = None
    """the folder that a table's paths are relative to; None: the table's folder"""
    label: str | None = None
    """the column, or the label in a shard's .json, that holds the class; None: a column `label`, `class` or `cls`, or
    the .cls of a shard"""
    swapped: str = "swapped"
    """the column, or the key in a shard's .json, that holds the wrong caption"""


def open_pictures(
    url: str,
    form: Form,
    resolution: int,
    context: int,
    tokenizer: str = "clip",
    cache: CacheConfig | None = None,
    *,
    resize: str = "crop",
    interpolation: str = "bicubic",
    progress: Progress = silent,
) -> FilePictures | ShardPictures:
    """The set at `url`: a folder, a table or shards; pictures are cropped and resized to `resolution` by `centre_crop`.
    `progress(done, total)` counts shards that must be indexed.

    Raises DataError if it is none of these, is empty, or lacks texts.
    """
    path, preprocess = (
        Path(url),
        partial(centre_crop, resolution=resolution, resize=resize, interpolation=interpolation),
    )
    if names_shards(url):
        return ShardPictures(url, form, preprocess, context, tokenizer, cache, progress)
    if path.is_dir():
        read = {"captions": _caption_folder, "class": _class_folder, "swap": _refuse_folder}[form.need]
        entries = list(read(path))
    elif path.exists():
        images = Path(form.images) if form.images else path.parent
        rows = {"captions": _caption_rows, "class": _class_rows, "swap": _swap_rows}[form.need]
        entries = list(rows(path, images, form))
    else:
        raise DataError(f"{shown_url(url)}: not found; name a folder, a .tsv, .csv or .jsonl table, or shards")
    return FilePictures(url, entries, preprocess, context, tokenizer)


class FilePictures:
    """Pictures in separate files."""

    columns = ()

    def __init__(
        self, url: str, entries: Sequence[_Entry], preprocess: Preprocess, context: int, tokenizer: str
    ) -> None:
        if not entries:
            raise DataError(f"{shown_url(url)} is empty: it holds no pictures; add some or name another set")
        self.url, self._entries, self._preprocess = url, entries, preprocess
        self.context = context
        self.tokenizer = open_tokenizer(tokenizer)

    def __len__(self) -> int:
        return len(self._entries)

    @cached_property
    def identity(self) -> str:
        """A hash that identifies the data: texts, and the versions of the files wherever their folder is."""
        digest = sha256()
        for each in self._entries:
            stat = each.path.stat()
            facts = (each.key, stat.st_size, version_of(stat), stat.st_ino, each.captions, each.label)
            digest.update(ascii(facts).encode())
        return digest.hexdigest()

    @cached_property
    def contents(self) -> str:
        """A hash of names, sizes and texts, which are the same on every machine."""
        facts = [(each.key, each.path.stat().st_size, each.captions, each.label) for each in self._entries]
        return sha256(ascii(facts).encode()).hexdigest()

    @property
    def known_labels(self) -> list[str]:
        """The class of every picture, as written in the data."""
        return [each.label for each in self._entries if each.label is not None]

    def sample(self, number: int) -> Sample | LedgerEntry:
        """Sample `number`, or a ledger entry with the reason why it cannot be used."""
        entry = self._entries[number]
        try:
            check_sizes({entry.path.suffix[1:]: entry.path.stat().st_size})
            pixels = self._preprocess(decode_image(entry.path.read_bytes()))
        except BadSample as error:
            return LedgerEntry(self.url, str(entry.path), entry.key, 0, str(error))
        except OSError as error:
            return LedgerEntry(self.url, str(entry.path), entry.key, 0, f"cannot be read: {error.strerror}")
        labels = {} if entry.label is None else {CLASS: entry.label}
        return _sample(self.url, entry.key, pixels, entry.captions, labels)


class ShardPictures:
    """Pictures in tar shards: a class is in .cls or a label of .json, a swapped caption in .json."""

    columns = ()

    def __init__(
        self,
        url: str,
        form: Form,
        preprocess: Preprocess,
        context: int,
        tokenizer: str,
        cache: CacheConfig | None,
        progress: Progress = silent,
    ) -> None:
        blocks = BlockCache((cache or CacheConfig()).bytes)
        self.source = open_source(url, blocks, progress=progress, captions=form.need != "class")
        self.url, self.form, self._preprocess = url, form, preprocess
        self.context = context
        self.tokenizer = open_tokenizer(tokenizer)
        self.known_labels: list[str] = []  # unknown until each sample is read

    def __len__(self) -> int:
        return len(self.source)

    @property
    def identity(self) -> str:
        """A hash that identifies the data."""
        return sha256(f"{self.source.identity.digest}{self.form}".encode()).hexdigest()

    @property
    def contents(self) -> str:
        """The same: it depends on the samples alone."""
        return self.identity

    def sample(self, number: int) -> Sample | LedgerEntry:
        """Sample `number`, or a ledger entry with the reason why it cannot be used."""
        source = self.source
        try:
            record = source.record(number, READ_KINDS | {"cls"})
            captions, labels = self._texts(record.fields)
            pixels = self._preprocess(picture(record.fields, record.kinds))
        except BadSample as error:
            place = (source.shard(number), source.key(number), source.offset(number))
            return LedgerEntry(source.url, *place, str(error))
        return _sample(record.shard, record.key, pixels, captions, labels)

    def _texts(self, fields: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, str]]:
        form = self.form
        if form.need == "captions":
            return captions_and_labels(fields)
        if form.need == "swap":
            texts = read_texts(fields)
            return (texts.captions[0].text, _swap_of(texts.whole_metadata(), form.swapped)), {}
        if form.label is not None:
            texts = read_texts({**fields, "txt": b"-"})  # a class needs no caption
            texts.whole_metadata()  # raises if it cannot be read
            labels = texts.labels
            if form.label not in labels:
                raise BadSample(f"no class: its labels are {', '.join(map(shown, sorted(labels))) or 'none'}")
            return (), {CLASS: labels[form.label]}
        if "cls" not in fields:
            raise BadSample("no class: the sample has no .cls; name a label of its .json")
        try:
            return (), {CLASS: fields["cls"].decode("utf-8-sig").strip()}
        except UnicodeDecodeError:
            raise BadSample("the class is not UTF-8") from None


def _sample(shard: str, key: str, pixels: Any, captions: tuple[str, ...], labels: dict[str, str]) -> Sample:
    return Sample(shard, key, pixels, captions, captions[0] if captions else "", [], labels)


# Folders


def _class_folder(folder: Path) -> Iterator[_Entry]:
    """One folder per class, as in torchvision's ImageFolder: classes and pictures sorted by name."""
    for kind in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [file for file in sorted(kind.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise DataError(f"{kind} is empty: a class must have pictures; add some or remove the folder")
        for file in files:
            if file.suffix[1:].lower() not in IMAGE_KINDS:
                raise DataError(f"{file} is not .{', .'.join(IMAGE_KINDS)}; convert it, or move it out of the classes")
            yield _Entry(file.relative_to(folder).as_posix(), file, label=kind.name)
    if not any(path.is_dir() for path in folder.iterdir()):
        tars = any(folder.glob("*.tar"))
        raise DataError(
            f"{folder} is not a folder of classes: "
            + (f"name its shards as {folder}/*.tar" if tars else "it must hold a folder of pictures for each class")
        )


def _caption_folder(folder: Path) -> Iterator[_Entry]:
    return map(_captioned, folder_items(folder))


def _refuse_folder(folder: Path) -> Iterator[_Entry]:
    raise DataError(
        f"{folder} is a folder; caption pairs must be a table with the columns path, caption and swapped, or shards"
    )


# Tables


def _caption_rows(path: Path, images: Path, form: Form) -> Iterator[_Entry]:
    return map(_captioned, table_items(path, images))


def _class_rows(path: Path, images: Path, form: Form) -> Iterator[_Entry]:
    for row, file in _rows(path, images, (form.label,) if form.label else _CLASS_COLUMNS):
        given = [str(each) for each in row.captions] or [
            str(row.columns[name]) for name in ((form.label,) if form.label else _CLASS_COLUMNS) if name in row.columns
        ]
        if len(given) != 1:
            raise DataError(f"{path}, line {row.line}: {len(given)} classes for one picture; write one per line")
        yield _Entry(row.path, file, label=given[0])


def _swap_rows(path: Path, images: Path, form: Form) -> Iterator[_Entry]:
    """One pair of captions per line; a picture may have several lines."""
    for row, file in _rows(path, images, ("caption", "text")):
        try:
            wrong = _swap_of(row.columns, form.swapped)
            texts = read_texts({"txt": str(row.captions[0]).encode()} if row.captions else {})
        except BadSample as error:
            raise DataError(f"{path}, line {row.line}: {error}") from None
        yield _Entry(row.path, file, (texts.captions[0].text, wrong))


def _rows(path: Path, images: Path, texts: Sequence[str]) -> Iterator[tuple[Any, Path]]:
    folder, tally = PictureFolder(images), RowTally()
    for row in InputTable(path, texts).rows(tally):
        tally.used += 1
        yield row, folder.file(row.path, f"{path}, line {row.line}")
    tally.check(path)


def _captioned(item: FileItem) -> _Entry:
    captions, _ = captions_and_labels({"txt": item.txt, "json": item.json})
    return _Entry(item.key, Path(item.picture), captions)


def _swap_of(columns: Mapping[str, Any], name: str) -> str:
    wrong = columns.get(name)
    if isinstance(wrong, int | float) and not isinstance(wrong, bool):  # as a table's reader takes the cell 7
        wrong = str(wrong)
    if wrong is None or (isinstance(wrong, str) and not wrong.strip()):
        raise BadSample(f"no swapped caption: {shown(name)} is missing or empty")
    if not isinstance(wrong, str):
        raise BadSample(f"no swapped caption: {shown(name)} is {shown(json.dumps(wrong), 40)}, not a text")
    return wrong.strip()
