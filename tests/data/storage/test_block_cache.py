"""The node's cache of remote shards: what is read is always right, whatever happens to the folder meanwhile."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treering.data import CacheConfig
from treering.data.storage import block_cache
from treering.data.storage.block_cache import BlockCache
from treering.data.storage.files import ShardInfo

DATA = random.Random(1).randbytes(300_001)
SHARD = ShardInfo("s3://bucket/one.tar", len(DATA), '"etag"')
BLOCK = 40_000  # eight blocks, of three pieces each
STORED = BLOCK + 3 * 4


class Store:
    """Stands for a bucket in which every shard holds DATA; notes what is fetched."""

    def __init__(self) -> None:
        self.fetched: list[tuple[str, int, int]] = []

    def read(self, shard: ShardInfo, start: int, end: int) -> bytes:
        self.fetched.append((shard.url, start, end))
        return DATA[start:end]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    there = Store()
    monkeypatch.setattr(block_cache, "read_range", there.read)
    return there


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blocks"


def cache(limit: int = 10**9) -> BlockCache:
    return BlockCache(limit, BLOCK)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0


RANGES = st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 90_000)), min_size=1, max_size=20)


@given(asked=RANGES, limit=st.sampled_from([0, 50_000, 100_000, 10**9]))
@example(asked=[(0, 0)], limit=50_000)  # nothing is read: there is not even a folder
@settings(max_examples=60, deadline=None)
def test_any_range_is_right_at_any_limit(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, int]], limit: int
) -> None:
    folder, there = tmp_path_factory.mktemp("cache"), Store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREERING_CACHE", str(folder))
        patch.setattr(block_cache, "read_range", there.read)
        each = cache(limit)
        for start, size in asked:
            assert each.read(SHARD, start, min(start + size, len(DATA))) == DATA[start : start + size]
            assert limit == 0 or held(folder / "blocks") <= limit


def test_a_block_is_fetched_once_by_all_processes_one_after_another(store: Store, folder: Path) -> None:
    for start in range(0, len(DATA) - 7000, 7000):
        each = cache()  # what a new process knows
        assert each.read(SHARD, start, start + 7000) == DATA[start : start + 7000]
    assert store.fetched == [(SHARD.url, start, min(start + BLOCK, len(DATA))) for start in range(0, len(DATA), BLOCK)]


def test_another_version_of_a_shard_is_another_block(store: Store, folder: Path) -> None:
    for shard in (SHARD, ShardInfo(SHARD.url, SHARD.size, '"new"'), ShardInfo("s3://other", SHARD.size, '"etag"')):
        cache().read(shard, 0, 5)
    assert len(store.fetched) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data[:16388] + data[:16388] + data[32776:],  # whole pieces, in a wrong place
    ],
)
def test_a_damaged_block_is_fetched_again(store: Store, folder: Path, damage: Callable[[bytes], bytes]) -> None:
    cache().read(SHARD, 0, BLOCK)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cache().read(SHARD, 0, BLOCK) == DATA[:BLOCK]
    assert len(store.fetched) == 2
    assert path.read_bytes() == whole


def test_blocks_cannot_pass_for_one_another(store: Store, folder: Path) -> None:
    cache().read(SHARD, 0, 2 * BLOCK)
    first, second = folder.iterdir()
    first.write_bytes(second.read_bytes())
    assert cache().read(SHARD, 0, 2 * BLOCK) == DATA[: 2 * BLOCK]


def test_the_longest_unused_blocks_go_first(store: Store, folder: Path) -> None:
    each, old = cache(4 * STORED), time.time() - 1000
    for number in range(4):
        each.read(SHARD, number * BLOCK, number * BLOCK + 1)
        (new,) = [path for path in folder.iterdir() if path.stat().st_mtime > old + 500]
        os.utime(new, (old + number, old + number))
    each.read(SHARD, 10, 20)  # used: not the oldest any more
    each.read(SHARD, 4 * BLOCK, 4 * BLOCK + 1)
    assert held(folder) <= 4 * STORED
    store.fetched.clear()
    each.read(SHARD, 0, 1)
    each.read(SHARD, 4 * BLOCK, 4 * BLOCK + 1)
    assert store.fetched == []
    each.read(SHARD, BLOCK, BLOCK + 1)
    assert len(store.fetched) == 1


def test_only_sources_that_fit_are_cached(store: Store) -> None:
    each = BlockCache(2 * len(DATA))
    local = ShardInfo("/data/one.tar", 10, "")
    assert each.reader([local]) == store.read
    assert each.reader([SHARD] * 3) == store.read
    assert each.reader([SHARD]) == each.read
    assert each.reader([SHARD]) == each.read
    assert each.reader([ShardInfo("s3://small", 10, "")]) == store.read
    assert BlockCache(CacheConfig(limit=None).bytes).reader([SHARD]) == store.read


def test_limits_are_written_as_sizes() -> None:
    assert [CacheConfig(limit=text).bytes for text in ("50GB", "1.5TB", "500MB")] == [
        50 * 10**9,
        15 * 10**11,
        5 * 10**8,
    ]
    for wrong in ("50", "GB", "-1GB", "1 GB", "50GiB"):
        with pytest.raises(ValueError, match="is not a valid size; write one such as 500MB"):
            CacheConfig(limit=wrong)


def test_a_crashed_writer_leaves_nothing_that_matters(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies() -> None:
        monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
        cache().read(SHARD, 0, 5)

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join(20)
    assert process.exitcode == 9
    (left,) = folder.iterdir()
    assert left.suffix == ".part"
    (folder / "notes.txt").write_text("not ours")
    assert cache().read(SHARD, 0, 5) == DATA[:5]
    assert left.exists()  # its writer may live
    os.utime(left, (0, 0))
    assert cache().read(SHARD, BLOCK, BLOCK + 5) == DATA[BLOCK : BLOCK + 5]
    assert not left.exists()
    assert (folder / "notes.txt").exists()


def _read_much(seed: int, failures: multiprocessing.Queue[str]) -> None:
    chance, each = random.Random(seed), cache(4 * STORED)
    for _ in range(300):
        start = chance.randrange(len(DATA))
        end = min(start + chance.randrange(1, 50_000), len(DATA))
        if each.read(SHARD, start, end) != DATA[start:end]:
            failures.put(f"{start}-{end}")
    failures.put("done")


@pytest.mark.timeout(60)
def test_many_processes_one_killed_and_blocks_torn_away_under_them(store: Store, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    victim = context.Process(target=_read_much, args=(99, context.Queue()))
    readers = [context.Process(target=_read_much, args=(seed, results)) for seed in range(3)]
    for process in (victim, *readers):
        process.start()
    chance = random.Random(0)
    while any(process.is_alive() for process in readers):
        files = list(folder.glob("*")) if folder.exists() else []
        if len(files) > 2:
            victim.kill()
        for path in files[: chance.randrange(3)]:
            try:
                if chance.random() < 0.5 or path.suffix == ".part":
                    path.unlink()
                else:
                    os.truncate(path, chance.randrange(STORED))
            except FileNotFoundError:
                pass
        time.sleep(0.005)
    assert [results.get(timeout=5) for _ in readers] == ["done"] * 3


@pytest.mark.parametrize("url", ["s3://b/../../../x", "s3://b//etc/passwd", "https://h/\0", "s3://b/" + "k" * 10_000])
def test_hostile_names_never_become_paths(store: Store, folder: Path, url: str) -> None:
    before = set(folder.parent.parent.iterdir())
    assert cache().read(ShardInfo(url, len(DATA), "../../stamp"), 3, 9) == DATA[3:9]
    (path,) = folder.iterdir()
    assert len(path.name) == 64
    assert path.name.isalnum()
    assert set(folder.parent.parent.iterdir()) - before <= {folder.parent}


def test_a_link_in_the_folder_is_not_followed(store: Store, folder: Path, tmp_path: Path) -> None:
    cache().read(SHARD, 0, 5)
    (path,) = folder.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache().read(SHARD, 0, 5) == DATA[:5]
    assert not path.is_symlink()


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(place)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    monkeypatch.setenv("TREERING_CACHE", str(place))
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_warning(store: Store, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    each = cache()
    for _ in range(2):
        for start in range(0, len(DATA), 10_000):  # more than the disk holds: the cache makes do with less
            assert each.read(SHARD, start, start + 1) == DATA[start : start + 1]
    assert 2 * STORED <= held(small_disk / "blocks") < 190_000
    assert not caplog.records
    (small_disk / "others").write_bytes(bytes(195_000 - held(small_disk / "blocks")))
    for path in (small_disk / "blocks").iterdir():
        path.unlink()
    with (small_disk / "others").open("ab") as file:
        file.write(bytes(195_000 - file.tell()))
    with caplog.at_level(logging.WARNING):
        for start in range(0, len(DATA), 10_000):
            assert each.read(SHARD, start, start + 1) == DATA[start : start + 1]
    assert len(caplog.records) == 1
    assert "reading continues without the cache: free some space" in caplog.text
    assert list((small_disk / "blocks").iterdir()) == []
