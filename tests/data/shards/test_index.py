"""Indexes and summaries: what opening reads, and sidecar files."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering.data import DataError, Source, open_source
from treering.data.shards import index, listing, opening, table_file
from treering.data.shards.index import cached_at, fits
from treering.data.shards.listing import index_shard, list_shards
from treering.data.shards.sidecar import fetch_index, put_index
from treering.data.shards.summary import read_summary, write_summary
from treering.data.shards.table_file import DamagedTable, Table, packed_texts, table_bytes
from treering.data.storage.files import read_range
from treering.data.storage.find import find

WriteTar = Callable[..., Path]
WriteSource = Callable[..., str]
pytestmark = pytest.mark.usefixtures("own_cache")


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
