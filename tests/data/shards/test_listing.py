"""The index against plain `tarfile`, and every way a shard can be broken."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering.data import open_source
from treering.data.errors import DataError
from treering.data.shards import listing
from treering.data.shards.listing import expand_braces, index_shard, list_shards, split_name
from treering.data.storage.files import shown_url
from treering.data.storage.find import find
from treering.tests.support.faulty_proxy import FaultyProxy

WriteTar = Callable[..., Path]
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150)


def index(path: Path):
    return index_shard(find(str(path))[0])


def read(path: Path, place: tuple[int, int]) -> bytes:
    return path.read_bytes()[place[0] : sum(place)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_finds_what_tarfile_finds(tmp_path: Path, write_tar: WriteTar, format: int) -> None:
    long = "d" * 90 + "/" + "n" * 90
    members = [
        ("a.jpg", b"J" * 700), ("a.txt", b""), ("x/a.b.C.Json", b"{}"), ("x/a.TXT", b"t" * 512), (f"{long}.png", b"P"),
        (f"{long}.txt", b"caption"), ("ümlaut.txt", b"u"), ("noextension", b"n"), (".hidden.txt", b"h"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members, format)
    found = index(path)
    data = {
        (key, kind): read(path, place)
        for key, kinds in zip(found.keys, found.samples, strict=True)
        for kind, place in kinds.items()
    }
    assert data == {
        ("a", "jpg"): b"J" * 700, ("a", "txt"): b"", ("x/a", "b.c.json"): b"{}", ("x/a", "txt"): b"t" * 512,
        (long, "png"): b"P", (long, "txt"): b"caption", ("ümlaut", "txt"): b"u",
    }  # fmt: skip
    with tarfile.open(path) as tar:
        offsets = {member.offset_data for member in tar if member.name[0] not in ".n"}
    assert {place[0] for kinds in found.samples for place in kinds.values()} == offsets


@given(members=st.dictionaries(NAMES, st.binary(max_size=1100), max_size=8), format=st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_names(tmp_path: Path, write_tar: WriteTar, members: dict[str, bytes], format: int) -> None:
    path = write_tar(tmp_path / "any.tar", members.items(), format)
    os.utime(path, ns=(0, hash(str(members)) % 10**18))  # a fresh stamp: the index is cached by it
    with tarfile.open(path) as tar:
        named = [(split_name(m.name), tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    expected = [(key, kind, data) for (key, kind), data in named if kind is not None]
    if len({(key, kind) for key, kind, _ in expected}) < len(expected):
        with pytest.raises(DataError, match="two members"):
            index(path)
        return
    found = index(path)
    got = {
        (k, kind, read(path, place))
        for k, kinds in zip(found.keys, found.samples, strict=True)
        for kind, place in kinds.items()
    }
    assert got == set(expected)


def test_other_member_types_are_skipped_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for type, name in [
            (tarfile.DIRTYPE, "a.d"),
            (tarfile.SYMTYPE, "a.jpg"),
            (tarfile.LNKTYPE, "b.jpg"),
            (tarfile.FIFOTYPE, "p.txt"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert index(tmp_path / "t.tar").samples == [{"txt": (5 * 512, 3)}]


@pytest.mark.parametrize(
    "name", ["../../x.jpg", "/etc/x.jpg", "k" * 10_000 + ".jpg", "a\x1b[2J.jpg", "con:.jpg", "-rf *.jpg"]
)
def test_hostile_names_are_only_keys(tmp_path: Path, cache: Path, write_tar: WriteTar, name: str) -> None:
    path = write_tar(tmp_path / "deep" / "er" / "h.tar", [(name, b"1"), (name.replace(".jpg", ".txt"), b"2")])
    before = set(tmp_path.rglob("*"))
    found = index(path)
    assert found.keys == [name.removesuffix(".jpg")]
    assert set(tmp_path.rglob("*")) == before
    assert all(p.name.removesuffix(".json").isalnum() for p in (cache / "index").iterdir())


def damaged(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    return path


@pytest.fixture
def whole(tmp_path: Path, write_tar: WriteTar) -> bytes:
    return write_tar(
        tmp_path / "whole.tar", [("a.jpg", b"1" * 600), ("a.txt", b"x"), ("b.jpg", b"2" * 1024), ("b.txt", b"y")]
    ).read_bytes()


def test_cut_anywhere_is_an_error(tmp_path: Path, whole: bytes) -> None:
    """Also at a member's end, where a careless reader sees a whole, smaller tar."""
    end = 512 * (1 + 2 + 1 + 1 + 1 + 2 + 1 + 1)  # the first block of the end-of-archive mark
    for cut in [*range(0, end, 256), 1, 511, 513, end - 1]:
        with pytest.raises(DataError, match=r"cut short|not a tar") as error:
            index(damaged(tmp_path, whole[:cut]))
        assert "cut short" in str(error.value) or 0 < cut < 512
    assert len(index(damaged(tmp_path, whole[: end + 512])).keys) == 2


