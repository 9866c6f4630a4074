"""Tables: named arrays of numbers in one small binary file, read as a whole or by row. Indexes are stored as tables.

Why not safetensors or .npy: neither has a checksum, safetensors has no structured rows, and .npy holds a single array.

The format is self-describing and never unpickled:
8 bytes of magic, a CRC-32 of all that follows, the length of the header (both 4 bytes, little-endian), the header as
ASCII JSON, then the arrays, each aligned to 8 bytes. The header lists the arrays (name, type, rows, offset) and any
fields its writer adds. The checksum is verified once, when the file is opened; after that a row costs one small read,
and only the header stays in memory. Types and bounds are checked against the file's size, since a table may come from
a bucket that others write to.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..storage.atomic_write import atomic_write

_MAGIC = b"treeidx\x01"
_HEAD = 16  # bytes before the header
_LONGEST_HEADER = 64 << 20
_CHUNK = 1 << 20
_PLAIN = frozenset(("|u1", "<u2", "<u4", "<u8", "|i1", "<i2", "<i4", "<i8", "<f4", "<f8"))
Array = NDArray[Any]


class DamagedTable(ValueError):
    """The bytes are not an intact table; the caller rebuilds it."""


class Table:
    """A table in memory or in a file."""

    def __init__(self, header: dict[str, Any], start: int, data: bytes | Path, size: int) -> None:
        self.header, self._data = header, data
        self._places: dict[str, tuple[np.dtype[Any], int, int]] = {}
        try:
            for name, fields, count, offset in header.pop("arrays"):
                kind = _dtype(fields)
                if count < 0 or offset < 0 or start + offset + count * kind.itemsize > size:
                    raise ValueError
                self._places[str(name)] = (kind, int(count), start + int(offset))
        except (KeyError, TypeError, ValueError):
            raise DamagedTable("its header does not fit its size") from None

    @classmethod
    def parse(cls, data: bytes) -> Table:
        """The table with the bytes `data`. Raises DamagedTable."""
        length = _checked_head(data[:_HEAD], len(data), zlib.crc32(data[12:]))
        return cls(_header(data[_HEAD : _HEAD + length]), _aligned(_HEAD + length), data, len(data))

    @classmethod
    def open(cls, path: Path) -> Table:
        """The table in a file; reads all of it once to verify the checksum. Raises DamagedTable or OSError."""
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD)
            sum_ = zlib.crc32(head[12:])
            while chunk := file.read(_CHUNK):
                sum_ = zlib.crc32(chunk, sum_)
            length = _checked_head(head, size, sum_)
            file.seek(_HEAD)
            return cls(_header(file.read(length)), _aligned(_HEAD + length), path, size)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def count(self, name: str) -> int:
        """The number of rows of an array."""
        return self._places[name][1]

    def fields(self, name: str) -> tuple[str, ...]:
        """The field names of an array of unsigned integers, ("",) if it is not structured; () for other types."""
        kind = self._places[name][0] if name in self._places else np.dtype(float)
        parts = [part for part, *_ in kind.fields.values()] if kind.fields else [kind]
        return (kind.names or ("",)) if all(part.kind == "u" for part in parts) else ()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of an array, read-only. Raises DamagedTable, or OSError if the file is gone."""
        kind, count, offset = self._places[name]
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise DamagedTable(f"{name} has no rows {start} to {stop}")
        offset += start * kind.itemsize
        if isinstance(self._data, bytes):
            return np.frombuffer(self._data, kind, stop - start, offset)
        descriptor = os.open(self._data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = _read(descriptor, (stop - start) * kind.itemsize, offset)
        finally:
            os.close(descriptor)
        return np.frombuffer(data, kind)

    def texts(self, name: str, start: int = 0, stop: int | None = None) -> list[str]:
        """The texts stored by `packed_texts(name, ...)`. Raises DamagedTable."""
        stop = self.count(f"{name}.ends") if stop is None else stop
        ends = self.rows(f"{name}.ends", max(start - 1, 0), stop).tolist()
        first = ends.pop(0) if start else 0
        if sorted(ends) != ends or (ends and ends[0] < first):
            raise DamagedTable(f"{name} is not a list of texts")
        data = self.rows(f"{name}.bytes", first, ends[-1] if ends else first).tobytes()
        return [_text(data[a - first : b - first]) for a, b in zip([first, *ends], ends, strict=False)]


def table_bytes(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """The bytes of a table of one-dimensional arrays. Equal content gives equal bytes."""
    layout, parts, offset = [], [], 0
    for name, array in arrays.items():
        assert array.ndim == 1
        kind = array.dtype
        fields = [list(field) for field in kind.descr] if kind.names else kind.str
        data = array.tobytes()
        layout.append([name, fields, len(array), offset])
        parts.append(data + bytes(-len(data) % 8))
        offset += len(parts[-1])
    text = json.dumps({**header, "arrays": layout}, separators=(",", ":")).encode("ascii")
    assert len(text) <= _LONGEST_HEADER
    rest = len(text).to_bytes(4, "little") + text + bytes(-(_HEAD + len(text)) % 8) + b"".join(parts)
    return _MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest


def packed_texts(name: str, texts: list[str]) -> dict[str, Array]:
    """Texts as two arrays of a table: their concatenated bytes, and the end of each."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
    return {f"{name}.ends": smallest(ends), f"{name}.bytes": np.frombuffer(b"".join(encoded), np.uint8)}


def smallest(numbers: Array) -> Array:
    """The same non-negative integers in the smallest unsigned type that holds them."""
    most = int(numbers.max()) if len(numbers) else 0
    return numbers.astype(np.min_scalar_type(most).newbyteorder("<"))


def write_cache_file(path: Path, data: bytes) -> None:
    """Writes a file of the cache folder atomically. Raises DataError if it cannot be written."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}; free some space or set TREERING_CACHE to another folder"
        ) from None


def _aligned(position: int) -> int:
    return position + -position % 8


def _checked_head(head: bytes, size: int, sum_: int) -> int:
    """The length of the header. Raises DamagedTable if magic, sizes or checksum are wrong."""
    length = int.from_bytes(head[12:16], "little")
    whole = len(head) == _HEAD and head[:8] == _MAGIC and length <= min(size - _HEAD, _LONGEST_HEADER)
    if not whole or int.from_bytes(head[8:12], "little") != sum_:
        raise DamagedTable("it is cut short, or its checksum is wrong")
    return length


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedTable("its header is not JSON") from None
    if not isinstance(header, dict):
        raise DamagedTable("its header is not an object")
    return header


def _dtype(fields: Any) -> np.dtype[Any]:
    if isinstance(fields, str) and fields in _PLAIN:
        return np.dtype(fields)
    if not all(isinstance(name, str) and kind in _PLAIN for name, kind in fields):
        raise ValueError
    return np.dtype([(name, kind) for name, kind in fields])


def _read(descriptor: int, size: int, offset: int) -> bytes:
    """Exactly `size` bytes; a single pread returns at most 2 GiB."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise DamagedTable("it is shorter than it was")
        data += more
    return data


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
