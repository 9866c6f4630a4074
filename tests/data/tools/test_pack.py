"""Packing: there and back through plain `tarfile`, and every refusal leaves nothing behind."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from treering.data import DataError, open_source
from treering.data.ledger import read_ledger
from treering.data.shards.tar_writer import TarWriter, archive_size, member_size
from treering.data.tools.pack import pack
from treering.tests.support.packed import contents, keys, members

Picture = Callable[..., bytes]


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
    captions = ["caption a", "second"]
    assert json.loads(found["a.json"]) == {"captions": captions, "labels": {"tone": "dark"}, "width": 3}
    assert found["sub/b.txt"] == b"caption sub/b"


def test_columns(tmp_path: Path, table: Path) -> None:
    """Further columns become metadata, numbers as numbers; several lines or a list are several captions."""
    lines = [
        "similarity,text,file,nsfw,text,id",
        '0.31,"a, b",p0.jpg,false,second,007',
        "-2,c,p1.jpg,,,7",
        "9,third,p0.jpg,true,a,8",
    ]
    (table.parent / "t.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = [
        {"path": "p2.jpg", "captions": ["x", "y", "x"], "labels": {"kind": "z"}, "boxes": [[1, 2, 3, 4]]},
        {"image_path": "p3.jpg", "caption": "x", "captions": ["w"], "score": 0.5},
        {"path": "p2.jpg", "text": "z"},
    ]
    (table.parent / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    csv = members(pack(table.parent / "t.csv", str(tmp_path / "c")).shards[0])
    jsonl = members(pack(table.parent / "t.jsonl", str(tmp_path / "j")).shards[0])
    captions = ["a, b", "second", "third", "a"]
    assert csv["p0.txt"] == b"a, b"
    expected = {"similarity": 0.31, "nsfw": "false", "id": "007", "captions": captions}
    assert json.loads(csv["p0.json"]) == expected
    assert json.loads(csv["p1.json"]) == {"similarity": -2, "id": 7, "captions": ["c"]}
    assert json.loads(jsonl["p2.json"]) == {
        "captions": ["x", "y", "z"], "labels": {"kind": "z"}, "boxes": [[1, 2, 3, 4]]
    }  # fmt: skip
    assert json.loads(jsonl["p3.json"]) == {"captions": ["x", "w"], "score": 0.5}
    assert (jsonl["p2.txt"], jsonl["p3.txt"]) == (b"x", b"x")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("t.csv", "path,a,b\np0.jpg,x,y", "line 1: which of the columns is the caption"),
        ("t.csv", "path,caption,labels\np0.jpg,x,y", "line 1: a column cannot be called 'labels'"),
        ("t.csv", "path,caption,a,a\np0.jpg,x,1,2", "line 1: a column cannot be called 'a'"),
        ("t.csv", "path,caption,a\np0.jpg,x", "line 2: 2 columns instead of 3"),
        ("t.csv", "path,caption,a\np0.jpg,,3", "line 2: the caption is empty"),
        ("t.jsonl", '{"path": "p0.jpg"', "line 1: not JSON"),
        ("t.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("t.jsonl", "\n[1]", "line 2: not an object"),
        ("t.jsonl", '{"caption": "x"}', "line 1: no path of a picture; put it under the key path"),
        ("t.jsonl", '{"path": "p0.jpg", "captions": "x"}', "line 1: captions must be a list"),
        ("t.jsonl", '{"path": "p0.jpg", "captions": [3]}', "line 1: metadata is wrong: captions must"),
        ("t.jsonl", '{"path": "p0.jpg"}', "line 1: no caption"),
        ("t.jsonl", '{"path": "p0.jpg", "caption": "\\ud800"}', "line 1: caption is not Unicode"),
        ("t.jsonl", '{"path": "%s.jpg", "caption": "x"}' % ("a" * 300), "line 1: .* is not a valid path"),
        ("t.jsonl", '{"path": "\\ud800.jpg", "caption": "x"}', "line 1: .* is not a valid path"),
    ],
)
def test_bad_tables(tmp_path: Path, table: Path, name: str, text: str, match: str) -> None:
    (table.parent / name).write_text(text, encoding="utf-8")
    refused(tmp_path, table.parent / name, match)


def test_equal_input_gives_equal_bytes(tmp_path: Path, table: Path) -> None:
    first = pack(table, str(tmp_path / "1" / "set"))
    for path in table.parent.glob("*.jpg"):
        os.utime(path, (1, 1))
    second = pack(table, str(tmp_path / "2" / "set"))
    assert [Path(s).read_bytes() for s in first.shards] == [Path(s).read_bytes() for s in second.shards]


def test_to_a_store(table: Path) -> None:
    packed = pack(table, "memory://bucket/set", shard_size=3)
    assert len(open_source(packed.shards[0].replace("000000", "{000000..000001}"))) == 6
    assert pack(table, "memory://bucket/set", shard_size=3).written == 0
    with pytest.raises(DataError, match="packed from another input"):
        pack(table, "memory://bucket/set")


@pytest.mark.parametrize("name", ["set/notes.txt", "set/set-000000.tar", "set"])
def test_refuses_what_it_has_not_packed(tmp_path: Path, table: Path, name: str) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("x")
    refused(tmp_path, table, "already exists; remove it or choose another name")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("p9.jpg\tx", r"line 13: the picture 'p9\.jpg' is missing from"),
        ("../secret.jpg\tx", r"line 13: '\.\./secret\.jpg' lies outside"),
        ("/etc/passwd\tx", r"line 13: '/etc/passwd' lies outside"),
        ("p0\x00.jpg\tx", "is not a valid path"),
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
    refused(tmp_path, tmp_path / "t.xlsx", "must end in .tsv, .csv or .jsonl")
    refused(tmp_path, tmp_path / "nowhere", "not found")


def test_full_disk(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, key: str, members: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TarWriter, "write", full)
    refused(tmp_path, table, "the disk is full; free some space")


# Bad samples


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_samples_are_skipped_and_listed(tmp_path: Path, many: Path, workers: int) -> None:
    shutil.copytree(many, tmp_path / "in")
    bad = {"007": b"no picture", "013": (many / "013.jpg").read_bytes()[:300], "050": b""}
    for key, data in bad.items():
        (tmp_path / "in" / f"{key}.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"0(07|13|50)\.jpg: picture does not decode.*or skip bad samples"):
        pack(tmp_path / "in", str(tmp_path / "set"), "100kB", workers=workers)
    packed = pack(tmp_path / "in", str(tmp_path / "set"), "100kB", skip_bad=True, workers=workers)
    assert (packed.samples, packed.captions, packed.bad) == (57, 57, 3)
    found = [entry for path in (tmp_path / "set").glob("*.bad.jsonl") for entry in read_ledger(path)]
    assert {entry.key: Path(entry.shard).name for entry in found} == {key: f"{key}.jpg" for key in bad}
    assert all(entry.reason.startswith("picture does not decode") for entry in found)
    assert sorted(key for shard in keys(tmp_path / "set") for key in shard) == [
        f"{n:03}" for n in range(60) if f"{n:03}" not in bad
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    again = pack(tmp_path / "in", str(tmp_path / "set"), "100kB", skip_bad=True, workers=workers)
    assert (again.written, again.samples, again.captions, again.bad) == (0, 57, 57, 3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before
    with pytest.raises(DataError, match=r"set-00000\d\.bad\.jsonl lists samples that were skipped"):
        pack(tmp_path / "in", str(tmp_path / "set"), "100kB")


def test_shards_are_repacked(tmp_path: Path, write_tar: Callable[..., Path], picture: Picture) -> None:
    """All members as they are, whatever they are; keys of several shards get the shard's number in front."""
    for shard in range(3):
        own = [(f"a/{n}.{kind}", data) for n in range(shard, shard + 4) for kind, data in
               (("png", picture(n)), ("txt", b"x"), ("clip.npy", b"%d" % shard), ("json", b'{"a":  1}'))]  # fmt: skip
        write_tar(tmp_path / "in" / f"{shard}.tar", own)
    for workers in (1, 2):
        packed = pack(str(tmp_path / "in" / "{0..2}.tar"), str(tmp_path / str(workers) / "set"), 5, workers=workers)
        assert (packed.samples, packed.captions, len(packed.shards)) == (12, None, 3)
    assert contents(tmp_path / "1" / "set") == contents(tmp_path / "2" / "set")
    found = {name: data for shard in packed.shards for name, data in members(shard).items()}
    several = {1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2], 4: [1, 2]}
    names = ["a/0", "a/5", *(f"{shard:05}/a/{n}" for n, shards in several.items() for shard in shards)]
    assert sorted(found) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "txt", "json", "clip.npy"))
    assert found["00001/a/2.clip.npy"] == b"1"
    assert found["00001/a/2.json"] == b'{"a":  1}'
    assert found["00002/a/2.png"] == picture(2)
    assert len(open_source(str(tmp_path / "1" / "set" / "*.tar"))) == 12


