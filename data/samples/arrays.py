"""Further members of a sample that a recipe asks for: a teacher's embeddings, or the frames of a sound.

`data.columns: {teacher: npy}` delivers key.teacher.npy, or key.npy if it is the only column, as Batch.columns: vectors,
or matrices of frames. An .npy file is a small header and raw numbers. The header is checked before anything is made of
it: its dtype must be a plain float and its shape that of the bytes that follow, so no file can unpickle, or ask for
more memory than it brings. Every array must be like the first one of the source, whoever reads it, and all its numbers
finite.
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
from .captions import looks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..shards.record import Record
    from ..shards.source import Source

_LONGEST_HEADER = 1000  # bytes; that of a vector has about 100
_FLOATS = ("float16", "float32", "float64")


class _Form(NamedTuple):
    """What all arrays of a column are like."""

    dtype: str
    shape: tuple[int, ...]
    key: str  # the sample that says so

    @staticmethod
    def of(array: NDArray[np.floating], key: str) -> _Form:
        return _Form(array.dtype.name, array.shape, key)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Vectors:
    """The columns of a run, of vectors or matrices. Neither reads nor costs anything where none is asked for."""

    def __init__(self, names: Collection[str], sources: Sequence[Source]) -> None:
        """Looks for a first array of each column in each source. Raises DataError where there is none, or they
        differ."""
        self._members = {name: (f"{name}.npy", "npy") if len(names) == 1 else (f"{name}.npy",) for name in names}
        self.kinds = frozenset(kind for kinds in self._members.values() for kind in kinds)
        self._forms = {name: self._form(name, sources) for name in names}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one sample's array, by column."""
        return {name: form.shape for name, form in self._forms.items()}

    def read(self, record: Record) -> dict[str, NDArray[np.float32]]:
        """The arrays of a sample by column, float32 [d] or [frames, d]. Raises BadSample."""
        arrays = {}
        for name, form in self._forms.items():
            array = self._array(name, record)
            found = _Form.of(array, record.key)
            if found[:2] != form[:2]:
                raise BadSample(f"column {name} is wrong: {found} instead of {form}, as in {shown(form.key)}")
            with np.errstate(over="ignore"):  # a double beyond floats is infinity, which is refused
                arrays[name] = array.astype(np.float32)
            if not np.isfinite(arrays[name]).all():
                raise BadSample(f"column {name} is wrong: it holds infinity, or what is no number")
        return arrays

    def _array(self, name: str, record: Record) -> NDArray[np.floating]:
        for kind in self._members[name]:
            if kind in record.fields:
                try:
                    return read_array(record.fields[kind])
                except ValueError as error:
                    raise BadSample(f"column {name} is wrong: {error}") from None
        raise BadSample(f"no column {name}: there is no .{' or .'.join(self._members[name])}")

    def _form(self, name: str, sources: Sequence[Source]) -> _Form:
        forms = {source.url: self._first(name, source) for source in sources}
        url, form = next(iter(forms.items()))
        for other, theirs in forms.items():
            if theirs[:2] != form[:2]:
                raise DataError(
                    f"columns.{name}: {shown_url(url)} holds {form}, but {shown_url(other)} {theirs}; a batch needs "
                    f"arrays of one kind, so make one of them anew"
                )
        return form

    def _first(self, name: str, source: Source) -> _Form:
        kinds, faults, found = self._members[name], list[str](), Counter[str]()
        numbers = looks(len(source))
        for number in numbers:
            found.update(source.kinds(number))
            if not set(kinds) & set(source.kinds(number)):
                continue
            record = source.record(number, self.kinds)
            try:
                return _Form.of(self._array(name, record), record.key)
            except BadSample as error:  # the run's ledger will name it
                faults.append(str(error))
        there = ", ".join("." + shown(kind, 20)[1:-1] for kind, _ in found.most_common(6))
        fault = f"; the first that is there: {faults[0]}" if faults else ""
        raise DataError(
            f"{shown_url(source.url)}: columns.{name} asks for .{' or .'.join(kinds)}, but of {len(numbers)} samples "
            f"looked at none has an array there; found {there}{fault}"
        )


def present(names: Collection[str], source: Source) -> list[str]:
    """Those of the columns `names` that a source has, by the members of the samples looked at."""
    if not names:
        return []
    kinds = {kind for number in looks(len(source)) for kind in source.kinds(number)}
    return [name for name in names if f"{name}.npy" in kinds or (len(names) == 1 and "npy" in kinds)]


def read_array(data: bytes) -> NDArray[np.floating]:
    """The vector or matrix in an .npy file, in the machine's byte order. Raises ValueError, whatever the bytes are."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file, max_header_size=_LONGEST_HEADER)
    except Exception:  # the header is parsed as Python's literals, which may fail in many ways
        raise ValueError("it has no header of an .npy file") from None
    if dtype.name not in _FLOATS or dtype.hasobject:
        raise ValueError(f"its numbers are {ascii(dtype.name)[1:-1][:40]} instead of {', '.join(_FLOATS)}")
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise ValueError(f"its shape is {str(shape)[:60]} instead of that of a vector or a matrix")
    there = len(data) - file.tell()
    if prod(shape) * dtype.itemsize != there:
        raise ValueError(
            f"its header speaks of {str(prod(shape))[:40]} numbers of {dtype.itemsize} bytes, but {there} bytes follow"
        )
    flat = np.frombuffer(data, dtype, offset=file.tell()).astype(dtype.newbyteorder("="))
    return flat.reshape([int(n) for n in shape], order="F" if by_columns else "C")
