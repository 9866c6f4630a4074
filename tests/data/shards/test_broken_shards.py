"""Every way a shard can be broken: refused in a sentence that names shard, byte and remedy, or skipped and written
down, with the order of all else unchanged at any world size."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import random
import tarfile
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from treering.data import DataConfig, DataError, LedgerEntry, Loader, open_source
from treering.data.shards.tar_reader import DamagedShard

WriteTar = Callable[..., Path]
GOOD = [("bad0.png", b"1" * 700), ("bad0.txt", b"x"), ("bad1.png", b"2" * 1024), ("bad1.txt", b"y")]


def tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


WHOLE = tar(GOOD)
SECOND, THIRD = 512 * 3, 512 * 5  # where the headers of bad0.txt and bad1.png stand


def resized(header: int, size: bytes) -> bytes:
    """The tar with another size in one header, under a right checksum."""
    block = bytearray(WHOLE[header : header + 512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return WHOLE[:header] + bytes(block) + WHOLE[header + 512 :]


def flipped(position: int) -> bytes:
    data = bytearray(WHOLE)
    data[position] ^= 1
    return bytes(data)


def special(type_: bytes, name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) + WHOLE


LONG_NAME, EXTENDED = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE
BAD_MIDDLE = WHOLE[:THIRD] + b"\xde\xad" * 256 + WHOLE[THIRD + 512 :]
TWICE = "two members for key 'bad0': 'txt' and 'txt', at byte 5632"
BROKEN: dict[str, tuple[bytes, str, int]] = {
    "zero length": (b"", "cut short: it ends at byte 0", 0),
    "cut in a header": (WHOLE[: SECOND + 100], "cut short: it ends at byte 1636", SECOND + 100),
    "cut in a picture": (WHOLE[:900], "cut short: it ends at byte 900", 900),
    "cut at a member's end": (WHOLE[:THIRD], f"cut short: it ends at byte {THIRD}", THIRD),
    "garbage": (random.Random(0).randbytes(4096), "not a tar file at byte 0; name tar files", 0),
    "an html page": (b"<html>404" + b" " * 2000, "not a tar file at byte 0; name tar files", 0),
    "garbage in the middle": (BAD_MIDDLE, f"damaged at byte {THIRD}", THIRD),
    "bad checksum": (flipped(SECOND + 10), f"damaged at byte {SECOND} (bad checksum)", SECOND),
    "gzip under a .tar name": (gzip.compress(WHOLE), "not a tar file at byte 0; it is gzip data", 0),
    "a member twice": (tar([*GOOD, ("bad0.txt", b"z")]), TWICE, 5632),
    "two pictures": (tar([*GOOD, ("bad0.jpg", b"z")]), "'png' and 'jpg', at byte 5632; rename one", 5632),
    "negative size": (resized(SECOND, b"\xff" * 12), f"damaged at byte {SECOND} (negative size)", SECOND),
    "size beyond the end": (resized(SECOND, b"77777777777\0"), "cut short", len(WHOLE)),
    "huge header": (special(LONG_NAME, "x", b"a" * (2 << 20)), "header of 2,097,152 bytes at byte 512", 512),
    "bad extended header": (special(EXTENDED, "x", b"99999 path=x\n"), "damaged at byte 512 (bad extended", 512),
    "endless size": (special(EXTENDED, "x", b"5013 size=" + b"9" * 5002 + b"\n"), "", -1),
}  # fmt: skip
assert len(BROKEN) > 15


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.timeout(30)
def test_a_broken_shard_is_refused_in_a_sentence(tmp_path: Path, write_source: Callable[..., str], kind: str) -> None:
    data, words, offset = BROKEN[kind]
    write_source(tmp_path, 2, 3)
    (tmp_path / "part-000b.tar").write_bytes(data)
    if offset < 0:  # a size that no number holds is no size: the header's own counts
        assert len(open_source(str(tmp_path / "*.tar"))) == 8
        return
    for _ in range(2):  # also when it was looked at before
        with pytest.raises(DamagedShard) as error:
            open_source(str(tmp_path / "*.tar"))
        message = str(error.value)
        assert message.startswith(f"{tmp_path}/part-000b.tar ")
        assert words in message
        assert "byte" in message
        assert "; " in message  # and the remedy
        assert "\n" not in message
        assert error.value.offset == offset


def test_a_shard_that_shrinks_while_it_is_indexed_has_changed(
    tmp_path: Path, write_source: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from treering.data.shards import listing

    url = write_source(tmp_path, 1, 5)
    walked = listing.open_content

    def shrinking(shard: object, read: object) -> object:
        os.truncate(tmp_path / "part-000.tar", 600)
        return walked(shard, read)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "open_content", shrinking)
    for option in ("refuse", "skip"):  # it is not known to be damaged: never left out
        with pytest.raises(
            DataError, match=r"part-000.tar changed while it was read, at bytes 0 to \d+; start again when"
        ):
            open_source(url, bad_shards=option)  # type: ignore[arg-type]
        write_source(tmp_path, 1, 5)


# Left out


@pytest.fixture
def url(tmp_path: Path, write_source: Callable[..., str]) -> str:
    """Two good shards, and a broken one of each kind between them."""
    write_source(tmp_path / "good", 3, 8)
    for n, (data, _, offset) in enumerate(BROKEN.values()):
        if offset >= 0:
            (tmp_path / "good" / f"part-001-{n:02}.tar").write_bytes(data)
    return str(tmp_path / "good" / "*.tar")


def loader(url: str, rank: int = 0, world: int = 1, bad_shards: str = "skip") -> Loader:
    config = {"train": [{"source": url}], "batch": 8, "bad_shards": bad_shards}
    return Loader(DataConfig.model_validate(config), 24, 16, seed=5, rank=rank, world=world)


def rows(loaders: list[Loader], first: int, count: int) -> tuple[list[object], list[LedgerEntry]]:
    """What the ranks together see of some global batches, and their ledger."""
    seen: list[object] = []
    ledger: list[LedgerEntry] = []
    shares = []
    for each in loaders:
        with closing(each.batches(first)) as batches:
            shares.append(list(islice(batches, count)))
    for step in zip(*shares, strict=True):
        seen.append(
            [(key, image.sum().item()) for batch in step for key, image in zip(batch.keys, batch.images, strict=True)]
        )
        ledger += [entry for batch in step for entry in batch.bad]
    return seen, ledger


def test_broken_shards_are_skipped_and_the_order_is_that_of_the_others(
    url: str, tmp_path: Path, write_source: Callable[..., str]
) -> None:
    with pytest.raises(DamagedShard, match=r"part-001-00\.tar is cut short"):
        loader(url, bad_shards="refuse")
    expected, nothing = rows([loader(write_source(tmp_path / "alone", 3, 8))], 0, 6)
    assert not nothing
    for world in (1, 2, 4):
        seen, ledger = rows([loader(url, rank, world) for rank in range(world)], 0, 6)
        assert seen == expected
        assert len(ledger) == len(BROKEN) - 1
        kinds = [words for _, words, offset in BROKEN.values() if offset >= 0]
        for entry, words in zip(ledger, kinds, strict=True):
            assert entry.source == url
            assert Path(entry.shard).name.startswith("part-001-")
            assert (entry.key, entry.position) == ("", -1)
            assert entry.reason.startswith(f"damaged shard: {entry.shard} ")
            assert words in entry.reason
        assert [entry.offset for entry in ledger] == [offset for _, _, offset in BROKEN.values() if offset >= 0]


def test_a_skipped_shard_is_recorded_once_and_not_as_a_bad_sample(url: str) -> None:
    first = loader(url)
    _, ledger = rows([first], 0, 2)
    first.check_bad(ledger)  # none of the 24 samples may be bad
    assert rows([first], 2, 1)[1] == []
    resumed = loader(url)
    resumed.check_bad(ledger)  # what the run's ledger holds
    assert rows([resumed], 2, 2)[1] == []
    assert rows([loader(url)], 2, 2)[1] == ledger  # a ledger that was lost is written anew


def test_a_run_does_not_continue_when_a_skipped_shard_was_repaired(url: str, tmp_path: Path) -> None:
    _, ledger = rows([loader(url)], 0, 1)
    (tmp_path / "good" / "part-001-03.tar").write_bytes(WHOLE)
    with pytest.raises(DataError, match=r"part-001-03\.tar was damaged and skipped when the run began"):
        loader(url).check_bad(ledger)
    (tmp_path / "good" / "part-001-03.tar").write_bytes(b"damaged in another way")
    loader(url).check_bad(ledger)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE[:900])
    with pytest.raises(DataError, match=r"all its shards with samples are damaged; .*cut short"):
        open_source(str(tmp_path / "*.tar"), bad_shards="skip")


def test_only_damage_leaves_a_shard_out(url: str, tmp_path: Path) -> None:
    """What is out of reach today would be back tomorrow, and the order another."""
    (tmp_path / "good" / "part-000.tar").chmod(0)
    if os.access(tmp_path / "good" / "part-000.tar", os.R_OK):
        (tmp_path / "good" / "part-000.tar").unlink()  # root reads everything
        (tmp_path / "good" / "part-000.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"part-000\.tar|not found|access refused") as error:
        open_source(url, bad_shards="skip")
    assert not isinstance(error.value, DamagedShard)


def test_flips_anywhere_end_in_a_sentence_or_in_whole_samples(tmp_path: Path) -> None:
    """Half the headers' bytes, one flip each: never a crash, never a sample of other bytes than a tar reader sees."""
    path = tmp_path / "f.tar"
    for count, position in enumerate(itertools.chain(range(0, 512, 3), range(SECOND, SECOND + 512, 5))):
        path.write_bytes(flipped(position))
        os.utime(path, ns=(0, count + 1))
        try:
            source = open_source(str(path))
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        with tarfile.open(path) as archive:
            names = {member.name for member in archive}
        assert {f"{source.key(n)}.{kind}" for n in range(len(source)) for kind in source.record(n).fields} == names
