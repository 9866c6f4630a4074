"""Bad data, stores, disks and commits: one message on one screen, exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from treering.tests.support.made_up_shards import Members, shard

TINY = [
    "data.batch=4",
    "model.embed_dim=16",
    "model.image={width: 32, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 16, depth: 1, heads: 2, context: 16}",
    "schedule.warmup=4",
    "stages=[{samples: 16}]",
    "eval.suites=[]",
]


def treering(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "treering.launch", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def train(source: Path | str, out: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    where = [f"data.train=[{{source: {json.dumps(str(source))}}}]", "--out", str(out)]
    return treering("train", "emoji", *TINY, *where, *overrides, **environment)


def picture(kind: str = "JPEG", seed: int = 0) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def good(samples: int = 8) -> Members:
    pairs = [[(f"{i}.jpg", picture(seed=i)), (f"{i}.txt", f"picture {i}".encode())] for i in range(samples)]
    return [member for pair in pairs for member in pair]


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command said what is wrong and what to do, on one screen, and nothing else."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 24
    shown = " ".join(done.stderr.split())
    for word in words:
        assert word in shown, done.stderr


def test_missing_shards(tmp_path: Path) -> None:
    done = train(str(tmp_path / "nothing-{000..003}.tar"), tmp_path / "run")
    refused(done, "nothing-", "no")
    assert not (tmp_path / "run").exists()


def test_an_empty_source(tmp_path: Path) -> None:
    done = train(shard(tmp_path / "a.tar", []), tmp_path / "run")
    refused(done, "a.tar")
    assert not (tmp_path / "run").exists()


def test_a_source_in_which_nothing_fits(tmp_path: Path) -> None:
    done = train(shard(tmp_path / "a.tar", [(f"{i}.jpeg2", b"x") for i in range(5)]), tmp_path / "run")
    refused(done, "0 of 5", "jpeg2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cut", ["inside a picture", "between two members"])
def test_a_truncated_tar(cut: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", good())
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]
    path.write_bytes(path.read_bytes()[: last.offset if cut == "between two members" else last.offset_data + 50])
    done = train(str(path), tmp_path / "run")
    refused(done, "a.tar", "is cut short")
    assert not (tmp_path / "run").exists()


def test_two_files_with_one_key(tmp_path: Path) -> None:
    done = train(shard(tmp_path / "a.tar", [*good(), ("3.png", picture("PNG"))]), tmp_path / "run")
    refused(done, "a.tar", "'3'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ([("x.jpg", b"\xff\xd8\xff nonsense"), ("x.txt", b"a caption")], ["'x'", "1 of 9 samples are bad"]),
        ([("x.jpg", picture()), ("x.txt", b"caf\xe9")], ["'x'", "UTF-8"]),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_sample_that_cannot_be_used(broken: Members, words: list[str], processes: str, tmp_path: Path) -> None:
    """One in nine is more than data.max_bad_fraction allows; the ledger names it. Allowed, the run goes on."""
    source, out = shard(tmp_path / "a.tar", [*good(), *broken]), tmp_path / "run"
    refused(train(source, out, "--processes", processes), *words, "data.max_bad_fraction")
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert {row["key"] for row in ledger} == {"x"}
    if processes == "1":
        done = train(source, tmp_path / "tolerant", "data.max_bad_fraction=0.2")
        assert done.returncode == 0, done.stderr


def test_pack_refuses_what_training_could_not_use(tmp_path: Path) -> None:
    for name, data in [("a.jpg", picture()), ("b.jpg", b"\xff\xd8 nonsense"), ("c.jpg", picture())]:
        (tmp_path / name).write_bytes(data)
    table, out = tmp_path / "captions.tsv", tmp_path / "shards"
    table.write_bytes(b"a.jpg\tone\nb.jpg\ttwo\n")
    refused(treering("data", "pack", str(table), str(out)), "b.jpg")
    table.write_bytes(b"a.jpg\tone\nc.jpg\tcaf\xe9\n")
    refused(treering("data", "pack", str(table), str(out)), "captions.tsv", "2", "UTF-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in [("a.jpg", picture()), ("a.png", picture("PNG")), ("a.txt", b"one")]:
        (folder / name).write_bytes(data)
    refused(treering("data", "pack", str(folder), str(out)), "a.jpg", "a.png")
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "b.jpg", "c.jpg", "captions.tsv", "folder"]


def test_a_store_without_credentials(tmp_path: Path) -> None:
    source = shard(tmp_path / "a.tar", good())
    nothing = {
        "HOME": str(tmp_path),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
    }
    nothing |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "TREERING_CACHE": str(tmp_path / "cache")}
    done = train(source, tmp_path / "run", "checkpoint.to=s3://bucket/run", **nothing)
    refused(done, "s3://bucket/run", "no valid credentials", "AWS_ACCESS_KEY_ID")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    """Room enough for the checks before a run and for its first commits; then somebody else fills the disk."""
    source, place = shard(tmp_path / "a.tar", good()), tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", str(place)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    where = [f"data.train=[{{source: {json.dumps(str(source))}}}]", "--out", str(tmp_path / "run")]
    often = ["stages=[{samples: 400}]", "checkpoint.every=4", f"checkpoint.to={place}/commits"]
    often.append("checkpoint.wait_for_store=0s")
    command = [sys.executable, "-P", "-m", "treering.launch", "train", "emoji", *TINY, *where, *often]
    run = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        while run.poll() is None and not list(place.glob("commits/*/COMMIT")):
            time.sleep(0.05)
        with contextlib.suppress(OSError), (place / "filler").open("wb") as filler:
            while run.poll() is None:
                filler.write(bytes(1 << 20))
                filler.flush()
        out, err = run.communicate(timeout=60)
        said = subprocess.CompletedProcess(command, run.returncode, out, err.split("committed")[-1])
        refused(said, str(place), "it is full; free some space")
        (place / "filler").unlink()
        done = treering(*command[4:])
        assert done.returncode == 0, done.stderr
        steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in steps if row["event"] == "step"] == list(range(10, 101, 10))
    finally:
        run.kill()
        subprocess.run(["umount", str(place)], check=True)


def test_a_commit_with_one_flipped_byte(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train(shard(tmp_path / "a.tar", good()), out, "checkpoint.keep=1")
    assert done.returncode == 0, done.stderr
    part = next((out / "commits").glob("step-*/model-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    refused(treering("eval", str(out), "--suite", "retrieval", "--data", str(tmp_path / "a.tar")), part.name, "damaged")
    refused(train(str(tmp_path / "a.tar"), out, "checkpoint.keep=1"), "every commit", "damaged")
