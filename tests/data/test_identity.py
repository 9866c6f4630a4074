"""What identifies a source: its samples in their order, and nothing of where they are."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.data import open_source
from treering.data.identity import SourceIdentity, difference
from treering.tests.support.made_up_shards import Members, shard

WriteSource = Callable[..., str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))


def pairs(picture: Callable[..., bytes], count: int, start: int = 0, caption: str = "picture {}") -> Members:
    return [
        member
        for n in range(start, start + count)
        for member in ((f"{n:04}.png", picture(n)), (f"{n:04}.txt", caption.format(n).encode()))
    ]


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Three shards of four samples."""
    for n in range(3):
        shard(tmp_path / "d" / f"{n}.tar", pairs(picture, 4, 4 * n))
    return tmp_path / "d"


def identity(url: object, **options: str) -> SourceIdentity:
    return open_source(str(url), **options).identity  # type: ignore[arg-type]


def test_the_same_samples_elsewhere_are_the_same(folder: Path, tmp_path: Path, picture: Callable[..., bytes]) -> None:
    first = identity(folder / "*.tar")
    assert first.size == "12 samples in 3 shards"
    assert first.shards == ["0.tar", "1.tar", "2.tar"]
    same = [identity(folder / "{0..2}.tar"), identity(f"file://{folder}/?.tar")]
    os.utime(folder / "1.tar", ns=(5, 5))
    same.append(identity(folder / "*.tar"))
    shutil.copytree(folder, tmp_path / "copy")
    same.append(identity(tmp_path / "copy" / "*.tar"))
    (tmp_path / "link").symlink_to(folder)
    same.append(identity(tmp_path / "link" / "*.tar"))
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar, tarfile.open(tmp_path / path.name, "w", format=tarfile.PAX_FORMAT) as again:
            for info in tar.getmembers():
                file = tar.extractfile(info)
                info.pax_headers, info.mtime = {"comment": "x" * 700}, 1.5  # type: ignore[assignment]
                again.addfile(info, file)
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    same += [identity(tmp_path / "?.tar"), identity(tmp_path / "?.tar.gz")]
    shard(folder / "empty.tar", [])
    same.append(identity(folder / "*.tar"))
    assert [difference(first, each) for each in same] == [""] * 8
    assert {each.digest for each in same} == {first.digest}


def changes(folder: Path, picture: Callable[..., bytes]) -> dict[str, tuple[Callable[[], object], str]]:
    """Changes to a folder of three shards, and the first difference that they make."""
    middle = folder / "1.tar"
    data = middle.read_bytes()
    samples = pairs(picture, 4, 4)

    def swap() -> None:
        os.rename(folder / "0.tar", folder / "x")
        os.rename(middle, folder / "0.tar")
        os.rename(folder / "x", middle)

    return {
        "one more at the end": (lambda: shard(folder / "3.tar", pairs(picture, 1, 50)), "3.tar is new"),
        "one more at the start": (lambda: shard(folder / "+.tar", pairs(picture, 1, 50)), "+.tar is new"),
        "one less at the end": (lambda: (folder / "2.tar").unlink(), "2.tar is missing"),
        "one less in the middle": (middle.unlink, "1.tar is missing"),
        "another in its place": (lambda: shard(middle, pairs(picture, 4, 50)), "1.tar has other samples"),
        "more samples in one": (lambda: shard(middle, pairs(picture, 5, 40)), "1.tar has other samples"),
        "two change places": (swap, "0.tar is at another place among them"),
        "samples change places": (
            lambda: shard(middle, [*samples[2:4], *samples[:2], *samples[4:]]),
            "1.tar has other samples",
        ),
        "captions of the same length": (
            lambda: middle.write_bytes(data.replace(b"picture 5", b"a photo 5")),
            "1.tar has other samples",
        ),
        "the end of a picture": (
            lambda: middle.write_bytes(data.replace(samples[4][1], samples[4][1][:-1] + b"?")),
            "1.tar has other samples",
        ),
        "a member more": (lambda: shard(middle, [*samples, ("0007.cls", b"1")]), "1.tar has other samples"),
    }


CHANGES = [
    "one more at the end", "one more at the start", "one less at the end", "one less in the middle",
    "another in its place", "more samples in one", "two change places", "samples change places",
    "captions of the same length", "the end of a picture", "a member more",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_samples_are_seen_and_the_first_shard_named(
    folder: Path, picture: Callable[..., bytes], change: str
) -> None:
    before = identity(folder / "*.tar")
    make, expected = changes(folder, picture)[change]
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make()
    for path, time in times.items():
        if path.exists():
            os.utime(path, ns=(time, time))  # as rsync -a and touch -r do
    assert difference(before, identity(folder / "*.tar")) == expected


def test_a_filter_is_part_of_it(folder: Path, tmp_path: Path, picture: Callable[..., bytes]) -> None:
    def scored(scores: list[int]) -> None:
        members = pairs(picture, 4, 4)
        for n, score in enumerate(scores):
            members.append((f"{n + 4:04}.json", b'{"score": %d}' % score))
        shard(folder / "1.tar", members)

    scored([1, 2, 3, 4])
    one, two = (identity(folder / "*.tar", filter=f"score > {n}") for n in (1, 2))
    assert [one.samples, two.samples] == [3, 2]
    assert difference(one, two) == "1.tar has other samples"
    assert difference(one, identity(folder / "*.tar", filter="score > 1.5")) == ""  # the same samples
    scored([1, 2, 3, 0])
    assert difference(one, identity(folder / "*.tar", filter="score > 1")) == "1.tar has other samples"


@given(
    before=st.lists(st.integers(0, 6), max_size=6),
    now=st.lists(st.integers(0, 6), max_size=6),
)
def test_a_difference_is_found_exactly_if_there_is_one(before: list[int], now: list[int]) -> None:
    one, two = (
        SourceIdentity.of([f"/d/{i}.tar" for i in range(len(each))], [str(content) for content in each], 1)
        for each in (before, now)
    )
    assert (difference(one, two) == "") == (before == now)
    assert SourceIdentity.model_validate_json(one.model_dump_json()) == one


def test_names_are_safe_to_show() -> None:
    found = SourceIdentity.of(["/d/a\nb.tar", "/d/\x1b[2J\udcff.tar"], ["1", "2"], 2)
    assert found.shards == ["a\\nb.tar", "\\x1b[2J\\udcff.tar"]