HOSTILE = [
    "../../x",
    "/etc/x",
    "a/../b",
    "a//b",
    ".",
    "..",
    "a\\..\\b",
    "x" * 10_000,
    "a\nb",
    "\x1b[2J",
    "a\u2028",
    "\udcff",
]


def test_hostile_keys(tmp_path: Path, write_tar: Callable[..., Path], picture: Picture) -> None:
    own = [(f"{key}.{kind}", data) for key in [*HOSTILE, "good", "ü 狗 " * 60]
           for kind, data in (("png", picture(1)), ("txt", b"x"))]  # fmt: skip
    own += [(f"kind.{kind}", data) for kind, data in (("png", picture(1)), ("txt", b"x"), ("../../y", b""))]
    url = str(write_tar(tmp_path / "in.tar", [*own, ("b.png", picture(2)), ("b.txt", b"x"), ("b.\x1b", b"")]))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(
        DataError, match=r"in\.tar at byte \d+: key is unsafe: [^\x00-\x1f]*; repair the shard, or skip"
    ):
        pack(url, str(tmp_path / "set"))
    assert set(tmp_path.rglob("*")) == before
    packed = pack(url, str(tmp_path / "set"), skip_bad=True)
    found = members(packed.shards[0])
    assert {name.rpartition(".")[0] for name in found} == {"good", "ü 狗 " * 60, "kind", "kind.../.."} & {
        name.rpartition(".")[0] for name in found
    }
    assert {"good.png", "good.txt", "ü 狗 " * 60 + ".png"} <= set(found)
    assert not any(".." in name or name.startswith("/") or "\x1b" in name for name in found)
    entries = read_ledger(tmp_path / "set" / "set-000000.bad.jsonl")
    assert all(entry.reason.startswith(("key is unsafe", "no caption", "no picture")) for entry in entries)
    assert packed.bad == len(entries) >= len(HOSTILE) - 3


