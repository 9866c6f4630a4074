"""Shards in a bucket are indexed, linted and packed as the same shards in a folder are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from treering.data.errors import DataError
from treering.data.shards.listing import ShardIndex
from treering.data.shards.parallel import index_all
from treering.data.shards.source import open_source, shards_of
from treering.data.shards.tar_writer import write_shards
from treering.data.tools.lint import Findings, lint
from treering.data.tools.pack import pack


def bad(found: Findings) -> list[tuple[str, str, int, str]]:
    return [(Path(entry.shard).name, entry.key, entry.offset, entry.reason) for entry in found.bad]


@pytest.mark.timeout(120)
def test_a_bucket_is_as_good_as_a_folder(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    records = map(open_source("samples://emoji/held_out").record, range(40))
    samples = [(record.key, dict(record.fields)) for record in records]
    samples[3][1]["json"] = b"{}"  # no good caption either
    samples[3][1]["txt"], samples[7][1]["png"], samples[21][1]["png"] = b"\xff", b"", b"oops"
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data", "part", samples, 40, 20)
    os.truncate(tmp_path / "data" / "part-000001.tar", 40_000)
    for path in (tmp_path / "data").iterdir():
        s3fs.S3FileSystem().put_file(str(path), f"{s3.removeprefix('s3://')}/data/{path.name}")
    found: list[Any] = []
    for url in (str(tmp_path / "data" / "*.tar"), f"{s3}/data/*.tar"):
        whole, cut = [index for _, index in index_all(shards_of(url), 2)]
        assert isinstance(whole, ShardIndex)
        assert "cut short" in str(cut)
        findings = lint(url, 2)
        assert (len(findings.faults), len(findings.bad)) == (1, 3)
        found.append((whole.keys, whole.samples, bad(findings)))
    assert found[0] == found[1]


@pytest.mark.timeout(180)
def test_packing_into_a_bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, processes and a shard that is not whole: the bucket comes to hold what a folder would."""
    import s3fs

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    url = "samples://emoji/held_out"
    whole = pack(url, str(tmp_path / "0" / "set"), "200kB")
    expected = {Path(shard).name: Path(shard).read_bytes() for shard in whole.shards}
    assert len(expected) > 5
    out, store = f"{s3}/packed/set", s3fs.S3FileSystem()
    assert pack(url, out, "200kB", part="1/2").missing == -(-len(expected) // 2)
    store.pipe_file(f"{out}/set-000000.tar", b"not whole")
    first = store.info(f"{out}/set-000001.tar", refresh=True)["LastModified"]
    packed = pack(url, out, "200kB", workers=2)
    assert (packed.written, packed.missing) == (-(-len(expected) // 2), 0)
    store.invalidate_cache()
    assert {path.rpartition("/")[2] for path in store.ls(out, detail=False)} == {*expected, "packing.json"}
    assert {name: store.cat_file(f"{out}/{name}") for name in expected} == expected
    assert store.info(f"{out}/set-000001.tar", refresh=True)["LastModified"] == first
    again = pack(f"{out}/*.tar", str(tmp_path / "1" / "set"), "200kB", workers=2)
    assert again.samples == whole.samples
    assert lint(f"{tmp_path}/1/set/*.tar").clean
    with pytest.raises(DataError, match="packed from another input"):
        pack(url, out, "100kB")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("packing-")]
