"""Indexes in a real bucket: found by listing, put next to the shards, and used by a node that never saw them."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from treering.data import DataError, open_source
from treering.data.shards import listing
from treering.data.shards.listing import list_shards
from treering.data.storage import find as data_find
from treering.launch.commands.data_index import index_url

SHARDS = 20


def shard(number: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for n in range(3):
            metadata = json.dumps({"similarity": (3 * number + n) / 100}).encode()
            for kind, data in (("png", b"P%d" % n), ("txt", b"caption"), ("json", metadata)):
                info = tarfile.TarInfo(f"{number:03}{n}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def put(place: str, files: dict[str, bytes]) -> None:
    """By a client of its own, which no test shares."""
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).pipe(
        {f"{place.removeprefix('s3://')}/{name}": data for name, data in files.items()}
    )


@pytest.fixture
def url(s3: str) -> str:
    put(s3, {f"set/{number:03}.tar": shard(number) for number in range(SHARDS)})
    return f"{s3}/set/{{000..{SHARDS - 1:03}}}.tar"


def test_many_names_are_listed_not_asked_for_one_by_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = list_shards(url.replace("{000..019}", "007"))
    monkeypatch.setattr(data_find, "info_of", lambda *_: pytest.fail("a shard was asked for"))
    found = list_shards(url)
    assert [each.url for each in found] == [url.replace("{000..019}", f"{n:03}") for n in range(SHARDS)]
    assert found[7] == one  # the same size and etag
    assert found == list_shards(url.replace("{000..019}", "*"))
    with pytest.raises(DataError, match=r"no shards match s3://.*/set/020\.tar \(and 4 more of 25\): not found"):
        list_shards(url.replace("{000..019}", "{000..024}"))


def test_another_node_needs_no_walk(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "one"))
    wanted = "similarity >= 0.3"
    found = index_url(url, 2, beside=True, filter=wanted)
    assert (found["samples"], found["accepted"], found["beside"], found["faults"]) == (60, 30, SHARDS, [])
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(listing, "open_content", lambda *_: pytest.fail("a shard was walked"))
    source = open_source(url, filter=wanted)
    assert [source.key(n) for n in range(30)] == [f"{n // 3:03}{n % 3}" for n in range(30, 60)]
    assert source.record(29).fields["png"] == b"P2"
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "three"))
    assert len(open_source(url.replace("{000..019}", "*"))) == 60  # another URL: each index for itself
    assert len(open_source(url)) == 60


def test_tar_gz_in_a_bucket(url: str, s3: str) -> None:
    put(s3, {f"z/{number}.tar.gz": gzip.compress(shard(number)) for number in range(2)})
    source = open_source(f"{s3}/z/*.tar.gz")
    plain = open_source(url.replace("{000..019}", "{000,001}"))
    assert [source.record(n).fields for n in range(6)] == [plain.record(n).fields for n in range(6)]
