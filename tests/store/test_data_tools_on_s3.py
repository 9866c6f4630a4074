"""Index and lint of shards in a bucket say what they say of the same shards in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from treering.data.lint import Findings, lint
from treering.data.pack import write_shards
from treering.data.shards import ShardIndex
from treering.data.source import open_source, shards_of
from treering.data.sweep import index_all


def bad(found: Findings) -> list[tuple[str, str, int, str]]:
    return [(Path(entry.shard).name, entry.key, entry.offset, entry.reason) for entry in found.bad]


@pytest.mark.timeout(120)
def test_a_bucket_is_as_good_as_a_folder(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    records = map(open_source("samples://emoji/held_out").record, range(40))
    samples = [(record.key, dict(record.fields)) for record in records]
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
