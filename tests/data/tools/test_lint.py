"""Lint finds what training would meet: the same samples, for the same reasons; and all that is wrong with shards."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from treering.data import DataConfig, DataError, EvaluationSet, LedgerEntry, Loader, Source, open_source
from treering.data.ledger import read_ledger
from treering.data.shards.parallel import index_all, sweep, sweep_samples
from treering.data.shards.source import shards_of
from treering.data.tools import lint as lint_module
from treering.data.tools.contact_sheet import cards
from treering.data.tools.inspect import inspect
from treering.data.tools.lint import lint, write_ledger
from treering.data.tools.pack import pack

WriteTar = Callable[..., Path]
Members = list[tuple[str, bytes]]


def photo(kind: str = "JPEG", seed: int = 1) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 60 + seed).save(file, kind)
    return file.getvalue()


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


TEXT = ("txt", b"a caption")
PHOTO = ("jpg", photo())
BROKEN: dict[str, tuple[Members, str]] = {
    "cut jpeg": ([("jpg", photo()[:-200]), TEXT], "picture does not decode"),
    "cut png": ([("png", photo("PNG")[:-300]), TEXT], "picture does not decode"),
    "cut webp": ([("webp", photo("WEBP")[:-100]), TEXT], "picture does not decode"),
    "no bytes": ([("jpg", b""), TEXT], "picture does not decode: neither JPEG, PNG nor WebP"),
    "a gif": ([("jpg", photo("GIF")), TEXT], "picture does not decode: neither JPEG, PNG nor WebP"),
    "an html page": ([("jpg", b"<html>404"), TEXT], "picture does not decode: neither JPEG, PNG nor WebP"),
    "bomb": ([("png", huge_png()), TEXT], "picture too large"),
    "named gif": ([("gif", photo("GIF")), TEXT], "no picture: found .gif, .txt"),
    "hostile kind": ([("\x1b[2J", b"x"), TEXT], "no picture: found .\\x1b[2j, .txt"),
    "text alone": ([TEXT], "no picture: found .txt"),
    "picture alone": ([PHOTO], "no caption"),
    "empty": ([PHOTO, ("txt", b" \n")], "caption is empty"),
    "control characters": ([PHOTO, ("txt", b"\x00\x01")], "caption is empty"),
    "latin-1": ([PHOTO, ("txt", b"caf\xe9")], "caption is not UTF-8: byte 0xe9 at 3"),
    "long": ([PHOTO, ("txt", b"a" * 2_000_000)], "caption is too long: 2,000,000 bytes"),
    "cut json": ([PHOTO, ("json", b'{"a": ')], "metadata is not JSON"),
    "json list": ([PHOTO, ("json", b"[1]")], "metadata is not JSON: an object is expected"),
    "captions text": ([PHOTO, ("json", b'{"captions": "b"}')], "metadata is wrong: captions must be"),
    "surrogate": ([PHOTO, ("json", b'{"captions": ["\\ud800"]}')], "caption is not Unicode"),
    "both": ([("jpg", b"x"), ("txt", b"\xff")], "caption is not UTF-8"),
}


def good(key: str) -> Members:
    return [(f"{key}.jpg", photo()), (f"{key}.txt", b"good")]


@pytest.fixture(scope="module")
def broken_url(tmp_path_factory: pytest.TempPathFactory, write_tar: WriteTar) -> str:
    folder = tmp_path_factory.mktemp("broken")
    members = [
        [*[(f"{key}.{kind}", data) for kind, data in own], *good(f"good {key}")] for key, (own, _) in BROKEN.items()
    ]
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", [member for own in members[shard::3] for member in own])
    return str(folder / "*.tar")


@pytest.mark.parametrize("workers", [1, 3])
def test_every_broken_sample_is_found_with_its_reason(broken_url: str, workers: int) -> None:
    calls: list[tuple[int, int]] = []
    found = lint(broken_url, workers, lambda done, total: calls.append((done, total)))
    assert not found.clean
    assert not found.faults
    assert (found.samples, found.shards) == (2 * len(BROKEN), 3)
    assert {entry.key for entry in found.bad} == set(BROKEN)
    for entry in found.bad:
        assert entry.reason.startswith(BROKEN[entry.key][1])
    assert sum(found.kinds.values()) == len(BROKEN)
    assert found.kinds["picture does not decode"] == 6
    assert calls[-1] == (2 * len(BROKEN), 2 * len(BROKEN))


def test_training_and_evaluation_meet_the_same(broken_url: str) -> None:
    expected = {(entry.shard, entry.key, entry.offset, entry.reason) for entry in lint(broken_url).bad}
    config = DataConfig.model_validate({"train": [{"source": broken_url}], "batch": 7})
    with closing(Loader(config, 24, 16, seed=3).batches(0)) as batches:
        steps = -(-2 * len(BROKEN) // 7)  # one pass
        ledger = [entry for batch in islice(batches, steps) for entry in batch.bad]
    assert {(entry.shard, entry.key, entry.offset, entry.reason) for entry in ledger} == expected
    evaluation = EvaluationSet(broken_url, 24, 16)
    entries = [entry for n in range(len(evaluation)) if isinstance(entry := evaluation.sample(n), LedgerEntry)]
    assert {(entry.shard, entry.key, entry.offset, entry.reason) for entry in entries} == expected


def test_all_faults_of_all_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "0.tar", [*good("a"), ("b.jpg", b"x"), ("b.txt", b"b")])
    whole = write_tar(tmp_path / "1.tar", [*good("c"), ("d.jpg", b"x"), ("d.txt", b"d"), *good("e")]).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: whole.index(b"e.txt") + 100])  # of e, the picture is there
    write_tar(tmp_path / "2.tar", [*good("f"), ("f.png", b"2"), ("f.txt", b"3"), ("g.png", b"y"), *good("g")])
    write_tar(tmp_path / "3.tar", [*good("a"), *good("c"), *good("h")])
    (tmp_path / "4.tar").write_bytes(os.urandom(2048))
    write_tar(tmp_path / "5.tar", [])
    for workers in (1, 2):
        found = lint(str(tmp_path / "*.tar"), workers)
        assert [(Path(entry.shard).name, entry.key) for entry in found.bad] == [
            ("0.tar", "b"),
            ("1.tar", "d"),
            ("2.tar", "g"),
        ]
        faults = [(Path(fault.shard).name, fault.reason.replace(str(tmp_path), "")) for fault in found.faults]
        assert [name for name, _ in faults] == ["1.tar", "2.tar", "2.tar", "2.tar", "4.tar", "3.tar", "3.tar"]
        words = ["cut short", "'jpg' and 'png'", "'txt' and 'txt'", "for key 'g'", "not a tar", "'a'", "'c'"]
        assert all(word in reason for (_, reason), word in zip(faults, words, strict=True)), faults
    with pytest.raises(DataError) as error:
        open_source(str(tmp_path / "*.tar"))
    assert str(error.value) == found.faults[0].reason


def test_a_member_too_large_for_the_memory(tmp_path: Path) -> None:
    """Found by the fuzzer. The file is sparse: nothing of it is read, or the test would show it."""
    header = tarfile.TarInfo("big.jpg")
    header.size = 3 << 40
    with open(tmp_path / "0.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(header.size, os.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in [("big.txt", b"x"), *good("a")]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    url = str(tmp_path / "0.tar")
    found = lint(url)
    assert [(entry.key, entry.reason) for entry in found.bad] == [
        ("big", "member too large: .jpg has 3,298,534,883,328 bytes")
    ]
    config = DataConfig.model_validate({"train": [{"source": url}], "batch": 2, "max_bad_fraction": 0.9})
    with closing(Loader(config, 24, 16, seed=0).batches(0)) as batches:
        assert set(next(batches).keys) == {"a"}
    source = open_source(url)
    assert inspect(source, [0, 1])["bad"] == {"member too large": 1}
    assert [card.fault[:16] for card in cards(source, [0, 1])] == ["member too large", ""]
    assert pack(url, str(tmp_path / "set"), "300MB", skip_bad=True).bad == 1


def test_clean_and_empty(tmp_path: Path, write_source: Callable[..., str], write_tar: WriteTar) -> None:
    found = lint(write_source(tmp_path / "good", 2, 5))
    assert (found.clean, found.samples, found.kinds) == (True, 10, {})
    write_tar(tmp_path / "empty" / "0.tar", [])
    found = lint(str(tmp_path / "empty" / "*.tar"))
    assert not found.clean
    assert "is empty" in found.faults[0].reason
    with pytest.raises(DataError, match="not found"):
        lint(str(tmp_path / "none" / "*.tar"))


def test_unreadable_shard_is_one_fault(tmp_path: Path, write_source: Callable[..., str]) -> None:
    url = write_source(tmp_path, 2, 40)
    shards = shards_of(url)
    list(index_all(shards, 1))
    (tmp_path / "part-001.tar").rename(tmp_path / "gone")
    (tmp_path / "part-001.tar").symlink_to(tmp_path / "gone")
    os.truncate(tmp_path / "gone", 600)
    os.utime(tmp_path / "gone", ns=(1, 1))
    found = lint(url, 2)
    assert len(found.faults) == 1
    assert "cut short" in found.faults[0].reason
    assert found.samples == 40


def test_an_unfinished_pack(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(6):
        (tmp_path / "in" / f"{n}.jpg").write_bytes(photo(seed=n))
        (tmp_path / "in" / f"{n}.txt").write_text("x")
    for part, missing in {"0/3": 2, "2/3": 1, "1/3": 0}.items():
        pack(tmp_path / "in", str(tmp_path / "set"), 2, part=part)
        faults = lint(str(tmp_path / "set" / "*.tar")).faults
        assert [f"{3 - missing} of 3 shards exist" in fault.reason for fault in faults] == [True] * (missing > 0)


# Continuing after an interruption


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_known_of_a_shard_is_not_read_again(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """After an interruption it continues with the remaining shards; a changed shard, or another decoder, is read."""
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    for shard in range(4):
        bad = [(f"bad{shard}.jpg", b"x"), (f"bad{shard}.txt", b"y")]
        write_tar(tmp_path / f"{shard}.tar", [*good(f"a{shard}"), *bad, *good(f"b{shard}")])
    url, first = str(tmp_path / "*.tar"), lint(str(tmp_path / "0.tar"))
    (tmp_path / "3.tar").rename(tmp_path / "3")
    calls: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if workers == 1 and len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("treering.data.shards.parallel._SAMPLES_PER_TASK", 3)
    with contextlib.suppress(KeyboardInterrupt):
        lint(url, workers, stop)
    assert calls[0] == (6, 9)  # the first shard was known
    (tmp_path / "3").rename(tmp_path / "3.tar")
    read = tmp_path / "read"
    read.mkdir()
    original = lint_module.examine_sample

    def counted(source: Source, number: int) -> Any:
        (read / source.key(number)).touch()
        return original(source, number)

    monkeypatch.setattr(lint_module, "examine_sample", counted)
    found = lint(url, workers)
    expected = {1: {"2", "3"}, 2: {"3"}}[workers]
    assert {path.name[-1] for path in read.iterdir()} == expected
    assert [entry.key for entry in found.bad] == ["bad0", "bad1", "bad2", "bad3"]
    assert found.bad[0].offset == first.bad[0].offset
    assert found.bad[0].reason == first.bad[0].reason
    assert {entry.source for entry in found.bad} == {url}
    shutil.rmtree(read)
    read.mkdir()
    assert lint(url, workers) == found
    os.utime(tmp_path / "1.tar", (1, 1))
    assert lint(url, workers) == found
    assert {path.name for path in read.iterdir()} == {"a1", "bad1", "b1"}
    for path in (tmp_path / "cache" / "lint").iterdir():
        path.write_text('[["a", ')
    assert lint(url, workers) == found
    assert len(list(read.iterdir())) == 12
    monkeypatch.setattr(lint_module, "version", lambda package: "another")
    shutil.rmtree(read)
    read.mkdir()
    assert lint(url, workers) == found
    assert len(list(read.iterdir())) == 12


def test_a_ledger_of_what_lint_finds(broken_url: str, tmp_path: Path) -> None:
    found = lint(broken_url)
    write_ledger(tmp_path / "new" / "bad.jsonl", found.bad)
    assert read_ledger(tmp_path / "new" / "bad.jsonl") == list(found.bad)
    with pytest.raises(DataError, match=r"cannot write .*; choose another path"):
        write_ledger(tmp_path / "new", found.bad)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bad.jsonl"]


# Index


def test_index_in_parallel_equals_one_by_one(
    tmp_path: Path, write_source: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_source(tmp_path / "data", 7, 5)
    (tmp_path / "data" / "part-003.tar").write_bytes(b"no tar")
    results, files = [], []
    for workers in (1, 4):
        monkeypatch.setenv("TREERING_CACHE", str(tmp_path / f"cache{workers}"))
        results.append([(shard, str(index)) for shard, index in index_all(shards_of(url), workers)])
        files.append({path.name: path.read_bytes() for path in (tmp_path / f"cache{workers}" / "index").iterdir()})
    assert results[0] == results[1]
    assert files[0] == files[1]
    assert len(files[0]) == 6  # of a damaged shard there is none
    assert [Path(shard.url).name for shard, _ in results[0]] == [f"part-{n:03d}.tar" for n in range(7)]
    assert "cut short" in results[0][3][1] or "not a tar" in results[0][3][1]


def test_index_continues_after_an_interruption(
    tmp_path: Path, write_source: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    shards = shards_of(write_source(tmp_path / "data", 6, 3))
    list(index_all(shards[:4], 2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "index").iterdir()}
    assert len(before) == 4
    list(index_all(shards, 2))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "index").iterdir()}
    assert len(after) == 6
    assert before.items() <= after.items()


# Processes


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_sweep_keeps_the_order(workers: int) -> None:
    calls: list[tuple[int, int]] = []
    assert list(sweep(lambda n: (n * n, os.getpid()), range(0), workers)) == []
    assert list(sweep(abs, range(-300, 0), workers)) == [*range(300, 0, -1)]  # more than is handed out ahead
    numbers = [*range(100), 3, 3]
    results = list(sweep_samples(lambda n: (n * n, os.getpid()), numbers, workers, lambda *count: calls.append(count)))
    assert [square for square, _ in results] == [n * n for n in numbers]
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)
    assert calls == [(32, 102), (64, 102), (96, 102), (102, 102)]


@pytest.mark.timeout(60)
def test_a_dead_process_is_an_error() -> None:
    with pytest.raises(DataError, match="processes that read the shards died"):
        list(sweep(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == 30 else n, range(60), 2))


@pytest.mark.timeout(60)
def test_an_interrupt_does_not_wait_for_the_work(tmp_path: Path) -> None:
    code = (
        "import signal, time\n"
        "from treering.data.shards.parallel import sweep\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # pytest may be one who ignores it
        "list(sweep(lambda n: time.sleep(50), range(4), 2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 50
    while len(children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.timeout(60)
def test_an_early_end_and_an_error_leave_no_process() -> None:
    def fail(n: int) -> int:
        if n == 20:
            raise DataError("stop")
        return n

    with pytest.raises(DataError, match="stop"):
        list(sweep(fail, range(100), 2))
    with closing(sweep(abs, range(100), 2)) as results:  # type: ignore[type-var]
        assert next(results) == 0
    assert multiprocessing.active_children() == []
    assert json.dumps(list(sweep(abs, [-1, -2], 2))) == "[1, 2]"
