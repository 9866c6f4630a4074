"""Array columns: additional members of a sample, such as a teacher's embeddings or the frames of a spectrogram.

`data.columns: {teacher: npy}` delivers key.teacher.npy, or key.npy if it is the only column, as Batch.columns: vectors,
or matrices of frames. An .npy file is a small header and raw numbers. The header is checked before it is used: its
dtype must be a plain float and its shape must match the bytes that follow, so no file can unpickle anything or allocate
more memory than its size. Every array must have the dtype and shape of the source's first one, and finite values.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ..errors import BadSample, DataError, shown
from ..storage.files import shown_url
from .captions import probe_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..shards.record import Record
    from ..shards.source import Source

_LONGEST_HEADER = 1000  # bytes; that of a vector has about 100
_FLOATS = ("float16", "float32", "float64")


class _Form(NamedTuple):
    """The dtype and shape that all arrays of a column must have."""

    dtype: str
    shape: tuple[int, ...]
    key: str  # of the sample they were read from

    @staticmethod
    def of(array: NDArray[np.floating], key: str) -> _Form:
        return _Form(array.dtype.name, array.shape, key)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Vectors:
    """The array columns of a run; costs nothing if there are none."""

    def __init__(self, names: Collection[str], sources: Sequence[Source]) -> None:
        """Reads a first array of each column from each source. Raises DataError if there is none, or if dtypes or
        shapes differ."""
        self._members = {name: (f"{name}.npy", "npy") if len(names) == 1 else (f"{name}.npy",) for name in names}
        self.kinds = frozenset(kind for kinds in self._members.values() for kind in kinds)
        self._forms = {name: self._form(name, sources) for name in names}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample's array, by column."""
        return {name: form.shape for name, form in self._forms.items()}

    def read(self, record: Record) -> dict[str, NDArray[np.float32]]:
        """The arrays of a sample by column, float32 [d] or [frames, d]. Raises BadSample."""
        arrays = {}
        for name, form in self._forms.items():
            array = self._array(name, record)
            found = _Form.of(array, record.key)
            if found[:2] != form[:2]:
                raise BadSample(f"column {name} is wrong: {found} instead of {form}, as in {shown(form.key)}")
            with np.errstate(over="ignore"):  # a double out of float32's range becomes infinity, refused below
                arrays[name] = array.astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise BadSample(f"column {name} is wrong: it holds infinity or NaN")
        return arrays

    def _array(self, name: str, record: Record) -> NDArray[np.floating]:
        for kind in self._members[name]:
            if kind in record.fields:
                try:
                    return read_array(record.fields[kind])
                except ValueError as error:
                    raise BadSample(f"column {name} is wrong: {error}") from None
        raise BadSample(f"no column {name}: the sample has no .{' or .'.join(self._members[name])}")

    def _form(self, name: str, sources: Sequence[Source]) -> _Form:
        forms = {source.url: self._first(name, source) for source in sources}
        url, form = next(iter(forms.items()))
        for other, theirs in forms.items():
            if theirs[:2] != form[:2]:
                raise DataError(
                    f"columns.{name}: {shown_url(url)} holds {form}, but {shown_url(other)} {theirs}; a batch needs "
                    f"arrays of one dtype and shape, so regenerate one of them"
                )
        return form

    def _first(self, name: str, source: Source) -> _Form:
        kinds, faults, found = self._members[name], list[str](), Counter[str]()
        numbers = probe_numbers(len(source))
        for number in numbers:
            found.update(source.kinds(number))
            if not set(kinds) & set(source.kinds(number)):
                continue
            record = source.record(number, self.kinds)
            try:
                return _Form.of(self._array(name, record), record.key)
            except BadSample as error:  # the run's ledger will record it
                faults.append(str(error))
        there = ", ".join("." + shown(kind, 20)[1:-1] for kind, _ in found.most_common(6))
        fault = f"; the first one found: {faults[0]}" if faults else ""
        raise DataError(
            f"{shown_url(source.url)}: columns.{name} needs .{' or .'.join(kinds)}, but none of {len(numbers)} "
            f"inspected samples has a valid one; found {there}{fault}"
        )


def present(names: Collection[str], source: Source) -> list[str]:
    """Those of the columns `names` that a source has, judging by its probed samples."""
    if not names:
        return []
    kinds = {kind for number in probe_numbers(len(source)) for kind in source.kinds(number)}
    return [name for name in names if f"{name}.npy" in kinds or (len(names) == 1 and "npy" in kinds)]


def read_array(data: bytes) -> NDArray[np.floating]:
    """The vector or matrix in an .npy file, in native byte order. Raises ValueError for any invalid bytes."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file, max_header_size=_LONGEST_HEADER)
    except Exception:  # the header is parsed as Python literals, which may fail in many ways
        raise ValueError("it has no valid .npy header") from None
    if dtype.name not in _FLOATS or dtype.hasobject:
        raise ValueError(f"its numbers are {ascii(dtype.name)[1:-1][:40]} instead of {', '.join(_FLOATS)}")
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise ValueError(f"its shape is {str(shape)[:60]} instead of that of a vector or a matrix")
    following = len(data) - file.tell()
    if prod(shape) * dtype.itemsize != following:
        raise ValueError(
            f"its header declares {str(prod(shape))[:40]} numbers of {dtype.itemsize} bytes, but {following} follow"
        )
    flat = np.frombuffer(data, dtype, offset=file.tell()).astype(dtype.newbyteorder("="))
    return flat.reshape([int(n) for n in shape], order="F" if by_columns else "C")
