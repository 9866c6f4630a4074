"""Whatever is in an archive is a member of a sample or counted by what it is, and the bytes add up to the file: random
archives with random rubbish, against Python's tarfile and WebDataset."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from treering.data import open_source
from treering.data.shards import account as headings
from treering.data.shards.account import Account, Count, parsed, total
from treering.data.shards.listing import index_shard, walk
from treering.data.storage.find import find
from treering.data.tools.lint import lint
from treering.launch.commands.data_index import source_notes

WriteTar = Callable[..., Path]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def member(name: str, data: bytes = b"", format: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    """The bytes of one member; `v7` blanks what the oldest tars do not have."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    v7 = fields.pop("v7", False)
    for field, value in fields.items():
        setattr(info, field, value)
    encoded = info.tobuf(format, "utf-8", "surrogateescape")
    if v7:
        block = bytearray(encoded[-512:])
        block[156:157], block[257:512] = b"\0", bytes(255)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        encoded = encoded[:-512] + bytes(block)
    return encoded + data + bytes(-len(data) % 512)


def gnu_sparse(name: str, data: bytes, extended: bool) -> bytes:
    """A sparse file in GNU's old form, with or without a further block of its map."""
    block = bytearray(member(name, data, type=tarfile.GNUTYPE_SPARSE)[:512])
    block[386:410] = b"%011o\0%011o\0" % (4096, len(data))
    block[482] = extended
    block[483:495] = b"%011o\0" % (4096 + len(data))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512 * extended) + data + bytes(-len(data) % 512)


def pax_sparse(name: str, data: bytes) -> bytes:
    """A sparse file in the form that GNU tar writes into pax archives: the map is the first block of the data."""
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": "9999"}
    rows = b"1\n%d\n%d\n" % (9999 - len(data), len(data))
    content = rows + bytes(512 - len(rows)) + data
    return member(f"GNUSparseFile.1/{name}", content, tarfile.PAX_FORMAT, pax_headers=fields)


KEYS = st.sampled_from(["a", "b", "x/a", "a/b/c", "./d", "__a", "__a__", "a__", "-", "ü", "k" * 120])
NAMES = st.one_of(
    st.builds(
        "{}.{}".format, KEYS, st.sampled_from(["jpg", "PNG", "txt", "json", "cls", "npy", "v2.jpg", "a.b.c", "", "tar"])
    ),
    KEYS,
    st.sampled_from(
        [".jpg", ".hidden", "x/.DS_Store", "x/._a.jpg", "x/.txt", "x/.JPG", "__m__", "__x__.y__", "a.", "."]
    ),
    st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
        lambda name: not name.endswith("/")
    ),
)
DATA = st.one_of(st.binary(max_size=600), st.just(PNG))


@dataclass(frozen=True)
class Part:
    """Some bytes of an archive, described by how they are made."""

    make: Callable[..., bytes]
    arguments: tuple[Any, ...]

    def bytes(self) -> bytes:
        return self.make(*self.arguments)


def plain(name: str, data: bytes, format: int) -> bytes:
    """A file in one of the formats; -1: that of the oldest tars. Long names need a format that has them."""
    return member(name, data, v7=True) if format < 0 else member(name, data, format)


def other(name: str, kind: bytes) -> bytes:
    return member(name, type=kind, linkname="a.jpg")


def old_folder(name: str) -> bytes:
    return member(f"{name}/", v7=True, type=tarfile.AREGTYPE)


def global_header() -> bytes:
    return tarfile.TarInfo.create_pax_global_header({"comment": "made by git"}) + plain("last", b"", 1)


def parts(make: Callable[..., bytes], *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Part]:
    return st.builds(Part, st.just(make), st.tuples(*arguments))


SHORT = NAMES.filter(lambda name: len(name.encode()) < 100)
LONG = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
OTHERS = [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"V", b"Z"]
SPARSE = st.sampled_from(["sparse.jpg", "sparse"])
SOME = st.binary(min_size=1, max_size=600)
PART = st.one_of(
    parts(plain, NAMES, DATA, LONG),
    parts(plain, SHORT, DATA, st.sampled_from((*FORMATS, -1))),
    parts(other, SHORT, st.sampled_from(OTHERS)),
    parts(old_folder, st.sampled_from(["d", "d.jpg"])),
    parts(gnu_sparse, SPARSE, SOME, st.booleans()),
    parts(pax_sparse, SPARSE, SOME),
    parts(global_header),
)
ARCHIVE = st.lists(PART, max_size=7)
ENDS = [bytes(1024), bytes(512), bytes(10240), bytes(1024) + b"not a tar", bytes(1536) + b"\1" * 700]