def test_damaged_header(tmp_path: Path, whole: bytes) -> None:
    broken = bytearray(whole)
    broken[3 * 512 + 10] ^= 1
    with pytest.raises(DataError, match=r"damaged at byte 1536"):
        index(damaged(tmp_path, bytes(broken)))


@pytest.mark.parametrize("position", range(0, 154, 7))  # name, mode, size, checksum
def test_flipped_header_bits_never_crash(tmp_path: Path, whole: bytes, position: int) -> None:
    for bit in range(8):
        broken = bytearray(whole)
        broken[position] ^= 1 << bit
        with pytest.raises(DataError):
            index(damaged(tmp_path, bytes(broken)))


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12],
)
def test_lying_sizes(tmp_path: Path, whole: bytes, size: bytes) -> None:
    with pytest.raises(DataError):
        index(damaged(tmp_path, with_size(whole, size)))


@pytest.mark.timeout(20)
def test_size_that_leads_back_to_its_own_header(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "t.tar", [("noextension", b"")]).read_bytes()
    with pytest.raises(DataError, match=r"damaged at byte 0 \(negative size\)"):
        index(damaged(tmp_path, with_size(tar, (-512).to_bytes(12, "big", signed=True))))


def with_size(tar: bytes, size: bytes) -> bytes:
    """A tar whose first header lies about its size, with a right checksum."""
    header = bytearray(tar[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


def test_not_a_tar(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(DataError, match="not a tar file"):
        index(damaged(tmp_path, os.urandom(4096)))
    with pytest.raises(DataError, match="gunzip"):
        index(damaged(tmp_path, gzip.compress(whole)))


def test_huge_extended_header_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    with pytest.raises(DataError, match="header of 2,097,152 bytes"):
        index(damaged(tmp_path, info.tobuf(tarfile.GNU_FORMAT) + b"a" * (2 << 20) + b"\0" * 1024))


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("a.jpg", "a.png"), ("a.JPG", "a.jpeg"), ("a.txt", "a.txt")])
def test_two_members_for_a_key(tmp_path: Path, write_tar: WriteTar, names: tuple[str, str]) -> None:
    path = write_tar(tmp_path / "t.tar", [(names[0], b"1"), ("b.jpg", b"2"), (names[1], b"3")])
    with pytest.raises(DataError, match="two members for key 'a'"):
        index(path)


def test_one_key_in_two_shards(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("a.jpg", b"1"), ("a.txt", b"2")])
    with pytest.raises(DataError, match=r"0\.tar and .*1\.tar both hold a sample with key 'a'"):
        open_source(str(tmp_path / "*.tar"))


def test_nothing_usable_says_what_was_found(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "t.tar", [(f"{n}.{kind}", b"1") for n in range(200) for kind in ("jpeg2", "txt")])
    with pytest.raises(DataError, match=r"0 of 200 samples have a picture and a caption: found \.jpeg2, \.txt"):
        open_source(str(tmp_path / "t.tar"))


def test_empty_source(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "t.tar", [])
    with pytest.raises(DataError, match="is empty"):
        open_source(str(tmp_path / "t.tar"))


def test_no_shards(tmp_path: Path) -> None:
    for url in ("*.tar", "{000..002}.tar", "missing.tar"):
        with pytest.raises(DataError, match=r"no shards match .*check the path"):
            open_source(str(tmp_path / url))
    with pytest.raises(DataError, match=r"is a folder; name the tar files"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="protocol"):
        open_source("nonsense://x/*.tar")
    with pytest.raises(DataError, match="samples://emoji"):
        open_source("samples://birds")


def test_braces() -> None:
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"]
    assert expand_braces("back\\slash") == ["back\\slash"]
    with pytest.raises(DataError, match=r"runs backwards; write \{1\.\.3\}"):
        expand_braces("{3..1}.tar")
    for url in ("a{b.tar", "a{1..2}}.tar", "a}b{1..2}", f"{{1..{'9' * 5000}}}"):
        with pytest.raises(DataError, match="the braces are not balanced"):
            expand_braces(url)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is the truth")
