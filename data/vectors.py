"""Further members of a sample that a recipe asks for: vectors kept beside the pictures, such as a teacher's embeddings.

`data.columns: {teacher: npy}` delivers key.teacher.npy, or key.npy if it is the only column, as Batch.columns. An .npy
file is a small header and raw numbers. The header is checked before anything is made of it: its dtype must be a plain
float and its shape that of the bytes that follow, so no file can unpickle, or ask for more memory than it brings.
Every vector must be like the first one of the source, whoever reads it, and all its numbers finite.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.lib import format as npy

from .captions import looks
from .config import DataError
from .files import shown_url
from .ledger import BadSample, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .record import Record
    from .source import Source

_LONGEST_HEADER = 1000  # bytes; that of a vector has about 100
_FLOATS = ("float16", "float32", "float64")


class _Form(NamedTuple):
    """What all vectors of a column are like."""

    dtype: str
    length: int
    key: str  # the sample that says so

    def __str__(self) -> str:
        return f"{self.dtype} [{self.length}]"


class Vectors:
    """The columns of vectors of a run. Neither reads nor costs anything where none is asked for."""

    def __init__(self, names: Collection[str], sources: Sequence[Source]) -> None:
        """Looks for a first vector of each column in each source. Raises DataError where there is none, or they
        differ."""
        self._members = {name: (f"{name}.npy", "npy") if len(names) == 1 else (f"{name}.npy",) for name in names}
        self.kinds = frozenset(kind for kinds in self._members.values() for kind in kinds)
        self._forms = {name: self._form(name, sources) for name in names}

    def read(self, record: Record) -> dict[str, NDArray[np.float32]]:
        """The vectors of a sample by column, float32 [d]. Raises BadSample."""
        vectors = {}
        for name, form in self._forms.items():
            vector = self._vector(name, record)
            if (vector.dtype.name, len(vector)) != form[:2]:
                found = f"{vector.dtype.name} [{len(vector)}]"
                raise BadSample(f"column {name} is wrong: {found} instead of {form}, as in {shown(form.key)}")
            with np.errstate(over="ignore"):  # a double beyond floats is infinity, which is refused
                vectors[name] = vector.astype(np.float32)
            if not np.isfinite(vectors[name]).all():
                raise BadSample(f"column {name} is wrong: it holds infinity, or what is no number")
        return vectors

    def _vector(self, name: str, record: Record) -> NDArray[np.floating]:
        for kind in self._members[name]:
            if kind in record.fields:
                try:
                    return read_vector(record.fields[kind])
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
                    f"vectors of one kind, so make one of them anew"
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
                vector = self._vector(name, record)
            except BadSample as error:  # the run's ledger will name it
                faults.append(str(error))
                continue
            return _Form(vector.dtype.name, len(vector), record.key)
        there = ", ".join("." + shown(kind, 20)[1:-1] for kind, _ in found.most_common(6))
        fault = f"; the first that is there: {faults[0]}" if faults else ""
        raise DataError(
            f"{shown_url(source.url)}: columns.{name} asks for .{' or .'.join(kinds)}, but of {len(numbers)} samples "
            f"looked at none has a vector there; found {there}{fault}"
        )


def read_vector(data: bytes) -> NDArray[np.floating]:
    """The vector in an .npy file, in the machine's byte order. Raises ValueError, whatever the bytes are."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, _, dtype = read(file, max_header_size=_LONGEST_HEADER)
    except Exception:  # the header is parsed as Python's literals, which may fail in many ways
        raise ValueError("it has no header of an .npy file") from None
    if dtype.name not in _FLOATS or dtype.hasobject:
        raise ValueError(f"its numbers are {ascii(dtype.name)[1:-1][:40]} instead of {', '.join(_FLOATS)}")
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"its shape is {str(shape)[:60]} instead of one row of numbers")
    there = len(data) - file.tell()
    if shape[0] * dtype.itemsize != there:
        raise ValueError(
            f"its header speaks of {str(shape[0])[:40]} numbers of {dtype.itemsize} bytes, but {there} bytes follow"
        )
    return np.frombuffer(data, dtype, offset=file.tell()).astype(dtype.newbyteorder("="))


def stack(samples: Sequence[Mapping[str, NDArray[np.float32]]]) -> dict[str, NDArray[np.float32]]:
    """The vectors of several samples by column, [b, d]."""
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
