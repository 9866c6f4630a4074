"""Columns: the scalar values in the metadata of a shard's samples (key.json), stored in the shard's index so that a
filter needs no second pass over the data.

A column is named by a top-level key of the JSON object, or by two keys joined by a dot for a nested object
(`labels.role`). It holds numbers (booleans as 0 or 1; all as 64-bit floats) and short texts with few distinct values;
null, NaN, lists, deeper objects and invalid JSON count as missing. A key with a long text, or with too many distinct
texts in one shard (a URL, a checksum), does not become a column: it is recorded as left out, so that a filter that
names it can say why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .table_file import Array, DamagedTable, Table, packed_texts, table_bytes

LONGEST_JSON = 1 << 22  # bytes; larger metadata is not read, here and in training
MOST_TEXTS = 255  # distinct texts of a column in one shard
_LONGEST_TEXT = 100  # characters of a text, or of a name
_MOST_COLUMNS = 256


class Column:
    """One column of n samples: a number where `is_number`, the text `texts[code - 1]` where `code` > 0, else
    missing."""

    def __init__(self, numbers: Array, is_number: NDArray[np.bool_], codes: Array, texts: list[str]) -> None:
        self.numbers, self.is_number, self.codes, self.texts = numbers, is_number, codes, texts


class Collector:
    """Builds the columns of a shard from the metadata of its samples."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[int, float]] = {}
        self._texts: dict[str, dict[int, int]] = {}
        self._codes: dict[str, dict[str, int]] = {}
        self._left_out: set[str] = set()
        self._too_many = False

    def add(self, row: int, data: bytes) -> None:
        """Adds the metadata of sample `row`."""
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return
        for name, value in _scalars(found):
            if name not in self._left_out and self._has_room(name):
                self._put(name, row, value)

    def _has_room(self, name: str) -> bool:
        if name in self._numbers:
            return True
        if len(self._numbers) + len(self._left_out) >= _MOST_COLUMNS:
            self._too_many = True
            return False
        self._numbers[name], self._texts[name], self._codes[name] = {}, {}, {}
        return True

    def _put(self, name: str, row: int, value: Any) -> None:
        if not isinstance(value, str):
            self._numbers[name][row] = value
            return
        codes = self._codes[name]
        if len(value) > _LONGEST_TEXT or (value not in codes and len(codes) == MOST_TEXTS):
            del self._numbers[name], self._texts[name], self._codes[name]
            self._left_out.add(name)
            return
        self._texts[name][row] = codes.setdefault(value, len(codes) + 1)

    def table(self, rows: int) -> bytes:
        """The columns of the first `rows` samples, as the bytes of a table."""
        arrays: dict[str, Array] = {}
        names = sorted(self._numbers)
        for i, name in enumerate(names):
            if numbers := {row: value for row, value in self._numbers[name].items() if row < rows}:
                values, present = np.zeros(rows), np.zeros(rows, bool)
                places = np.fromiter(numbers, np.int64, len(numbers))
                values[places] = np.fromiter(numbers.values(), np.float64, len(numbers))
                present[places] = True
                arrays[f"{i}.numbers"] = _small(values)
                if not present.all():
                    arrays[f"{i}.present"] = np.packbits(present)
            if texts := {row: code for row, code in self._texts[name].items() if row < rows}:
                codes = np.zeros(rows, np.uint8)
                codes[np.fromiter(texts, np.int64, len(texts))] = np.fromiter(texts.values(), np.uint8, len(texts))
                arrays[f"{i}.codes"] = codes
                arrays |= packed_texts(f"{i}.texts", [_encodable(text) for text in self._codes[name]])
        header = {"rows": rows, "names": names, "left_out": sorted(self._left_out), "too_many": self._too_many}
        return table_bytes(header, arrays)


class Columns:
    """The columns of a shard. `left_out`: keys that did not become columns; `too_many`: some keys were not recorded."""

    def __init__(self, data: bytes) -> None:
        """`data` is a table made by `Collector.table`. Raises DamagedTable."""
        self._table = Table.parse(data)
        header = self._table.header
        try:
            self.rows, self.names = int(header["rows"]), [str(name) for name in header["names"]]
            self.left_out, self.too_many = {str(name) for name in header["left_out"]}, bool(header["too_many"])
        except (KeyError, TypeError, ValueError):
            raise DamagedTable("its header lacks the columns") from None

    def __getitem__(self, name: str) -> Column:
        """A column by its name. Raises KeyError if the shard does not have it."""
        try:
            i = self.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        numbers, is_number = np.zeros(self.rows), np.zeros(self.rows, bool)
        codes, texts = np.zeros(self.rows, np.uint8), []
        if f"{i}.numbers" in self._table:
            numbers, is_number = self._whole(f"{i}.numbers").astype(np.float64), np.ones(self.rows, bool)
            if f"{i}.present" in self._table:
                bits = self._table.rows(f"{i}.present")
                if bits.dtype != np.uint8 or len(bits) != -(-self.rows // 8):
                    raise DamagedTable("a column has another length")
                is_number = np.unpackbits(bits, count=self.rows).astype(bool)
        if f"{i}.codes" in self._table:
            codes, texts = self._whole(f"{i}.codes"), self._table.texts(f"{i}.texts")
            if codes.max(initial=0) > len(texts):
                raise DamagedTable("a column has codes without texts")
        return Column(numbers, is_number, codes, texts)

    def _whole(self, name: str) -> Array:
        array = self._table.rows(name)
        if len(array) != self.rows:
            raise DamagedTable("a column has another length")
        return array


def _scalars(found: Any) -> Iterator[tuple[str, float | str]]:
    """Names and values of the scalars in a JSON object, up to one level deep."""
    if not isinstance(found, dict):
        return
    for name, value in found.items():
        if isinstance(value, dict):
            inside = [(f"{name}.{inner}", each) for inner, each in value.items()]
        else:
            inside = [(name, value)]
        for full, each in inside:
            number = _number(each)
            if len(full) <= _LONGEST_TEXT and (number is not None or isinstance(each, str)):
                yield full, each if number is None else number


def _number(value: Any) -> float | None:
    if not isinstance(value, bool | int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _small(values: Array) -> Array:
    """The same numbers in the smallest type that represents them exactly; -0.0 becomes 0."""
    for kind in ("|i1", "<i2", "<i4", "<i8", "<f4"):
        with np.errstate(all="ignore"):
            smaller = values.astype(kind)
        if (smaller.astype(np.float64) == values).all() and (kind != "<i8" or np.abs(values).max(initial=0) < 2**53):
            return smaller
    return values.astype("<f8")


def _encodable(text: str) -> str:
    """The text with lone surrogates, which JSON allows and UTF-8 does not, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