@pytest.mark.parametrize(
    "url",
    ["x{8..11}", "{00..101}y", "{1..9..2}", "{a..d}{0..1}", "{p{1..3},q,{r,s}{0..2}}.tar", "{a,}b", "{one}", "{-1..2}"],
)
def test_braces_are_those_of_bash_and_counted_beforehand(url: str) -> None:
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {url}"], capture_output=True, text=True, check=True)
    assert expand_braces(url) == said.stdout.split("\n")[:-1]
    if url != "{a..d}{0..1}":  # a range of letters counts as one name, so as at most 52 too few
        assert listing._names(url) == len(expand_braces(url))


@pytest.mark.parametrize("url", ["{0..99999999999999}", "{a,b{0..99999999}}", "{0..1}" * 24, "{0..8{0..99999999}}"])
def test_no_more_names_than_anyone_has_shards(url: str) -> None:
    with pytest.raises(DataError, match=r"names [0-9,]+ shards; at most 10,000,000 are allowed"):
        expand_braces(url)


def test_shards_are_sorted_and_named_once(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in "cab":
        write_tar(tmp_path / f"{name}.tar", [])
    names = [shard.url for shard in list_shards(f"{tmp_path}/{{c,b,*}}.tar")]
    assert names == [str(tmp_path / f"{name}.tar") for name in "abc"]


def test_index_is_cached_until_the_shard_changes(
    tmp_path: Path, write_tar: WriteTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), ("a.txt", b"2")])
    first = index(path)
    (cached,) = (tmp_path / "cache" / "index").iterdir()
    written, whole = cached.stat().st_mtime_ns, cached.read_bytes()
    assert index(path).samples == first.samples == [{"jpg": (512, 1), "txt": (1536, 1)}]
    assert cached.stat().st_mtime_ns == written
    for damage in (whole[:-9], whole[:-9] + bytes(9), b"", b"x" * 200):
        cached.write_bytes(damage)  # made anew, not believed
        assert index(path).keys == ["a"]
        assert cached.read_bytes() == whole
    write_tar(path, [("b.jpg", b"1"), ("b.txt", b"2")])
    os.utime(path, ns=(1, 1))
    assert index(path).keys == ["b"]


def test_records_are_the_bytes_of_the_tar(tmp_path: Path, write_source: Callable[..., str]) -> None:
    source = open_source(write_source(tmp_path, 3, 5))
    assert len(source) == 15
    for number in range(15):
        record = source.record(number)
        with tarfile.open(record.shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.name.startswith(record.key)}  # type: ignore[union-attr]
            first = tar.getmember(f"{record.key}.png").offset_data
        assert {f"{record.key}.{kind}": data for kind, data in record.fields.items()} == members
        assert (record.key, record.shard, record.offset) == (source.key(number), source.shard(number), first)
    with pytest.raises(IndexError):
        source.record(15)


def test_members_far_apart_are_read_one_by_one(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "t.tar", [("a.jpg", b"1"), ("b.jpg", b"2" * 200_000), ("a.txt", b"3"), ("b.txt", b"4")])
    assert open_source(str(path)).record(0).fields == {"jpg": b"1", "txt": b"3"}


def test_shard_that_shrinks_while_it_is_read(tmp_path: Path, write_source: Callable[..., str]) -> None:
    source, other = (open_source(write_source(tmp_path / name, 1, 5)) for name in "ab")
    os.truncate(source.shard(0), 600)
    with pytest.raises(DataError, match="changed while it was read"):
        source.record(4)
    os.remove(other.shard(0))
    with pytest.raises(DataError, match="not found"):
        other.record(0)


def test_store_without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with FaultyProxy(9, lambda _: "403") as refuses:  # as a bucket that is not public does
        monkeypatch.setenv("AWS_ENDPOINT_URL", refuses.endpoint)
        with pytest.raises(DataError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
            open_source("s3://bucket-of-nobody/{0..1}.tar")


def test_shown_url_hides_secrets() -> None:
    assert shown_url("https://user:pass@host/a.tar?X-Amz-Signature=abc") == "https://host/a.tar"
    assert shown_url("s3://bucket/a\x1b[2J.tar") == "s3://bucket/a\\x1b[2J.tar"
