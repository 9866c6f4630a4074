"""The contact sheet: samples as one self-contained HTML page that fetches nothing, or as a PNG.

Keys, captions, labels and reasons are untrusted: the template escapes them, characters that change the writing
direction or hide text are replaced, and the page's content security policy forbids requests and scripts. Thumbnails are
encoded from decoded pixels; no byte of a picture's file reaches the page.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..errors import BadSample, DataError, shown
from ..samples.decode import captions_and_labels, picture
from ..shards.parallel import Progress, silent, sweep_samples
from ..shards.source import Source
from ..storage.atomic_write import atomic_write
from ..storage.files import shown_url

_SIDE = 192  # pixels of a thumbnail's longer side
_COLUMNS, _GAP, _LINES = 8, 12, 5  # of a PNG: cards per row, pixels between them, lines of text below each
_WIDTH = _COLUMNS * (_SIDE + _GAP) + _GAP
_MOST_CAPTIONS, _MOST_LABELS = 5, 20
_LONGEST = 300  # characters shown of a caption
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control and format characters, surrogates, line and paragraph separators
_JOINERS = "\u200c\u200d"  # join the parts of an emoji or of a Persian word


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Card:
    """A sample on the sheet; its texts are safe to display."""

    key: str
    shard: str
    offset: int
    thumbnail: str | None  # a data: URL
    size: str  # "640 x 480"
    captions: tuple[str, ...]
    labels: tuple[str, ...]  # "name: class"
    fault: str  # why training could not use it now; "" if it can
    notes: tuple[str, ...] = ()  # reasons from a run's ledger


def cards(source: Source, numbers: Sequence[int], workers: int = 1, progress: Progress = silent) -> list[Card]:
    """The cards of the samples `numbers`, in order; `progress(done, total)` counts them. Raises DataError if a shard
    cannot be read."""
    return list(sweep_samples(lambda number: card(source, number), numbers, workers, progress))


def card(source: Source, number: int) -> Card:
    """The card of one sample; of a bad one with whatever can be read. Raises DataError if its shard cannot be read."""
    captions: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    fields: dict[str, bytes] = {}
    thumbnail, size, faults = None, "", []
    try:
        fields = source.record(number).fields
        captions, labels = captions_and_labels(fields, bare=True)
    except BadSample as error:
        faults.append(str(error))
    try:
        pixels = picture(fields, source.kinds(number))
        thumbnail, size = _thumbnail(Image.fromarray(pixels)), f"{pixels.shape[1]} x {pixels.shape[0]}"
    except BadSample as error:
        faults.append(str(error))
    return Card(
        key=printable(source.key(number)),
        shard=printable(shown_url(source.shard(number))),
        offset=source.offset(number),
        thumbnail=thumbnail,
        size=size,
        captions=tuple(printable(caption) for caption in captions[:_MOST_CAPTIONS]),
        labels=tuple(printable(f"{name}: {value}") for name, value in list(labels.items())[:_MOST_LABELS]),
        fault=printable(faults[0]) if faults else "",
    )


def with_notes(card: Card, notes: Iterable[str]) -> Card:
    """The card with notes."""
    return replace(card, notes=tuple(printable(note) for note in notes))


@dataclass(frozen=True, slots=True)
class Section:
    """A heading on the sheet, and the cards below it."""

    heading: str
    cards: Sequence[Card]


def write_sheet(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Writes the sheet atomically: a PNG if the name ends in .png, otherwise an HTML page. Replaces an existing file.
    Raises DataError."""
    title, lead = printable(title), printable(lead)
    data = _png(title, lead, sections) if path.suffix.lower() == ".png" else _page(title, lead, sections)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as error:
        raise DataError(f"cannot write {shown(str(path))}: {error.strerror}; choose another path") from None


def _page(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only needed for a page

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("contact_sheet.html").render(title=title, lead=lead, sections=sections)
    return page.encode("utf-8", "replace")


def _png(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """The sheet as a PNG: Latin captions, and other scripts as far as the installed DejaVu font covers them."""
    large, small = _font(18), _font(12)
    rows: list[Image.Image] = [_line(f"{title}   {lead}", large)]
    for section in sections:
        rows += [_line(section.heading, large)] if section.heading else []
        rows += [_row(section.cards[at : at + _COLUMNS], small) for at in range(0, len(section.cards), _COLUMNS)]
    sheet = Image.new("RGB", (_WIDTH, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _row(cards: Sequence[Card], font: Font) -> Image.Image:
    images = [_decoded(card.thumbnail) for card in cards]
    height = max(image.height for image in images)
    row = Image.new("RGB", (_WIDTH, height + _LINES * 15 + 16), "white")
    draw = ImageDraw.Draw(row)
    for i, (card, image) in enumerate(zip(cards, images, strict=True)):
        left = i * (_SIDE + _GAP) + _GAP
        row.paste(image, (left + (_SIDE - image.width) // 2, height - image.height))
        _write_texts(draw, left, height + 4, card, font)
    return row


def _decoded(thumbnail: str | None) -> Image.Image:
    if thumbnail is None:
        return Image.new("RGB", (_SIDE // 2, _SIDE // 4), "lightgray")
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.partition(",")[2]))).convert("RGB")


def _write_texts(draw: ImageDraw.ImageDraw, left: int, top: int, card: Card, font: Font) -> None:
    faults = dict.fromkeys([*card.notes, *([card.fault] if card.fault else [])])
    lines = [(line, "firebrick") for fault in faults for line in _wrapped(fault, font, 2)]
    room = max(1, _LINES - 1 - len(lines))
    lines += [(line, "black") for line in _wrapped(" | ".join(card.captions), font, room)]
    place = _wrapped(f"{card.size}  {card.key}".strip(), font, 1)
    for i, (line, colour) in enumerate([*lines[: _LINES - 1], *((each, "gray") for each in place)]):
        draw.text((left, top + 15 * i), line, colour, font)


def _wrapped(text: str, font: Font, most: int) -> list[str]:
    """The text wrapped to at most `most` lines of a card's width."""
    lines: list[str] = []
    while text and len(lines) < most:
        fits = next((n for n in range(min(len(text), 60), 1, -1) if font.getlength(text[:n]) <= _SIDE), 1)
        if fits < len(text) and len(lines) < most - 1:
            fits = max(text.rfind(" ", 0, fits + 1), 0) or fits
        lines.append(text[:fits].strip() if fits == len(text) or len(lines) < most - 1 else text[: fits - 1] + "…")
        text = text[fits:].lstrip()
    return lines


def _line(text: str, font: Font) -> Image.Image:
    row = Image.new("RGB", (_WIDTH, 40), "white")
    ImageDraw.Draw(row).text((_GAP, 10), text[:140], "black", font)
    return row


def _font(size: int) -> Font:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:  # not installed
        return ImageFont.load_default(size)


def printable(text: str) -> str:
    """An untrusted text made safe for a page or terminal: one line, truncated, without hidden characters."""
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    line = (" " if c in "\n\t" else c for c in text)
    return "".join("\ufffd" if unicodedata.category(c) in _UNSAFE and c not in _JOINERS else c for c in line)


def _thumbnail(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
