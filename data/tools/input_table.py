"""Tables of pictures: .tsv, .csv and .jsonl.

The one idea: rows in = rows out + rows refused, each by its line. A row that cannot be read costs no other row, since
the next one is looked for in the next line. In particular a quote that nobody closes does not swallow what is behind
it.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, shown
from ..shards.listing import IMAGE_KINDS

_PATHS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path", "image path", "picture")
_CAPTIONS = ("caption", "text")
_PATH, _TEXT = "\0path", "\0text"  # columns of these uses, as no column can be called
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?([eE][+-]?\d{1,2})?")
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "|"}
_PICTURE = tuple(f".{kind}" for kind in IMAGE_KINDS)
_MOST_REFUSED = 8  # rows listed in an error
_OPEN_QUOTE = 'a quote opens in this row and is not closed; write a quote inside a "quoted" text twice, or remove it'


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a picture's path, its captions (texts or objects as in a .json) and other columns."""

    line: int
    path: str
    captions: list[Any]
    columns: dict[str, Any]


@dataclass
class RowTally:
    """How many rows of a table are used, and why each of the others is not. Together they are all of its rows."""

    used: int = 0
    refused: list[str] = field(default_factory=list)

    def check(self, path: Path) -> None:
        """Raises DataError if a row was refused."""
        few = self.refused[:_MOST_REFUSED]
        if len(few) == 1:
            raise DataError(few[0])
        if few:
            more = len(self.refused) - len(few)
            count = f"{path}: {len(self.refused):,} of {self.used + len(self.refused):,} rows cannot be used"
            raise DataError("\n".join([count, *few, *([f"and {more:,} more"] if more else [])]))


class _BadRow(Exception):
    """A row cannot be read; the message says why."""


