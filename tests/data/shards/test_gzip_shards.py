"""Shards as .tar.gz: what they give is what their tar gives, from unpacked copies in the cache."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treering.data import DataConfig, DataError, Loader, open_source
from treering.data.shards import listing
from treering.data.shards.listing import list_shards
from treering.data.shards.parallel import sweep
from treering.data.storage import gzip_cache
from treering.data.storage.block_cache import BlockCache
from treering.data.storage.files import read_range
from treering.data.storage.find import find
from treering.data.storage.gzip_cache import Unpacked
from treering.data.tools.lint import lint

# .tar.gz

WriteSource = Callable[..., str]
pytestmark = pytest.mark.usefixtures("own_cache")


def zipped(folder: Path, url: str) -> str:
    folder.mkdir(exist_ok=True)
    for path in sorted(Path(url).parent.glob("*.tar")):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    return str(folder / "*.tar.gz")


def test_tar_gz_gives_what_its_tar_gives(
    tmp_path: Path, write_source: WriteSource, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = open_source(write_source(tmp_path / "plain", 3, 4))
    url = zipped(tmp_path / "zipped", plain.url)
    assert not caplog.records
    source = open_source(url)
    assert "3 of 3 shards are .tar.gz, which are read from unpacked copies" in caplog.text
    for n in range(12):
        mine, theirs = source.record(n), plain.record(n)
        assert (mine.key, mine.offset, mine.fields) == (theirs.key, theirs.offset, theirs.fields)
        assert mine.shard.endswith(".tar.gz")
    for path in (own_cache / "unpacked").iterdir():
        path.unlink()  # evicted: unpacked again
    assert source.record(5).fields == plain.record(5).fields
    assert len(list((own_cache / "unpacked").iterdir())) == 1
    config = DataConfig.model_validate({"train": [{"source": url}], "batch": 4, "workers": 2})
    with_workers = Loader(config, 24, 16, seed=0).batches(0)
    assert len(next(with_workers).keys) == 4
    with_workers.close()


def test_lint_looks_into_tar_gz(tmp_path: Path, write_source: WriteSource) -> None:
    found = lint(zipped(tmp_path / "zipped", write_source(tmp_path / "plain", 1, 4)))
    assert (found.clean, found.samples) == (True, 4)


def test_gzip_of_many_parts_and_padding(tmp_path: Path, write_source: WriteSource) -> None:
    (tar,) = [Path(write_source(tmp_path / "plain", 1, 30)).parent / "part-000.tar"]
    data = tar.read_bytes()
    parts = [gzip.compress(data[at : at + 7000]) for at in range(0, len(data), 7000)]
    for n, written in enumerate((b"".join(parts), b"".join(parts) + bytes(200_000), gzip.compress(data, 0))):
        path = tmp_path / f"{n}.tgz"
        path.write_bytes(written)
        with Unpacked().open(find(str(path))[0]) as copy:
            assert copy.read() == data


def test_broken_gzip_is_a_damaged_shard(tmp_path: Path, write_source: WriteSource) -> None:
    tar = Path(write_source(tmp_path / "plain", 1, 4)).parent / "part-000.tar"
    whole = gzip.compress(tar.read_bytes())
    path = tmp_path / "a.tar.gz"
    short = gzip.compress(tar.read_bytes()[:900])
    spoilt = whole[:3000] + bytes(50) + whole[3050:]
    for data, words in {
        b"": "cut short", whole[:5]: "cut short", whole[:-4]: "cut short", whole[: len(whole) // 2]: "cut short",
        spoilt: "not gzip data", whole + b"rubbish": "not gzip data", b"rubbish": "not gzip data",
        gzip.compress(b"no tar" * 100): "is not a tar file at byte 0", short: "cut short",
    }.items():  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(listing.DamagedShard, match=words) as error:
            open_source(str(path))
        assert str(error.value).startswith(f"{path} ")
        assert "byte" in str(error.value)
    assert list((tmp_path / "cache" / "unpacked").glob("*.part")) == []


def test_a_gzip_bomb_is_refused(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
    with pytest.raises(listing.DamagedShard, match=r"is a decompression bomb: [\d,]+ bytes that hold more than 10,"):
        open_source(str(path))
    assert list((own_cache / "unpacked").iterdir()) == []


def test_unpacked_copies_stay_under_the_limit(
    tmp_path: Path, write_source: WriteSource, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = zipped(tmp_path / "zipped", write_source(tmp_path / "plain", 3, 4))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "plain").iterdir())]
    with pytest.raises(DataError, match=r"\.tar\.gz and need [\d,]+ bytes unpacked, but the cache may hold"):
        open_source(url, BlockCache(sum(sizes) - 1))
    found, keeper = list_shards(url), Unpacked(limit=sizes[0] + sizes[1] + sizes[2] - 1)
    for path in (own_cache / "unpacked").iterdir():
        path.unlink()
    for shard in found:
        assert keeper.read(shard, 0, 100) == read_range(find(shard.url.replace("zipped", "plain")[:-3])[0], 0, 100)
        assert sum(path.stat().st_size for path in (own_cache / "unpacked").iterdir()) <= keeper.limit
    with pytest.raises(DataError, match="does not fit in the cache"):
        Unpacked(limit=100).open(found[0])


@pytest.mark.parametrize("after", ["made", "found"])
def test_a_copy_that_is_evicted_while_it_is_read_is_read_on(
    tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Other processes make room at any moment: as soon as a copy is written, or when its file was just opened."""
    tar = Path(write_source(tmp_path / "plain", 1, 4)).parent / "part-000.tar"
    (shard,) = list_shards(zipped(tmp_path / "zipped", str(tar)))
    keeper, whole = Unpacked(), gzip_cache.atomic_file

    @contextmanager
    def evicting(path: Path) -> Iterator[Any]:
        with whole(path) as file:
            yield file
        path.unlink()

    if after == "made":
        monkeypatch.setattr(gzip_cache, "atomic_file", evicting)
    for start in (0, 512, 2048):
        with keeper.open(shard) as copy:
            for path in (tmp_path / "cache" / "unpacked").iterdir():
                path.unlink()
            assert os.pread(copy.fileno(), 100, start) == tar.read_bytes()[start : start + 100]
        assert keeper.read(shard, start, start + 100) == tar.read_bytes()[start : start + 100]


@pytest.mark.slow
def test_processes_that_evict_each_others_copies_all_read(tmp_path: Path) -> None:
    shards, contents = [], []
    for n in range(8):
        contents.append(np.random.default_rng(n).bytes(1 << 20))
        (tmp_path / f"{n}.tar.gz").write_bytes(gzip.compress(contents[-1], 1))
        shards += find(str(tmp_path / f"{n}.tar.gz"))

    def reads(seed: int) -> bool:
        keeper, random = Unpacked(limit=3 << 20), np.random.default_rng(seed)
        for number in random.integers(0, 8, 200).tolist():
            if keeper.read(shards[number], 100, 200) != contents[number][100:200]:
                return False
        return True

    assert all(sweep(reads, range(4), 4))
