"""`treering data index --beside --filter`, and a recipe with a filter and a damaged shard: what they print and do."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from treering.data import open_source
from treering.launch.commands.data_index import source_notes

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TREERING_CACHE", str(folder))
    return folder


@pytest.fixture
def shards(here: Path) -> Path:
    """Three shards of four photos, with similarity 0.0 to 1.1 and a hostile column."""
    folder = here / "shards"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for n in range(4 * number, 4 * number + 4):
                file = io.BytesIO()
                Image.new("RGB", (40, 30), (17 * n % 256, n, 255)).save(file, "JPEG")
                metadata = {"similarity": n / 10, "x\x1b[2J": 1}
                own = {"jpg": file.getvalue(), "txt": b"photo %d" % n, "json": json.dumps(metadata).encode()}
                for kind, data in own.items():
                    info = tarfile.TarInfo(f"{n}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_filter_and_beside(treering: Command, shards: Path) -> None:
    done = treering("data", "index", "shards/*.tar", "--filter", "similarity > 0.25", "--beside")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [
        "the filter 'similarity > 0.25' accepts 9 of 12 samples (75.0%)",
        "next to the shards, in .treering: 3 indexes, and a summary",
    ]
    assert len(list((shards / ".treering").iterdir())) == 4
    found = json.loads(treering("data", "index", "shards/*.tar", "--filter", "similarity > 0.25", "--json").stdout)
    assert (found["samples"], found["accepted"]) == (12, 9)
    assert "beside" not in found


@pytest.mark.parametrize(
    ("filter", "sentence"),
    [
        ("similarty > 0.25", "did you mean similarity? Available are the columns similarity, x\\x1b[2J"),
        (
            "similarity > 7",
            "accepts 0 of 12 samples; the values of its columns are\n  similarity: 12 numbers from 0 to 1.1",
        ),
        ("open('x')", "cannot contain a call"),
        ("similarity >\x1b[2J", "is not a valid expression"),
    ],
)
def test_a_filter_that_cannot_be(treering: Command, shards: Path, filter: str, sentence: str) -> None:
    done = treering("data", "index", "shards/*.tar", "--filter", filter)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert all(c == "\n" or c.isprintable() for c in done.stdout + done.stderr)


def test_a_damaged_shard_does_not_keep_the_others_from_being_indexed(treering: Command, shards: Path) -> None:
    (shards / "bad.tar").write_bytes(b"x" * 2048)
    done = treering("data", "index", "shards/*.tar", "--beside")
    assert done.returncode == 2
    assert done.stdout.startswith("12 samples in 3 shards")
    assert "shards/bad.tar is not a tar file at byte 0" in done.stderr
    assert len(list((shards / ".treering").glob("*.index"))) == 3


def test_batches_of_a_recipe_with_a_filter_and_a_damaged_shard(treering: Command, shards: Path) -> None:
    (shards / "bad.tar").write_bytes(b"x" * 2048)
    source = "data.train=[{source: 'shards/*.tar', filter: similarity > 0.25}]"
    command = ["data", "batch", "emoji", source, "data.batch=9", "eval.suites=[]", "--json"]
    refused = treering(*command)
    assert refused.returncode == 2
    assert "bad.tar is not a tar file at byte 0; name tar files" in refused.stderr
    done = treering(*command, "data.bad_shards=skip")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(json.loads(done.stdout)["ranks"][0]) == sorted(str(n) for n in range(3, 12))
    wrong = treering("data", "batch", "emoji", "data.train=[{source: x, filter: a b}]")
    assert wrong.returncode == 2
    assert "data.train.0.filter" in wrong.stderr
    assert (
        "the filter 'a b' is not a valid expression; write one such as similarity > 0.28 and not nsfw" in wrong.stderr
    )


def test_notes_on_the_sources_of_a_run(shards: Path) -> None:
    (shards / "bad.tar").write_bytes(b"x" * 2048)
    url = f"{shards}/*.tar"
    source = open_source(url, filter="similarity > 0.25", bad_shards="skip")
    assert source_notes(source, "similarity > 0.25") == [
        f"{url}: the filter 'similarity > 0.25' accepts 9 of 12 samples (75.0%)",
        f"{url}: 1 damaged shard is skipped; see ledger.jsonl",
    ]
    assert source_notes(open_source(f"{shards}/[012].tar"), None) == []
