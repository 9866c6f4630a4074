"""Indexes and summaries: what opening reads, sidecar files, and .tar.gz shards."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering.data import DataConfig, DataError, Loader, Source, open_source
from treering.data.shards import index, listing, opening, table_file
from treering.data.shards.index import cached_at, fits
from treering.data.shards.listing import index_shard, list_shards
from treering.data.shards.parallel import sweep
from treering.data.shards.sidecar import fetch_index, put_index
from treering.data.shards.summary import read_summary, write_summary
from treering.data.shards.table_file import DamagedTable, Table, packed_texts, table_bytes
from treering.data.storage import gzip_cache
from treering.data.storage.block_cache import BlockCache
from treering.data.storage.files import find, read_range
from treering.data.storage.gzip_cache import Unpacked
from treering.data.tools.lint import lint

WriteTar = Callable[..., Path]
WriteSource = Callable[..., str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(source: Source) -> list[Any]:
    return [(source.record(n), source.key(n), source.shard(n), source.offset(n)) for n in range(len(source))]


# Tables

ARRAYS = st.lists(
    st.tuples(
        st.text(max_size=5),
        st.sampled_from(["|u1", "<u2", "<u4", "<u8", "|i1", "<i8", "<f4", "<f8"]),
        st.lists(st.integers(0, 100)),
    ),
    max_size=4,
    unique_by=lambda each: each[0],
)


@given(arrays=ARRAYS, texts=st.lists(st.text(max_size=8).map(lambda t: t.encode("utf-8", "replace").decode())))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_gives_back_what_was_put_in(tmp_path: Path, arrays: list[Any], texts: list[str]) -> None:
    named = {f"{name}!": np.array(values, kind) for name, kind, values in arrays}
    data = table_bytes({"x": [1]}, named | packed_texts("texts", texts))
    (tmp_path / "table").write_bytes(data)
    for table in (Table.parse(data), Table.open(tmp_path / "table")):
        assert table.header == {"x": [1]}
        for name, array in named.items():
            assert table.rows(name).dtype == array.dtype
            for start in range(len(array) + 1):
                assert table.rows(name, start).tolist() == array[start:].tolist()
                assert table.rows(name, 0, start).tolist() == array[:start].tolist()
        assert table.texts("texts") == texts
        assert [table.texts("texts", n, n + 1) for n in range(len(texts))] == [[text] for text in texts]


def test_any_damage_to_a_table_is_seen(tmp_path: Path) -> None:
    data = table_bytes({"x": 1}, {"a": np.arange(20, dtype="<u4")})
    path = tmp_path / "table"
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(DamagedTable):
            Table.open(path)
        path.write_bytes(data[:position])
        with pytest.raises(DamagedTable):
            Table.open(path)


@pytest.mark.parametrize(
    "arrays",
    [
        [["a", "<u4", 1 << 40, 0]],
        [["a", "<u4", 5, -8]],
        [["a", "<u4", 5, 1 << 70]],
        [["a", "O", 5, 0]],
        [["a", "V8", 1, 0]],
        [["a", [["x", "O"]], 1, 0]],
        [["a"]],
        7,
        None,
    ],
)
def test_a_table_that_lies_is_refused(arrays: Any) -> None:
    """Checksums do not protect against a hostile writer."""
    text = json.dumps({"arrays": arrays}).encode()
    rest = len(text).to_bytes(4, "little") + text + bytes(64)
    with pytest.raises(DamagedTable):
        Table.parse(b"treeidx\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest)


# Opening


def test_opening_again_walks_nothing_and_opens_no_index(
    tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_source(tmp_path / "data", 5, 4)
    first = content(open_source(url))
    opened: list[Path] = []
    whole_open = Table.open

    def counted(path: Path) -> Table:
        opened.append(path)
        return whole_open(path)

    monkeypatch.setattr(Table, "open", counted)
    monkeypatch.setattr(listing, "open_content", lambda *_: pytest.fail("a shard was walked"))
    source = open_source(url)
    assert [path.parent.name for path in opened] == ["sources"]
    assert source.shard_lengths.tolist() == [4] * 5
    assert source.shard_lengths.dtype == np.int64
    assert source.size == sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    assert [source.shard(n) for n in (0, 19)] == [str(tmp_path / "data" / f"part-00{n}.tar") for n in (0, 4)]
    source.record(7)
    assert [path.parent.name for path in opened] == ["sources", "index"]
    assert content(source) == first


def test_only_new_and_changed_shards_are_walked(
    tmp_path: Path, write_source: WriteSource, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "data", 3, 4)
    url = str(tmp_path / "data" / "*.tar")
    open_source(url)
    walked: list[str] = []
    whole = listing.open_content

    def counted(shard: Any, read: Any) -> Any:
        walked.append(Path(shard.url).name)
        return whole(shard, read)

    monkeypatch.setattr(listing, "open_content", counted)
    write_tar(tmp_path / "data" / "part-001.tar", [("x.png", b"1"), ("x.txt", b"2")])
    write_tar(tmp_path / "data" / "part-009.tar", [("y.png", b"1"), ("y.txt", b"2")])
    (tmp_path / "data" / "part-002.tar").unlink()
    source = open_source(url)
    assert walked == ["part-001.tar", "part-009.tar"]
    assert [source.key(n) for n in range(len(source))] == ["00000", "00001", "00002", "00003", "x", "y"]


def test_many_shards_are_indexed_by_several_processes(
    tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_source(tmp_path / "data", 20, 2)
    workers: list[int] = []
    whole = opening.sweep

    def counted(work: Any, wanted: Any, count: int, *rest: Any) -> Any:
        workers.append(count)
        return whole(work, wanted, count, *rest)

    monkeypatch.setattr(opening, "sweep", counted)
    monkeypatch.setattr(opening, "enough_workers", lambda _: 3)
    many = content(open_source(url))
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "other"))
    assert content(open_source(url, workers=1)) == many
    open_source(str(tmp_path / "data" / "part-00[01].tar"))
    assert workers == [2, 1, 1]


def test_few_indexes_are_open_at_a_time(
    tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MOST_OPEN", 3)
    source = open_source(write_source(tmp_path / "data", 9, 2))
    keys = [source.key(n) for n in range(18)]
    assert keys == [f"{n:05}" for n in range(18)]
    assert [source.key(n) for n in (17, 0, 9)] == [keys[n] for n in (17, 0, 9)]
    assert len(source._shards._indexes._open) == 3  # type: ignore[attr-defined]


def test_an_index_lost_or_damaged_meanwhile_is_rebuilt(
    tmp_path: Path, write_source: WriteSource, own_cache: Path
) -> None:
    source = open_source(write_source(tmp_path / "data", 1, 4))
    expected = content(source)
    (path,) = (own_cache / "index").iterdir()
    whole = path.read_bytes()
    path.unlink()
    assert content(source) == expected
    path.write_bytes(whole[:200])
    assert content(source) == expected
    assert path.read_bytes() == whole


def test_a_summary_that_is_damaged_or_of_other_shards_is_not_believed(
    tmp_path: Path, write_source: WriteSource, own_cache: Path
) -> None:
    url = write_source(tmp_path / "data", 2, 4)
    expected = content(open_source(url))
    (path,) = (own_cache / "sources").iterdir()
    whole = path.read_bytes()
    for damage in (whole[:-3], b"", whole.replace(b"part-000", b"part-001")):
        path.write_bytes(damage)
        assert content(open_source(url)) == expected
    os.utime(tmp_path / "data" / "part-000.tar", ns=(5, 5))
    assert [row is None for row in read_summary(url, list_shards(url))] == [True, False]


@pytest.mark.parametrize("keys", [("a", "b", "c"), ("ü", "\udcff", "b" * 5000), ("../../x", "/etc/passwd", "a\x1b[2J")])
def test_an_index_row_by_row_is_the_index_as_a_whole(
    tmp_path: Path, write_tar: WriteTar, keys: tuple[str, ...]
) -> None:
    members = [(f"{key}.{kind}", bytes(n)) for n, key in enumerate(keys) for kind in ("PNG", "txt", "a.b", "json")]
    found = index_shard(find(str(write_tar(tmp_path / "data" / "t.tar", members)))[0])
    assert found.keys == [found.key(n) for n in range(len(found))] == list(keys)
    assert found.samples == [found.places(n) for n in range(len(found))]
    assert list(found.samples[1]) == ["png", "txt", "a.b", "json"]
    assert found.usable == 3
    assert found.columns.rows == 3


# Beside the shards


def test_indexes_beside_shards_spare_other_nodes_the_walk(
    tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_source(tmp_path / "data", 3, 4)
    expected = content(open_source(url))
    for shard in list_shards(url):
        put_index(shard)
    write_summary(url, [row for row in read_summary(url, list_shards(url)) if row], beside=True)
    beside = tmp_path / "data" / ".treering"
    assert sorted(path.suffix for path in beside.iterdir()) == [".index"] * 3 + [".source"]
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "another node"))
    with monkeypatch.context() as patch:
        patch.setattr(listing, "open_content", lambda *_: pytest.fail("a shard was walked"))
        assert content(open_source(url)) == expected
        assert len(list((tmp_path / "another node" / "index").iterdir())) == 3
        assert len(open_source(str(tmp_path / "data" / "**"))) == 12  # indexes are no shards
    shutil.move(tmp_path / "data", tmp_path / "moved")  # the stamps stay
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "third node"))
    monkeypatch.setattr(listing, "open_content", lambda *_: pytest.fail("a shard was walked"))
    moved = open_source(url.replace("/data/", "/moved/"))
    assert [each[1] for each in content(moved)] == [each[1] for each in expected]


def test_an_index_beside_another_version_of_the_shard_is_skipped_members(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "data" / "t.tar", [("a.png", b"1"), ("a.txt", b"2")])
    (shard,) = find(str(path))
    index_shard(shard)
    put_index(shard)
    assert fetch_index(shard)
    write_tar(path, [("b.png", b"1"), ("b.txt", b"2")])
    os.utime(path, ns=(7, 7))
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "other"))
    source = open_source(str(path))
    assert source.key(0) == "b"
    beside = tmp_path / "data" / ".treering" / "t.tar.index"
    for hostile in (b"", b"x" * 500, table_bytes({"format": 2}, {})):
        beside.write_bytes(hostile)
        assert fetch_index(find(str(path))[0]) is None


def test_an_index_that_points_outside_its_shard_is_not_followed(tmp_path: Path, write_tar: WriteTar) -> None:
    (shard,) = find(str(write_tar(tmp_path / "data" / "t.tar", [("a.png", b"1"), ("a.txt", b"2")])))
    table = index_shard(shard)._indexes.get(shard).table
    names = ("samples", "keys.ends", "keys.bytes", "kinds.ends", "kinds.bytes", "columns")
    arrays = {name: table.rows(name) for name in names}
    for offset, kind in ((1 << 63, 0), (shard.size, 0), (0, 9)):
        members = np.array([(offset, 1, kind)] * 2, [("offset", "<u8"), ("size", "<u8"), ("kind", "<u8")])
        data = table_bytes(table.header, {**arrays, "members": members})
        assert fits(Table.parse(data), shard)
        cached_at(shard).write_bytes(data)
        with pytest.raises(
            DataError, match=r"the index of .*t\.tar cannot be read \(its members do not fit its samples\)"
        ):
            index_shard(shard).places(0)


# .tar.gz


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


# Names


def test_local_listing_equals_a_plain_one(tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.tar", "a/2.tar", "b/1.tar", "b/.hidden.tar", "a/[x].tar", "a/3.txt"):
        write_tar(tmp_path / "d" / name, [])
    (tmp_path / "d" / "a" / "folder.tar").mkdir()
    (tmp_path / "d" / "a" / "link.tar").symlink_to("1.tar")
    monkeypatch.chdir(tmp_path / "d")
    system = fsspec.filesystem("file")
    globs = ("a/*.tar", "*/1.tar", "**/*.tar", "a/?.tar", "a/[12].tar", "{a,b}/*.tar", "a/{1..2}.tar", "../d/a/1.tar")
    for url in (*globs, f"file://{os.getcwd()}/a/*.tar", "./a/1.tar"):
        found = list_shards(url)
        names = {name for part in listing.expand_braces(url) for name in system.glob(part.removeprefix("file://"))}
        expected = {(os.path.normpath(n), os.stat(n).st_size) for n in names if os.path.isfile(n)}
        assert {(shard.url.removeprefix("file://"), shard.size) for shard in found} == expected, url
        assert [shard.url for shard in found] == sorted(shard.url for shard in found)
        assert all(open_content(shard) for shard in found)


def open_content(shard: Any) -> bool:
    with listing.open_content(shard, read_range) as (file, _):
        return len(file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE


def test_braces_that_name_the_whole_world_are_refused() -> None:
    with pytest.raises(DataError, match=r"names 1,000,000,000,000 shards; at most 10,000,000 are allowed"):
        list_shards("/x/{000000..999999}/{000000..999999}.tar")


def test_writing_where_nothing_can_be_written_says_so(
    tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_source(tmp_path / "data", 1, 2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_file.os, "replace", full)
    with pytest.raises(DataError, match=r"cannot write .*: No space left on device; free some space or set"):
        open_source(url)
