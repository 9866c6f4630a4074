"""Packing: there and back through plain `tarfile`, and every refusal leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from treering.data import DataError, open_source
from treering.data.pack import pack

Picture = Callable[..., bytes]


@pytest.fixture
def table(tmp_path: Path, picture: Picture) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for n in range(5):
        (folder / f"p{n}.jpg").write_bytes(picture(n, "jpg"))
    (folder / "more" / "p0.v2.PNG").write_bytes(picture(9))
    lines = [f"p{n}.jpg\tcaption {n} of {i}, 'quoted\" ü" for i in range(2) for n in range(5)] + [
        "more/p0.v2.PNG\tone",
        "",
    ]
    (folder / "captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "captions.tsv"


def members(path: str) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def refused(tmp_path: Path, input: Path, match: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=match) as error:
        pack(input, str(tmp_path / "out" / "set"))
    assert "\n" not in str(error.value)
    assert [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "out" or path in before] == before


def test_table(tmp_path: Path, table: Path) -> None:
    packed = pack(table, str(tmp_path / "out" / "set"), shard_size=4)
    assert (packed.samples, packed.captions) == (6, 11)
    assert [Path(shard).name for shard in packed.shards] == ["set-000000.tar", "set-000001.tar"]
    assert [len(members(shard)) for shard in packed.shards] == [9, 9]  # balanced
    found = members(packed.shards[0]) | members(packed.shards[1])
    for n in range(5):
        assert found[f"p{n}.jpg"] == (table.parent / f"p{n}.jpg").read_bytes()
        captions = [f"caption {n} of {i}, 'quoted\" ü" for i in range(2)]
        assert found[f"p{n}.txt"].decode() == captions[0]
        assert json.loads(found[f"p{n}.json"]) == {"captions": captions}
    assert found["more/p0_v2.png"] == (table.parent / "more" / "p0.v2.PNG").read_bytes()
    source = open_source(str(tmp_path / "out" / "set" / "*.tar"))
    assert sorted(source.key(n) for n in range(len(source))) == ["more/p0_v2", *(f"p{n}" for n in range(5))]
    theirs = list(webdataset.WebDataset(list(packed.shards), shardshuffle=False))
    assert {sample["__key__"] for sample in theirs} == {source.key(n) for n in range(6)}


def test_csv_with_header_and_images_elsewhere(tmp_path: Path, table: Path) -> None:
    csv = tmp_path / "elsewhere.csv"
    csv.write_bytes('\ufefffilepath,caption\r\np0.jpg,"a, b"\r\n\r\np1.jpg,c\r\n'.encode())
    packed = pack(csv, str(tmp_path / "o"), images=table.parent)
    found = members(packed.shards[0])
    assert (found["p0.txt"], found["p1.txt"]) == (b"a, b", b"c")


def test_folder(tmp_path: Path, picture: Picture) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (folder / f"{name}.jpg").write_bytes(picture(1, "jpg"))
        (folder / f"{name}.txt").write_text(f"caption {name}\n", encoding="utf-8")
    (folder / "a.json").write_text(
        '{"captions": ["caption a", "second"], "labels": {"tone": "dark"}, "width": 3}', encoding="utf-8"
    )
    (folder / "README.md").write_text("not a sample", encoding="utf-8")
    packed = pack(folder, str(tmp_path / "out"))
    found = members(packed.shards[0])
    assert sorted(found) == ["a.jpg", "a.json", "a.txt", "sub/b.jpg", "sub/b.json", "sub/b.txt"]
    assert json.loads(found["a.json"]) == {"captions": ["caption a", "second"], "labels": {"tone": "dark"}}
    assert found["sub/b.txt"] == b"caption sub/b"


def test_equal_input_gives_equal_bytes(tmp_path: Path, table: Path) -> None:
    first = pack(table, str(tmp_path / "1" / "set"))
    for path in table.parent.glob("*.jpg"):
        os.utime(path, (1, 1))
    second = pack(table, str(tmp_path / "2" / "set"))
    assert [Path(s).read_bytes() for s in first.shards] == [Path(s).read_bytes() for s in second.shards]


def test_to_a_store(table: Path) -> None:
    packed = pack(table, "memory://bucket/set", shard_size=3)
    assert len(open_source(packed.shards[0].replace("000000", "{000000..000001}"))) == 6
    with pytest.raises(DataError, match="is there already"):
        pack(table, "memory://bucket/set")


def test_refuses_to_overwrite(tmp_path: Path, table: Path) -> None:
    (tmp_path / "out" / "set").mkdir(parents=True)
    refused(tmp_path, table, "is there already; remove it or choose another name")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("p9.jpg\tx", r"line 13: the picture 'p9\.jpg' is missing from"),
        ("../secret.jpg\tx", r"line 13: '\.\./secret\.jpg' lies outside"),
        ("/etc/passwd\tx", r"line 13: '/etc/passwd' lies outside"),
        ("p0\x00.jpg\tx", "is no path"),
        ("p0.jpg\t", "line 13: the caption is empty"),
        ("p0.jpg\tx\ty", "line 13: 3 columns instead of 2"),
        ("p0.jpg", "line 13: 1 columns instead of 2"),
        ("captions.tsv\tx", r"is not \.jpg, \.jpeg, \.png, \.webp"),
        ("p0.jpg\tcaf\udce9", r"line 13: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_bad_lines(tmp_path: Path, table: Path, line: str, match: str) -> None:
    (tmp_path / "secret.jpg").write_bytes((table.parent / "p0.jpg").read_bytes())
    with open(table, "ab") as file:
        file.write(b"\n" + line.encode("utf-8", "surrogateescape"))
    refused(tmp_path, table, match)


def test_link_out_of_the_folder(tmp_path: Path, table: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes((table.parent / "p0.jpg").read_bytes())
    (table.parent / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    table.write_text("link.jpg\tx", encoding="utf-8")
    refused(tmp_path, table, "lies outside")


def test_picture_that_does_not_decode(tmp_path: Path, table: Path) -> None:
    good = (table.parent / "p3.jpg").read_bytes()
    (table.parent / "p3.jpg").write_bytes(good[: len(good) // 2])
    refused(tmp_path, table, r"captions\.tsv, line 4: .*p3\.jpg: picture does not decode")


def test_two_files_with_one_key(tmp_path: Path, table: Path, picture: Picture) -> None:
    (table.parent / "p1.png").write_bytes(picture(1))
    (table.parent / "p1.txt").write_text("x", encoding="utf-8")
    refused(tmp_path, table.parent, r"p1\.(jpg|png) and .*p1\.(jpg|png) are two files for one key, 'p1'")
    table.write_text("p1.jpg\tx\np1.png\ty", encoding="utf-8")
    refused(tmp_path, table, r"p1\.jpg and .*p1\.png are two files for one key, 'p1'")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "is empty: it must hold key.jpg"),
        ({"a.txt": b"x"}, r"a\.txt: no picture"),
        ({"a.jpg": b"x"}, "no caption"),
        ({"a.jpg": b"x", "a.txt": b"caf\xe9"}, r"a\.txt: caption is not UTF-8: byte 0xe9 at 3"),
        ({"a.jpg": b"x", "a.txt": b" "}, r"a\.txt: caption is empty"),
        ({"a.jpg": b"x", "a.txt": b"x", "a.json": b"{"}, r"a\.json: metadata is not JSON"),
        ({"a.jpg": b"x", "a.txt": b"x"}, r"a\.jpg: picture does not decode"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, bytes], match: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    refused(tmp_path, folder, match)


def test_empty_and_missing_tables(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("path\tcaption\n", encoding="utf-8")
    refused(tmp_path, tmp_path / "t.tsv", "is empty")
    (tmp_path / "t.xlsx").write_text("", encoding="utf-8")
    refused(tmp_path, tmp_path / "t.xlsx", "must end in .tsv or .csv")
    refused(tmp_path, tmp_path / "nowhere", "nothing is there")


def test_full_disk(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, sample: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    refused(tmp_path, table, "the disk is full; free some space")