def joined(archive: list[Part]) -> bytes:
    return b"".join(part.bytes() for part in archive)


def webdatasets(path: Path) -> list[tuple[str, str, bytes]]:
    """What WebDataset reads: key, kind and bytes of every member of a sample."""

    def read_on(error: Exception) -> bool:
        raise error

    with open(path, "rb") as stream:
        files = tar_file_expander([{"url": str(path), "stream": stream}], handler=read_on)
        return [
            (sample["__key__"], kind, data)
            for sample in group_by_keys(files, handler=lambda _: True)
            for kind, data in sample.items()
            if not kind.startswith("__")
        ]


def hidden(key: str, kind: str) -> bool:
    """Whether a file is hidden, which WebDataset takes for a part of the sample `folder/`."""
    return key.endswith("/") and kind not in ("jpg", "jpeg", "png", "webp", "txt", "json")


def expected_heading(info: tarfile.TarInfo, file: tarfile.TarFile) -> str:
    """Where a member is counted, by tarfile and WebDataset's own rules; "" for a member of a sample."""
    if info.issparse():
        return headings.SPARSE
    if not info.isreg():
        return {
            tarfile.DIRTYPE: headings.DIRECTORIES, tarfile.SYMTYPE: headings.LINKS, tarfile.LNKTYPE: headings.LINKS
        }.get(info.type, headings.SPECIAL)  # fmt: skip
    meta = "/" not in info.name and info.name.startswith("__") and info.name.endswith("__")
    last = info.name.rpartition("/")[2]
    key, kind = base_plus_ext(info.name.replace("\n", " "))
    if key is not None and not meta and not hidden(key, kind.lower()):
        return ""
    content = file.extractfile(info)
    assert content is not None
    if content.read(8) == PNG[:8]:
        return headings.PICTURES
    return (
        headings.UNDERSCORED if last.startswith("__") else headings.HIDDEN if last[:1] == "." else headings.NO_EXTENSION
    )


@given(first=ARCHIVE, behind=st.lists(ARCHIVE, max_size=2), end=st.integers(0, 4))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_member_and_every_byte_is_accounted_for(
    tmp_path: Path, first: list[Part], behind: list[list[Part]], end: int
) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(1024).join(joined(archive) for archive in (first, *behind)) + ENDS[end])
    index, faults = walk(find(str(path))[0])
    account = index.account
    assert account.bytes == path.stat().st_size

    with tarfile.open(path) as tar:
        expected = Counter(expected_heading(info, tar) for info in tar)
    others = 0
    for archive in behind:
        with tarfile.open(fileobj=io.BytesIO(joined(archive) + bytes(1024))) as tar:
            others += len(tar.getmembers())
    counts = {name: count.members for name, count in account.counts.items()}
    assert counts.pop(headings.BEHIND, 0) == others
    twice = counts.pop(headings.TWICE, 0)
    assert len(faults) == twice
    assert counts.pop(headings.SAMPLES, 0) + counts.pop(headings.OTHER, 0) + twice == expected.pop("", 0)
    assert {name: count for name, count in counts.items() if count} == expected
    assert account.members == sum(expected.values()) + others + sum(map(len, index.samples)) + twice

    data = path.read_bytes()
    ours = {
        (key, kind, data[at : at + size])
        for key, kinds in zip(index.keys, index.samples, strict=True)
        for kind, (at, size) in kinds.items()
    }
    if not faults:
        assert {each for each in webdatasets(path) if each[0] != "sparse" and not hidden(*each[:2])} <= ours


@given(first=ARCHIVE, cut=st.integers(1, 3000))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bytes_behind_a_damage_are_counted_too(tmp_path: Path, first: list[Part], cut: int) -> None:
    path = tmp_path / "0.tar"
    data = joined(first) + bytes(1024)
    path.write_bytes(data[:-cut])
    index, faults = walk(find(str(path))[0])
    assert index.account.bytes == max(0, len(data) - cut)
    assert faults or cut <= 512