# Tar


def test_gzipped_shards_are_packed_as_plain_ones(tmp_path: Path, many: Path) -> None:
    plain = pack(many, str(tmp_path / "plain" / "set"), 30)
    (tmp_path / "zipped").mkdir()
    for shard in plain.shards:
        (tmp_path / "zipped" / f"{Path(shard).name}.gz").write_bytes(gzip.compress(Path(shard).read_bytes()))
    again = []
    for name, wanted in (("plain", "set/*.tar"), ("zipped", "*.tar.gz")):
        packed = pack(str(tmp_path / name / wanted), str(tmp_path / f"again-{name}" / "set"), 20)
        again.append([Path(shard).read_bytes() for shard in packed.shards])
    assert len(again[0]) == 3
    assert again[0] == again[1]


def test_archives_are_those_of_plain_tarfile_byte_for_byte(tmp_path: Path) -> None:
    """And so do not depend on the version of webdataset, which writes them."""
    samples = {
        "a": {"txt": b"x", "json": b"", "jpg": bytes(5000)},
        "é" * 30: {"txt": b"y" * 512},
        "long" * 100: {"clip.npy": b"z" * 511},
        "x" * 96: {"txt": b""},
        "x" * 97: {"txt": b""},
    }
    with open(tmp_path / "ours.tar", "wb") as file, TarWriter(file) as writer:
        for key, own in samples.items():
            writer.write(key, own)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key, own in samples.items():
            for kind, content in sorted(own.items()):
                header = tarfile.TarInfo(f"{key}.{kind}")
                header.size, header.mtime, header.mode = len(content), 0, 0o444
                header.uname = header.gname = "bigdata"
                tar.addfile(header, io.BytesIO(content))
    data = (tmp_path / "ours.tar").read_bytes()
    assert data == (tmp_path / "theirs.tar").read_bytes()
    sizes = [member_size(f"{key}.{kind}", len(data)) for key, own in samples.items() for kind, data in own.items()]
    assert archive_size(sum(sizes)) == len(data)
