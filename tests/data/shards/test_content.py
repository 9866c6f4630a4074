"""Reading where the shard is not, or no longer, what its index says: the samples are right, or it is said."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data import DataError, Source, open_source
from treering.data.shards.content import is_header_of
from treering.data.shards.index import cached_at
from treering.data.shards.listing import index_shard, list_shards
from treering.data.storage import files, find
from treering.tests.support.made_up_shards import Members, shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def samples(count: int, text: str = "picture {} of a thing", start: int = 0) -> Members:
    numbers = range(start, start + count)
    return [m for n in numbers for m in ((f"{n:03}.png", bytes([n]) * 3000), (f"{n:03}.txt", text.format(n).encode()))]


def read(source: Source) -> list[dict[str, bytes]]:
    return [source.record(n).fields for n in range(len(source))]


def truth(path: Path) -> list[dict[str, bytes]]:
    """What tarfile finds in samples of a picture and a text."""
    with tarfile.open(path) as tar:
        members = [(info.name.partition(".")[2], tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    return [dict(members[i : i + 2]) for i in range(0, len(members), 2)]


# Between two openings


@pytest.mark.parametrize("how", ["in place", "renamed"])
@pytest.mark.parametrize("text", ["number {} and a dog", "picture {} of a cat!!"])
def test_times_set_back_hide_no_change(tmp_path: Path, how: str, text: str) -> None:
    path = shard(tmp_path / "d" / "0.tar", samples(3))
    os.utime(path, (0, 0))
    size = path.stat().st_size
    assert read(open_source(str(path))) == truth(path)
    other = path if how == "in place" else tmp_path / "other.tar"
    shard(other, samples(3, text))
    os.utime(other, (0, 0))
    os.replace(other, path)
    assert path.stat().st_size == size
    assert read(open_source(str(path))) == truth(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_stamp_that_says_nothing_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """As of an image of a file system (squashfs) that was mounted again: all times 0, inodes equal."""
    for module in (files, find):
        monkeypatch.setattr(module, "version_of", lambda stat: "0-0-7?")
    plain, identities = tmp_path / "plain", []
    path = tmp_path / ("0.tar.gz" if packed else "0.tar")
    for text in ("picture {} of a thing", "picture {} of a cat!!"):
        data = shard(plain, samples(3, text)).read_bytes()
        path.write_bytes(gzip.compress(data, 0) if packed else data)
        source = open_source(str(path))
        assert read(source) == truth(plain)
        identities.append(source.identity.digest)
    assert len(set(identities)) == 2


@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_every_byte_of_a_text_counts(tmp_path: Path, place: int) -> None:
    digests = []
    for letter in b"ab":
        text = b"a" * place + bytes([letter]) + b"a" * (2999 - place)
        path = shard(tmp_path / "0.tar", [("0.png", b"1"), ("0.json", b'{"caption": "%s"}' % text)])
        digests.append(open_source(str(path)).identity.digest)
    assert digests[0] != digests[1]


# While a source is open


def test_touched_or_written_again_it_is_read_on(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", samples(3))
    source, expected = open_source(str(path)), truth(path)
    assert source.record(0).fields == expected[0]
    for change in (
        lambda: os.utime(path),
        lambda: os.chmod(path, 0o600),
        lambda: shutil.copy(path, tmp_path / "copy") and os.replace(tmp_path / "copy", path),
        lambda: path.write_bytes(path.read_bytes()),
        lambda: shard(path, [("a folder/__x", b""), *samples(3)]),  # other places, the same samples
    ):
        change()
        assert read(source) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda path: shard(path, samples(3, start=7)),
        lambda path: shard(path, samples(3, "picture {} of a cat!!")),
        lambda path: shard(path, samples(4)),
        lambda path: shard(path, samples(2)),
        lambda path: shard(path, list(reversed(samples(3)))),
        lambda path: os.replace(shard(path.with_name("n"), samples(30)), path),
        lambda path: os.truncate(path, 5000),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
def test_other_samples_stop_the_reading(tmp_path: Path, change: Callable[[Path], object], before: int) -> None:
    path = shard(tmp_path / "0.tar", samples(3))
    source = open_source(str(path))
    for n in range(before):
        source.record(n)
    stat = path.stat()
    change(path)
    if path.exists():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"^\S+0.tar(: not found| is not what it was| changed while it was read)"):
        read(source)


def test_an_index_of_another_shard_is_found_out_and_made_anew(tmp_path: Path) -> None:
    """However it came to be believed: the headers that are read with the samples say otherwise."""
    one, other = (shard(tmp_path / name / "0.tar", samples(3, text)) for name, text in (("a", "{}"), ("b", "x" * 600)))
    (own,), (theirs,) = list_shards(str(one)), list_shards(str(other))
    open_source(str(one))
    table = index_shard(theirs)._indexes.get(theirs).table
    from treering.data.shards.table_file import table_bytes

    names = ("samples", "members", "keys.ends", "keys.bytes", "kinds.ends", "kinds.bytes", "columns")
    header = index_shard(own)._indexes.get(own).table.header
    cached_at(own).write_bytes(table_bytes(header, {name: table.rows(name) for name in names}))
    assert read(open_source(str(one))) == truth(one)


# Headers


NAMES = st.text(st.characters(exclude_characters="/\0.", exclude_categories=("Cs",)), min_size=1, max_size=120)


@given(
    key=NAMES,
    kind=st.sampled_from(["jpg", "JPG", "txt", "a.b", "Json"]),
    size=st.integers(0, 1 << 28),
    mtime=st.sampled_from([0, 1.25]),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]),
)
@settings(max_examples=300, deadline=None)
def test_every_writers_header_is_known(key: str, kind: str, size: int, mtime: float, format: int) -> None:
    info = tarfile.TarInfo(f"{key}.{kind}")
    info.size, info.mtime = size, mtime  # type: ignore[assignment]
    try:
        header = info.tobuf(format)[-512:]
    except ValueError:  # a name that this format cannot have
        return
    assert is_header_of(header, key, kind.lower(), size)
    assert not is_header_of(header, key, kind.lower(), size + 1)
    plain = len(f"{key}.{kind}") <= 100 and key.isascii()
    assert is_header_of(header, f"{key}x", kind.lower(), size) == (not plain and len(f"{key}x.{kind}") > 0)
    assert not is_header_of(bytes(512), key, kind.lower(), size)


def test_long_paths_are_in_the_prefix(tmp_path: Path) -> None:
    info = tarfile.TarInfo("/".join(["folder"] * 12) + "/" + "k" * 60 + ".txt")
    assert is_header_of(info.tobuf(tarfile.USTAR_FORMAT), info.name[:-4], "txt", 0)


@given(data=st.binary(min_size=512, max_size=512))
def test_no_header_breaks_the_check(data: bytes) -> None:
    assert not is_header_of(data, "key", "txt", 5)


def test_ends_of_members_are_all_that_a_digest_reads(tmp_path: Path) -> None:
    """The middle of a picture is not read for it: what it costs does not depend on the pictures' size."""
    from treering.data.shards.content import ContentDigest

    class Counted(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.count += len(data)
            return data

    file = Counted(bytes(10_000_000))
    ContentDigest().add(file, "a.png", 512, 9_000_000)
    assert file.count == 2048