class InputTable:
    """A table of pictures. .tsv and .csv: two columns, path and caption, or a header line that names the columns; the
    first line shows the delimiter. .jsonl: one object per line, with `path`, and `caption` or `captions`. Other columns
    become metadata."""

    def __init__(self, path: Path, texts: Sequence[str] = _CAPTIONS) -> None:
        """`texts`: accepted names of the text column (captions, or classes in an evaluation set)."""
        self.path, self.kind, self.texts = path, path.suffix.lower(), tuple(texts)
        self._path_column = 0
        if self.kind not in (".tsv", ".csv", ".jsonl"):
            raise DataError(
                f"{path}: a table must end in .tsv, .csv or .jsonl; or name a folder of key.jpg and key.txt"
            )

    def rows(self, tally: RowTally) -> Iterator[Row]:
        """The rows that can be read, except empty ones; the others are listed in `tally`. Raises DataError for a wrong
        header."""
        for row in self._objects() if self.kind == ".jsonl" else self._cells():
            if isinstance(row, Row):
                yield row
            else:
                tally.refused.append(str(row))

    def wrong(self, line: int, what: str) -> DataError:
        """The error for a faulty line."""
        return DataError(f"{self.path}, line {line}: {what}")

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Numbers and lines; bytes that are not UTF-8 become surrogates, which `_check_encoding` finds."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")

    # .jsonl

    def _objects(self) -> Iterator[Row | DataError]:
        for number, line in self._lines():
            if line.strip():
                try:
                    yield self._object(number, line)
                except _BadRow as error:
                    yield self.wrong(number, str(error))

    def _object(self, number: int, line: str) -> Row:
        _check_encoding(line)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadRow(f"not JSON: {ascii(str(error))[1:-1][:100]}; write one object per line") from None
        if not isinstance(row, dict):
            raise _BadRow("not an object; write one per line, with path and caption")
        path = next((row.pop(name) for name in _PATHS if isinstance(row.get(name), str)), None)
        if path is None:
            raise _BadRow(f"no path of a picture; put it under the key {_PATHS[0]}")
        captions = row.pop("captions", [])
        if not isinstance(captions, list):
            raise _BadRow("captions must be a list of texts")
        single = next((row.pop(name) for name in self.texts if isinstance(row.get(name), str)), None)
        return Row(number, path, [*([single] if single is not None else []), *captions], row)

    # .tsv and .csv

    def _cells(self) -> Iterator[Row | DataError]:
        delimiter, names, first = self._delimiter(), None, True
        for number, cells in self._records(delimiter):
            if isinstance(cells, list) and not any(cell.strip() for cell in cells):
                continue
            if first and isinstance(cells, list) and _is_header(cells):
                names = self._named(number, cells)
                self._path_column = names.index(_PATH)
            else:
                try:
                    yield self._row(number, cells, names, delimiter)
                except _BadRow as error:
                    yield self.wrong(number, str(error))
            first = False

    def _delimiter(self) -> str:
        """What separates the columns: that of the file's extension, unless only another one makes the first line a
        header, or a picture's path and something behind it."""
        first = next((line for _, line in self._lines() if line.strip()), "")
        usual = "\t" if self.kind == ".tsv" else ","
        cells = {each: _split(first, each) for each in (usual, *_DELIMITERS)}
        for fits in (_is_header, lambda row: row[0].strip(" ").lower().endswith(_PICTURE)):
            found = next((each for each, row in cells.items() if len(row) > 1 and fits(row)), None)
            if found is not None:
                return found
        return usual

    def _records(self, delimiter: str) -> Iterator[tuple[int, list[str] | _BadRow]]:
        """The line at which each record begins, and its cells, or what is wrong with it.

        In a .csv a quoted cell may hold line breaks. If its quote is never closed, or one of the further lines is a row
        of its own, only the first line is wrong, and the next record begins in the line behind it."""
        lines, again = self._lines(), deque[tuple[int, str]]()
        plain = self.kind == ".tsv" and delimiter == "\t"
        quoting: Literal[0, 3] = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        while True:
            taken: list[tuple[int, str]] = []
            reader = csv.reader(_noted(again, lines, taken), delimiter=delimiter, quoting=quoting, strict=True)
            cells: list[str] | _BadRow
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = _BadRow(_OPEN_QUOTE if "end of data" in str(error) else f"{error}; check the quotes")
            rest = taken[1:]
            inside = rest[:-1] if self._path_column else rest  # the last line may hold the row's own path
            if rest and (isinstance(cells, _BadRow) or any(self._is_a_row(line, delimiter) for _, line in inside)):
                cells = _BadRow(_OPEN_QUOTE)
                again.extendleft(reversed(rest))
            yield taken[0][0], cells

    def _is_a_row(self, line: str, delimiter: str) -> bool:
        """Whether a line within a quoted text has the path of a picture where a row has it."""
        cells = line.split(delimiter)
        at = self._path_column
        return len(cells) > max(1, at) and cells[at].strip().strip('"').lower().endswith(_PICTURE)

    def _named(self, line: int, header: list[str]) -> list[str]:
        """The column names, with _PATH for that of the paths and _TEXT for each of the texts."""
        names = [cell.strip() for cell in header]
        lower = [name.lower() for name in names]
        path = next((lower.index(name) for name in _PATHS if name in lower), 0)
        captions = {i for i, name in enumerate(lower) if name in self.texts} or (
            {1 - path} if len(names) == 2 else set()
        )
        if not captions:
            raise self.wrong(line, f"which of the columns is the {self.texts[0]}? name it {self.texts[0]}")
        others = [name for i, name in enumerate(names) if i != path and i not in captions]
        wrong = next((n for n in others if not n or others.count(n) > 1 or n in ("captions", "labels")), None)
        if wrong is not None:
            raise self.wrong(line, f"a column cannot be called {shown(wrong)}; rename it, or write a .jsonl table")
        return [_PATH if i == path else _TEXT if i in captions else name for i, name in enumerate(names)]

    def _row(self, line: int, row: list[str] | _BadRow, names: list[str] | None, delimiter: str) -> Row:
        if isinstance(row, _BadRow):
            raise row
        wanted = len(names) if names else 2
        if len(row) != wanted:
            quoted = f'put a {self.texts[0]} in "quotes" if it holds a {_DELIMITERS[delimiter]}'
            remedy = "separate columns by one tab" if self.kind == ".tsv" else quoted
            raise _BadRow(f"{len(row)} columns instead of {wanted}; {remedy}")
        for cell in row:
            _check_encoding(cell)
        cells = list(zip(names or (_PATH, _TEXT), (cell.strip() for cell in row), strict=True))
        captions = [cell for name, cell in cells if name == _TEXT and cell]
        if not captions:
            raise _BadRow(f"the {self.texts[0]} is empty; write one or remove the line")
        others = {name: _value(cell) for name, cell in cells if name not in (_PATH, _TEXT) and cell}
        return Row(line, next(cell for name, cell in cells if name == _PATH), [*captions], others)


def _noted(
    again: deque[tuple[int, str]], lines: Iterator[tuple[int, str]], taken: list[tuple[int, str]]
) -> Iterator[str]:
    """The lines that are read again, then new ones, each noted in `taken`."""
    while (line := again.popleft() if again else next(lines, None)) is not None:
        taken.append(line)
        yield line[1]


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def _is_header(row: list[str]) -> bool:
    return not {cell.strip().lower() for cell in row}.isdisjoint((*_PATHS, "key"))


def _check_encoding(text: str) -> None:
    """Raises _BadRow if a text was decoded from bytes that are not UTF-8."""
    byte = "" if text.isascii() else next((c for c in text if "\udc80" <= c <= "\udcff"), "")
    if byte:
        raise _BadRow(f"not UTF-8 (byte 0x{ord(byte) - 0xDC00:02x}); save the table as UTF-8")


def _value(cell: str) -> str | int | float:
    """A cell of another column: a number if it is a valid JSON number, otherwise text."""
    if not _NUMBER.fullmatch(cell):
        return cell
    number: int | float = json.loads(cell)
    return number
