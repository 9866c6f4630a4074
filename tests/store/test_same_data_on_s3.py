"""What identifies the data of a run in a bucket: the samples, not the bucket, the names' pattern or the etags."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from treering.data import DataError, open_source
from treering.data.identity import difference
from treering.data.shards.listing import list_shards
from treering.launch.recipe.load import read_recipe
from treering.tests.support.made_up_shards import Members, shard
from treering.tests.support.tiny_runs import SIZES, lines, same_end, train_until
from treering.training import loop
from treering.training.checkpoint.store import StoreError
from treering.training.recipe import Recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))


def pairs(count: int, start: int = 0, word: str = "thing") -> Members:
    found = []
    for n in range(start, start + count):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (24, 24, 3), np.uint8)).save(file, "PNG")
        found += [(f"{n:04}.png", file.getvalue()), (f"{n:04}.txt", f"{word} number {n}".encode())]
    return found


def put(url: str, data: bytes, part: int = 50 << 20) -> None:
    """By a client of its own; more than `part` bytes in several parts, which gives another etag."""
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(url.removeprefix("s3://"), data, chunksize=part)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 20 samples."""
    for n in range(3):
        shard(tmp_path / "d" / f"{n}.tar", pairs(20, 20 * n))
    return tmp_path / "d"


def upload(folder: Path, url: str) -> str:
    for path in folder.glob("*.tar"):
        put(f"{url}/{path.name}", path.read_bytes())
    return url


def recipe(source: object) -> Recipe:
    words = [*SIZES, f"data.train=[{{source: '{source}'}}]", "stages=[{samples: 144}]", "checkpoint.every=36"]
    return read_recipe(
        "emoji", ["model.captioner=null", "objectives={contrastive: {}}", "eval.suites=[]", *words]
    ).recipe


def test_a_run_goes_on_from_the_disk_in_a_bucket_and_in_the_next(folder: Path, s3: str, tmp_path: Path) -> None:
    one, two = upload(folder, f"{s3}/one"), upload(folder, f"{s3}/two")
    loop.train(recipe(folder / "*.tar"), tmp_path / "whole")
    train_until(5, recipe(folder / "*.tar"), tmp_path / "run")
    train_until(9, recipe(f"{one}/{{0..2}}.tar"), tmp_path / "run")
    loop.train(recipe(f"{two}/?.tar"), tmp_path / "run")
    assert lines(tmp_path / "run", "step")[-1]["loss"] == lines(tmp_path / "whole", "step")[-1]["loss"]
    same_end(tmp_path / "run", tmp_path / "whole")


def test_an_object_overwritten_by_one_of_its_size_is_other_data(folder: Path, s3: str, tmp_path: Path) -> None:
    url = upload(folder, f"{s3}/d")
    train_until(5, recipe(f"{url}/*.tar"), tmp_path / "run")
    source = open_source(f"{url}/*.tar")
    data = (folder / "1.tar").read_bytes().replace(b"thing number", b"thong number")
    put(f"{url}/1.tar", data)
    assert [each.size for each in list_shards(f"{url}/*.tar")] == [len(data)] * 3
    with pytest.raises(DataError, match=r"/d/1.tar is not what it was when it was opened"):
        source.record(25)
    with pytest.raises(StoreError, match=r"the data changed: s3://.*/d/\*.tar now .* 1.tar has other samples"):
        loop.train(recipe(f"{url}/*.tar"), tmp_path / "run")
    put(f"{url}/1.tar", (folder / "1.tar").read_bytes())
    loop.train(recipe(f"{url}/*.tar"), tmp_path / "run")


def test_the_same_bytes_under_another_etag_are_read_on(s3: str, tmp_path: Path) -> None:
    large = [("0.png", os.urandom(11 << 20)), ("0.txt", b"a"), ("1.png", os.urandom(9000)), ("1.txt", b"b")]
    data = shard(tmp_path / "0.tar", large).read_bytes()
    put(f"{s3}/0.tar", data)
    source, (before,) = open_source(f"{s3}/0.tar"), list_shards(f"{s3}/0.tar")
    put(f"{s3}/0.tar", data, part=5 << 20)
    (now,) = list_shards(f"{s3}/0.tar")
    assert now.stamp != before.stamp
    assert [source.record(n).fields["png"] for n in (0, 1)] == [large[0][1], large[2][1]]
    assert difference(source.identity, open_source(f"{s3}/*.tar").identity) == ""