def test_headings_by_hand(tmp_path: Path) -> None:
    """One of each, in the index, in lint and in the line at the start of a run; and the same in a .tar.gz."""
    parts = [
        member("a.jpg", PNG), member("a.txt", b"x"), member("a.mask.npy", b"m"), member("d/", type=tarfile.DIRTYPE),
        member("l.jpg", type=tarfile.SYMTYPE, linkname="a.jpg"), member("p", type=tarfile.FIFOTYPE),
        gnu_sparse("s.jpg", b"x" * 20, True), pax_sparse("t.jpg", b"y" * 20), member("__meta__", b"m"),
        member("README", b"r"), member("x/._a.jpg", b"\0\5\26\7"), member("00001", PNG), bytes(1024),
        member("b.jpg", PNG), member("b.txt", b"z"), bytes(1024), b"rest",
    ]  # fmt: skip
    (tmp_path / "0.tar").write_bytes(b"".join(parts))
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(b"".join(parts)))
    expected = {
        headings.SAMPLES: (2, 3 * 512 + 512), headings.OTHER: (1, 1024), headings.DIRECTORIES: (1, 512),
        headings.LINKS: (1, 512), headings.SPECIAL: (1, 512), headings.SPARSE: (2, 1536 + 4 * 512 + 512),
        headings.BEHIND: (2, 2048), headings.TRAILING: (0, 4), headings.HIDDEN: (1, 1024),
        headings.UNDERSCORED: (1, 1024), headings.NO_EXTENSION: (1, 1024), headings.PICTURES: (1, 1024),
        headings.END: (0, 2048),
    }  # fmt: skip
    for shard in find(str(tmp_path / "?.tar*")):
        found = index_shard(shard).account
        assert {name: tuple(count[:2]) for name, count in found.counts.items()} == expected
        assert found.bytes == len(b"".join(parts))
    assert found.counts[headings.PICTURES].example == "'00001'"

    url = str(tmp_path / "0.tar")
    passed = {
        name: value for name, value in expected.items() if name not in (headings.SAMPLES, headings.OTHER, headings.END)
    }
    for _ in range(2):  # the second time from the summary
        source = open_source(url)
        assert {name: tuple(count[:2]) for name, count in source.skipped_members.items()} == passed
        (line,) = source_notes(source, None)
        assert "11 members (11.8 kB) in no sample: directories: 1; links: 1; devices" in line
        assert "data behind the end of the archive; hidden files: 1; " in line
    findings = lint(url)
    assert findings.account.bytes == len(b"".join(parts))
    assert not findings.clean


@pytest.mark.parametrize(
    ("members", "lost"),
    [
        ([], False),
        (
            [member("d/", type=tarfile.DIRTYPE), member("README", b"r"), member("__m__", b"m"), member("._a", b"a")],
            False,
        ),
        ([member("00002", PNG)], True),
        ([member("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")], True),
        ([gnu_sparse("b.jpg", b"x", False)], True),
        ([bytes(1024), member("b.txt", b"x")], True),
        ([bytes(1024), b"x"], True),
    ],
)
def test_what_was_probably_meant_to_be_a_sample_is_a_finding(
    tmp_path: Path, picture: Callable[[int], bytes], members: list[bytes], lost: bool
) -> None:
    data = [member("a.png", picture(1)), member("a.txt", b"x"), *members, bytes(1024)]
    (tmp_path / "0.tar").write_bytes(b"".join(data))
    assert lint(str(tmp_path / "0.tar")).clean is not lost


def test_an_index_that_does_not_add_up_is_not_believed() -> None:
    good = Account({headings.SAMPLES: Count(2, 1024), headings.END: Count(0, 1024)})
    assert parsed(good.json()) == good
    assert total([good, good, Account()]).bytes == 2 * good.bytes
    for wrong in (None, [], {"x": [1, 2, ""]}, {headings.END: [1, 2]}, {headings.END: [1, -2, ""]},
                  {headings.END: [1, 2.0, ""]}, {headings.END: [1, 2, "\u202e"]}, {headings.END: [True, 2, ""]},
                  {headings.END: [1, 2, "x" * 1000]}):  # fmt: skip
        assert parsed(wrong) is None
