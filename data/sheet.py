"""The contact sheet: samples as one HTML page to look at, everything in it and nothing fetched.

Keys, captions, labels and reasons come from outside: the template escapes them, what would turn the writing direction
or hide text is replaced, and the page forbids itself every request and script by its content security policy.
Thumbnails are encoded anew from decoded pixels; no byte of a picture's file reaches the page.
"""

from __future__ import annotations

import base64
import io
import os
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .config import DataError
from .decode import captions_and_labels, picture
from .files import shown_url
from .ledger import BadSample, shown
from .source import Source
from .sweep import sweep_samples

_SIDE = 192  # pixels of a thumbnail's longer side
_MOST_CAPTIONS = 5
_LONGEST = 300  # characters shown of a caption
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # moves a cursor, turns the writing direction, or is no character
_JOINERS = "\u200c\u200d"  # join the parts of an emoji or of a Persian word


@dataclass(frozen=True, slots=True)
class Card:
    """A sample on the sheet, its texts fit to be shown."""

    key: str
    shard: str
    offset: int
    thumbnail: str | None  # a data: URL
    size: str  # "640 x 480"
    captions: tuple[str, ...]
    labels: tuple[str, ...]  # "name: class"
    fault: str  # why training cannot use it now; "" if it can
    notes: tuple[str, ...] = ()  # what a run's ledger said


def cards(source: Source, numbers: Sequence[int], workers: int = 1) -> list[Card]:
    """Samples as they are to be shown, in the order of `numbers`. DataError if a shard cannot be read."""
    return list(sweep_samples(lambda number: card(source, number), numbers, workers))


def card(source: Source, number: int) -> Card:
    """One sample, with whatever can be shown of it if it is a bad one."""
    record = source.record(number)
    captions: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    thumbnail, size, faults = None, "", []
    try:
        captions, labels = captions_and_labels(record.fields)
    except BadSample as error:
        faults.append(str(error))
    try:
        pixels = picture(record.fields, record.kinds)
        thumbnail, size = _thumbnail(Image.fromarray(pixels)), f"{pixels.shape[1]} x {pixels.shape[0]}"
    except BadSample as error:
        faults.append(str(error))
    return Card(
        key=printable(record.key),
        shard=printable(shown_url(record.shard)),
        offset=record.offset,
        thumbnail=thumbnail,
        size=size,
        captions=tuple(printable(caption) for caption in captions[:_MOST_CAPTIONS]),
        labels=tuple(printable(f"{name}: {value}") for name, value in labels.items()),
        fault=printable(faults[0]) if faults else "",
    )


def noted(card: Card, notes: Iterable[str]) -> Card:
    """The card with notes on it."""
    return replace(card, notes=tuple(printable(note) for note in notes))


def write_sheet(path: Path, title: str, lead: str, cards: Sequence[Card]) -> None:
    """Writes the page, whole or not at all; an earlier one is replaced. Raises DataError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a sheet needs it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("sheet.html").render(title=printable(title), lead=printable(lead), cards=cards)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write {shown(str(path))}: {error.strerror}; choose another place for it") from None


def printable(text: str) -> str:
    """A text from data fit for a page or a terminal: one line, cut, nothing hidden in it."""
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    line = (" " if c in "\n\t" else c for c in text)
    return "".join("\ufffd" if unicodedata.category(c) in _UNSAFE and c not in _JOINERS else c for c in line)


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
