"""A short seeded run of the fuzzer, and that it would notice: each kind of planted fault is detected."""

from __future__ import annotations

import io
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from treering.data.errors import BadSample
from treering.data.samples import decode
from treering.data.samples.decode import decode_image
from treering.data.samples.picture_header import MOST_SCANS
from treering.tests.fuzz import hostile, shards


@pytest.mark.timeout(200)
def test_hostile_shards() -> None:
    outcome = shards.fuzz(seed=1, first=0, most=60, minutes=2)
    assert not outcome.faults, outcome.faults
    assert outcome.cases > 5
    assert outcome.counts["usable"] > 5
    assert sum(count for what, count in outcome.counts.items() if what.startswith("bad")) > 10


def test_a_case_is_a_function_of_its_number() -> None:
    first, second = (hostile.shards(random.Random("0/7")) for _ in range(2))
    assert first == second
    assert hostile.shards(random.Random("0/8")) != first


Act = Callable[..., None]


def crash(home: Path, *_: object) -> None:
    os.kill(os.getpid(), 11)


def raised(home: Path, *_: object) -> None:
    raise KeyError("planted")


def endless(home: Path, *_: object) -> None:
    while True:
        pass


def waiting(home: Path, *_: object) -> None:
    time.sleep(60)


def memory(home: Path, *_: object) -> None:
    bytearray(2 << 30)


def written(home: Path, *_: object) -> None:
    (home / "data" / "../../planted").write_text("x")


def moved(home: Path, *_: object) -> None:
    (home / "out" / "x").write_text("x")
    os.rename(home / "out" / "x", home.parent / "planted")


def at_home(home: Path, *_: object) -> None:
    (home / ".profile").write_text("x")


def hostile_name(home: Path, *_: object) -> None:
    (home / "cache" / "a\nb").write_text("x")


def started(home: Path, *_: object) -> None:
    os.system("true")


def unpickled(home: Path, *_: object) -> None:
    import pickle

    pickle.loads(b"cposix\nsystem\n.")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (crash, "death of the process: SIGSEGV"),
        (raised, "KeyError: 'planted'"),
        (endless, "hang: SIGPROF"),
        (waiting, "hang (waiting): SIGALRM"),
        (memory, "MemoryError"),
        (written, "outside the cache: open"),
        (moved, "outside the cache: os.rename"),
        (at_home, "files changed outside the cache: [('"),
        (hostile_name, "a hostile name"),
        (started, "outside the cache: os.system"),
        (unpickled, "outside the cache: pickle.find_class"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_detected(act: Act, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SECONDS", 1.0)
    monkeypatch.setattr(shards, "WALL", 30.0 if act is not waiting else 2.0)
    monkeypatch.setattr(shards, "MEMORY", 1 << 30)

    outcome = shards.fuzz(seed=0, first=0, most=2, minutes=1, act=act)
    assert outcome.cases == 2  # the one after a death too
    assert outcome.faults
    assert words in outcome.faults[0]["what"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("simplejpeg", [True, False])
def test_a_jpeg_of_endless_scans(monkeypatch: pytest.MonkeyPatch, simplejpeg: bool) -> None:
    """Found by the fuzzer: each scan of a few bytes goes over all of a picture of 64 megapixels."""
    if not simplejpeg:
        monkeypatch.setattr(decode, "simplejpeg", None)
    file = io.BytesIO()
    Image.new("L", (64, 64), 99).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    assert decode_image(data).shape == (64, 64, 3)
    frame = data.index(b"\xff\xc2") + 5
    large = data[:frame] + struct.pack(">HH", 8000, 8000) + data[frame + 4 :]
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    with pytest.raises(BadSample, match=r"picture too slow: 60,00\d scans"):
        decode_image(large[:-2] + scan * 60_000 + data[-2:])
    assert MOST_SCANS > 12
