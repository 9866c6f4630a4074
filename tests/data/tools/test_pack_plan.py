"""The plan of packing: the same shards by any number of processes and parts, balanced, mixed, and continued."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from treering.data import DataError
from treering.data.tools.pack import pack, plan_of
from treering.data.tools.pack_input import items_of
from treering.tests.support.packed import contents, keys

Picture = Callable[..., bytes]


def test_shards_are_balanced_and_mixed(tmp_path: Path, many: Path) -> None:
    pack(many, str(tmp_path / "set"), "200kB")
    sizes = [path.stat().st_size for path in (tmp_path / "set").glob("*.tar")]
    total = sum(path.stat().st_size for path in many.iterdir())
    assert len(sizes) == -(-(sum(sizes) - 10240 * len(sizes)) // 200_000)
    assert total < sum(sizes) < total + 60 * 4096 + len(sizes) * 10240
    assert max(sizes) - min(sizes) < 2 * (21_000 + 6000 + 10240)  # a sample at either end
    shards = keys(tmp_path / "set")
    assert sorted(key for shard in shards for key in shard) == [f"{n:03}" for n in range(60)]
    for shard in shards:  # a shard draws from everywhere
        numbers = [int(key) for key in shard]
        assert max(numbers) - min(numbers) > 30
        assert numbers != sorted(numbers)
    pack(many, str(tmp_path / "other" / "set"), "200kB", seed=1)
    assert keys(tmp_path / "other" / "set") != shards


@pytest.mark.parametrize(("total", "most"), [(1, 1), (10, 3), (10, 10), (10, 11), (97, 8)])
def test_at_most_so_many_samples(many: Path, total: int, most: int) -> None:
    items = items_of(str(many), None) * 2
    ends = plan_of(items[:total], "set", 0, None, most).ends
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert sum(lengths) == total
    assert len(lengths) == -(-total // most)
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1


def test_a_sample_larger_than_a_shard_leaves_no_empty_shard(tmp_path: Path, many: Path, picture: Picture) -> None:
    (tmp_path / "in").mkdir()
    for name, more in {"a": 0, "b": 900_000, "c": 0}.items():
        (tmp_path / "in" / f"{name}.jpg").write_bytes(picture(1, "jpg") + bytes(more))
        (tmp_path / "in" / f"{name}.txt").write_text("x")
    packed = pack(tmp_path / "in", str(tmp_path / "set"), "100kB")
    assert all(keys(tmp_path / "set"))
    assert len(packed.shards) == len(keys(tmp_path / "set")) <= 3


def test_processes_and_parts_come_to_the_same(tmp_path: Path, many: Path) -> None:
    """Any order of parts, of other numbers of parts, repeated, by any number of processes."""
    whole = pack(many, str(tmp_path / "0" / "set"), "100kB")
    assert (whole.written, whole.missing, whole.samples, whole.captions) == (len(whole.shards), 0, 60, 60)
    expected = contents(tmp_path / "0" / "set")
    assert len(expected) == len(whole.shards) + 1 > 8
    pack(many, str(tmp_path / "1" / "set"), "100kB", workers=3)
    assert contents(tmp_path / "1" / "set") == expected
    out = str(tmp_path / "2" / "set")
    missing = []
    for part in ("2/3", "2/3", "0/2", "1/3", "3/4", "0/1"):
        packed = pack(many, out, "100kB", part=part, workers=2)
        missing.append(packed.missing)
        first, parts = map(int, part.split("/"))
        own = keys(tmp_path / "0" / "set")[first::parts]
        assert packed.part == len(own)
        assert packed.samples == packed.captions == sum(map(len, own))
        assert {name: data for name, data in expected.items() if name in contents(tmp_path / "2" / "set")} == contents(
            tmp_path / "2" / "set"
        )
    assert missing[0] == missing[1] > missing[2] > missing[-1] == 0
    assert contents(tmp_path / "2" / "set") == expected


def test_parts_at_the_same_time(tmp_path: Path, many: Path) -> None:
    """Two processes that write all of the same shards, and a third that writes some, do not disturb one another."""
    pack(many, str(tmp_path / "0" / "set"), "100kB")
    context = multiprocessing.get_context("fork")
    out = str(tmp_path / "1" / "set")
    racers = [
        context.Process(target=pack, args=(many, out, "100kB"), kwargs={"part": part}) for part in ("0/1", "0/1", "1/2")
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert contents(tmp_path / "1" / "set") == contents(tmp_path / "0" / "set")


@pytest.mark.timeout(90)
def test_a_killed_pack_continues(tmp_path: Path, many: Path) -> None:
    pack(many, str(tmp_path / "0" / "set"), "100kB")
    expected, folder = contents(tmp_path / "0" / "set"), tmp_path / "1" / "set"
    kwargs = {"progress": lambda done, total: time.sleep(0.2)}
    killed = multiprocessing.get_context("fork").Process(
        target=pack, args=(many, str(folder), "100kB"), kwargs=kwargs
    )  # fmt: skip
    killed.start()
    while len(list(folder.glob("*.tar"))) < 3:
        time.sleep(0.01)
    os.kill(killed.pid or 0, signal.SIGKILL)
    killed.join()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert 3 <= len(finished) < len(expected) - 1
    half, whole = sorted(finished)[:2]
    half.write_bytes(half.read_bytes()[:-512])  # as a file system may leave it when the power fails
    left = [folder / f".set-{n:06}.tar.0123456789abcdef.part" for n in (1, len(expected) - 2)]
    for path in left:
        path.write_bytes(b"begun")
    packed = pack(many, str(folder), "100kB", workers=2)
    assert packed.written == len(expected) - 1 - len(finished) + 1
    assert contents(folder) == expected
    assert whole.stat().st_mtime_ns == finished[whole]


def test_another_input_is_refused(tmp_path: Path, many: Path, table: Path) -> None:
    pack(many, str(tmp_path / "set"), "100kB", part="0/9")
    before = contents(tmp_path / "set")
    for input, size, seed in ((table, "100kB", 0), (many, "90kB", 0), (many, "100kB", 1)):
        with pytest.raises(DataError, match="packed from another input, or with another seed or shard size"):
            pack(input, str(tmp_path / "set"), size, seed=seed, part="1/9")
    assert contents(tmp_path / "set") == before
    (tmp_path / "set" / "packing.json").write_text("{")
    with pytest.raises(DataError, match="packed from another input"):
        pack(many, str(tmp_path / "set"), "100kB")


@pytest.mark.parametrize("part", ["", "1", "8/8", "-1/8", "0/0", "a/b", "0/8/9", "1e3/8"])
def test_no_part(tmp_path: Path, many: Path, part: str) -> None:
    with pytest.raises(DataError, match=r"must be i/n with i from 0 to n - 1"):
        pack(many, str(tmp_path / "set"), part=part)


@pytest.mark.parametrize("size", ["0", "0MB", "300", "3 TB", "MB", "1e9", "300 mb"])
def test_no_size(tmp_path: Path, many: Path, size: str) -> None:
    if size == "300":
        assert len(pack(many, str(tmp_path / "set"), size).shards) == 1
        return
    with pytest.raises(DataError, match="must be a size such as 300MB or 1GB, or a number of samples"):
        pack(many, str(tmp_path / "set"), size)
