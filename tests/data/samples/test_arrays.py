"""Arrays beside the pictures: delivered as they lie in the shards, and every hostile or odd file refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from treering.data import Batch, DataConfig, DataError, EvaluationSet, Loader, Sample, Source, open_source
from treering.data.samples.arrays import read_array

WriteTar = Callable[..., Path]
HEADER = "no valid .npy header"


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_header(text: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text.encode("latin-1") + data


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
def test_floats(dtype: str) -> None:
    vector = np.random.default_rng(0).normal(size=7).astype(dtype)
    for data in (
        npy(vector),
        with_header(repr({"descr": dtype, "fortran_order": True, "shape": (7,)}), vector.tobytes()),
    ):
        found = read_array(data)
        assert np.array_equal(found, vector)
        assert found.dtype.isnative


@pytest.mark.parametrize("dtype", ["<f2", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_matrices(dtype: str, order: str) -> None:
    matrix = np.asarray(np.random.default_rng(0).normal(size=(4, 3)), dtype, order=order)
    found = read_array(npy(matrix))
    assert np.array_equal(found, matrix)
    assert found.shape == (4, 3)
    assert found.dtype.isnative


class Trap:
    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", HEADER),
        (b"\x93NUMPY\x01", HEADER),
        (b"\x80\x04" + pickle.dumps(Trap()), HEADER),
        (npy(np.zeros(3))[:40], HEADER),
        (b"\x93NUMPY\x03\x00" + npy(np.zeros(3))[8:], HEADER),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'x': 1}"), HEADER),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)" + " " * 9000 + "}"), HEADER),
        (with_header("(" * 900), HEADER),
        (with_header("__import__('os').abort()"), HEADER),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", bytes(12), (2, 0))[:20], HEADER),
        (npy(np.array([Trap()], object), allow_pickle=True), "its numbers are object instead of float16, float32"),
        (npy(np.zeros(3, np.int64)), "its numbers are int64"),
        (npy(np.zeros(3, "f4,f4")), "its numbers are void64"),
        (npy(np.zeros(3, np.complex64)), "its numbers are complex64"),
        (npy(np.array(["a" * 99])), "its numbers are str"),
        (npy(np.zeros((1, 3, 2))), "its shape is (1, 3, 2) instead of that of a vector or a matrix"),
        (npy(np.zeros((3, 0))), "its shape is (3, 0)"),
        (npy(np.zeros((3, 2)))[:-8], "its header declares 6 numbers of 8 bytes, but 40 follow"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -3)}", bytes(24)), "its shape is (-2"),
        (npy(np.zeros(())), "its shape is ()"),
        (npy(np.zeros(0)), "its shape is (0,)"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}", bytes(12)), "its shape is (-3,)"),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,)}"),
            "its header declares 1152921504606846976 numbers of 4 bytes, but 0 follow",
        ),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 800 + ",)}", bytes(8)),
            "its header declares 9999",
        ),
        (npy(np.zeros(3))[:-1], "its header declares 3 numbers of 8 bytes, but 23 follow"),
        (npy(np.zeros(3)) + b"x", "but 25 follow"),
    ],
)  # fmt: skip
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_array(data)
    assert reason in str(error.value)
    assert len(str(error.value)) < 150


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # of Python's own parser
@given(st.binary(max_size=40), st.integers(0, 140))
@settings(max_examples=400, deadline=None)
def test_hostile_bytes(noise: bytes, at: int) -> None:
    whole = npy(np.arange(4.0))
    try:
        vector = read_array(whole[:at] + noise + whole[at + len(noise) :])
    except ValueError:
        pass
    else:
        assert vector.ndim <= 2
        assert vector.nbytes < 200


# In a run


def vector(n: int, dtype: str = "<f4", length: int = 6) -> np.ndarray:
    return np.random.default_rng(n).normal(size=length).astype(dtype)


def url_of(path: Path, write_tar: WriteTar, picture: Callable[..., bytes], rows: list[dict[str, bytes]]) -> str:
    members = []
    for n, row in enumerate(rows):
        own = {"png": picture(n), "txt": f"picture {n}".encode(), **row}
        members += [(f"{n:02}.{kind}", data) for kind, data in own.items()]
    return str(write_tar(path, members))


def loader(*urls: str, columns: dict[str, str], rank: int = 0, world: int = 1) -> Loader:
    train = [{"source": url} for url in urls]
    config = DataConfig.model_validate({"train": train, "batch": 8, "columns": columns})
    return Loader(config, 24, 16, 5, rank, world)


def read(each: Loader, steps: int) -> list[Batch]:
    with closing(each.batches(0)) as batches:  # type: ignore[type-var]
        return list(islice(batches, steps))


@pytest.mark.parametrize(("kind", "dtype"), [("teacher.npy", "<f2"), ("npy", ">f8")])
@pytest.mark.parametrize("world", [1, 2])
def test_delivered_as_they_lie(
    tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes], kind: str, dtype: str, world: int
) -> None:
    url = url_of(tmp_path / "0.tar", write_tar, picture, [{kind: npy(vector(n, dtype))} for n in range(20)])
    for rank in range(world):
        for batch in read(loader(url, columns={"teacher": "npy"}, rank=rank, world=world), 4):
            assert list(batch.columns) == ["teacher"]
            found = batch.columns["teacher"]
            assert found.dtype == torch.float32
            expected = np.stack([vector(int(key), dtype) for key in batch.keys]).astype(np.float32)
            assert np.array_equal(found.numpy(), expected)
    sample = EvaluationSet(url, 24, 16).sample(3)
    assert isinstance(sample, Sample)
    assert sample.columns == {}
    sample = EvaluationSet(url, 24, 16, columns=["teacher"]).sample(3)
    assert np.array_equal(sample.columns["teacher"], vector(3, dtype).astype(np.float32))


def test_frames_are_delivered_as_matrices(tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes]) -> None:
    """One shape for all; in an evaluation, those of the columns asked for that the source has."""
    rows = [{"audio.npy": npy(np.asfortranarray(vector(n, length=12).reshape(4, 3)))} for n in range(9)]
    rows[4] = {"audio.npy": npy(vector(4, length=12))}
    url = url_of(tmp_path / "0.tar", write_tar, picture, rows)
    each = loader(url, columns={"audio": "npy"})
    assert each.columns == {"audio": (4, 3)}
    batches = read(each, 2)
    for batch in batches:
        assert batch.columns["audio"].shape == (8, 4, 3)
        for key, frames in zip(batch.keys, batch.columns["audio"].numpy(), strict=True):
            assert np.array_equal(frames, vector(int(key), length=12).reshape(4, 3))
    reasons = {entry.reason for batch in batches for entry in batch.bad}
    assert reasons == {"column audio is wrong: float32 [12] instead of float32 [4, 3], as in '00'"}
    evaluated = EvaluationSet(url, 24, 16, columns=["depth", "audio"])
    assert list(evaluated.sample(1).columns) == ["audio"]
    assert "instead of float32 [4, 3]" in evaluated.sample(4).reason


def test_two_columns_and_which_member(tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes]) -> None:
    rows = [
        {"teacher.npy": npy(vector(n)), "other.npy": npy(vector(100 + n, length=3)), "npy": b"not read"}
        for n in range(9)
    ]
    url = url_of(tmp_path / "0.tar", write_tar, picture, rows)
    batch = read(loader(url, columns={"teacher": "npy", "other": "npy"}), 1)[0]
    for i, key in enumerate(batch.keys):
        assert np.array_equal(batch.columns["teacher"][i], vector(int(key)))
        assert np.array_equal(batch.columns["other"][i], vector(100 + int(key), length=3))
    assert np.array_equal(
        read(loader(url, columns={"teacher": "npy"}), 1)[0].columns["teacher"][0], vector(int(batch.keys[0]))
    )


def test_nothing_is_read_that_is_not_asked_for(
    tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(tmp_path / "0.tar", write_tar, picture, [{"teacher.npy": b"broken"} for _ in range(9)])
    seen, record = set(), Source.record

    def recorded(self: Source, *arguments: Any) -> Any:
        found = record(self, *arguments)
        seen.update(found.fields)
        return found

    monkeypatch.setattr(Source, "record", recorded)
    batch = read(loader(url, columns={}), 2)[0]
    assert batch.columns == {}
    assert seen == {"png", "txt"}


def test_odd_ones_are_bad_samples(tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes]) -> None:
    wrong, like = "column teacher is wrong:", "instead of float32 [6], as in '01'"
    odd: dict[int, tuple[dict[str, bytes], str]] = {
        2: ({}, "no column teacher: the sample has no .teacher.npy or .npy"),
        5: ({"npy": npy(vector(5, length=7))}, f"{wrong} float32 [7] {like}"),
        6: ({"npy": npy(vector(6, "<f2"))}, f"{wrong} float16 [6] {like}"),
        8: ({"npy": npy(np.array([np.nan] * 6, "<f4"))}, f"{wrong} it holds infinity or NaN"),
        0: ({"npy": b"?"}, f"{wrong} it has no valid .npy header"),
    }  # fmt: skip
    rows = [odd[n][0] if n in odd else {"npy": npy(vector(n))} for n in range(16)]
    url = url_of(tmp_path / "0.tar", write_tar, picture, rows)
    batches = read(loader(url, columns={"teacher": "npy"}), 4)  # 32 positions, two passes
    assert {int(entry.key): entry.reason for batch in batches for entry in batch.bad} == {n: odd[n][1] for n in odd}
    for batch in batches:
        for key, row in zip(batch.keys, batch.columns["teacher"].numpy(), strict=True):
            assert np.array_equal(row, vector(int(key)))


def test_doubles_beyond_floats(tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes]) -> None:
    rows = [{"npy": npy(np.full(2, 1e300 if n == 3 else 1.0))} for n in range(8)]
    url = url_of(tmp_path / "0.tar", write_tar, picture, rows)
    bad = [entry for batch in read(loader(url, columns={"t": "npy"}), 2) for entry in batch.bad]
    assert {entry.reason for entry in bad} == {"column t is wrong: it holds infinity or NaN"}


def test_refused_before_a_run(tmp_path: Path, write_tar: WriteTar, picture: Callable[..., bytes]) -> None:
    none = url_of(tmp_path / "none.tar", write_tar, picture, [{"gif": b"x"} for _ in range(9)])
    with pytest.raises(DataError) as error:
        loader(none, columns={"teacher": "npy"})
    assert str(error.value) == (
        f"{none}: columns.teacher needs .teacher.npy or .npy, but none of 9 inspected samples has a valid one; "
        f"found .png, .txt, .gif"
    )
    broken = url_of(tmp_path / "broken.tar", write_tar, picture, [{"npy": b"x"} for _ in range(9)])
    with pytest.raises(DataError, match=r"found .*; the first one found: column t is wrong: it has no valid"):
        loader(broken, columns={"t": "npy"})
    six, seven = (
        url_of(tmp_path / f"{n}.tar", write_tar, picture, [{"t.npy": npy(vector(0, length=n))} for _ in range(9)])
        for n in (6, 7)
    )
    with pytest.raises(
        DataError, match=r"columns\.t: .*6\.tar holds float32 \[6\], but .*7\.tar float32 \[7\]; a batch"
    ):
        loader(six, seven, columns={"t": "npy"})
    # One .npy cannot be two columns.
    url = url_of(tmp_path / "one.tar", write_tar, picture, [{"a.npy": npy(vector(0)), "npy": npy(vector(1))}] * 9)
    with pytest.raises(DataError, match=r"columns\.b needs \.b\.npy, but none of 9 inspected"):
        loader(url, columns={"a": "npy", "b": "npy"})
    with pytest.raises(ValidationError, match="'a/b' is not a valid name"):
        loader(six, columns={"a/b": "npy"})
    assert open_source(six).kinds(0) == ("png", "txt", "t.npy")
