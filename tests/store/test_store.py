"""The store's promises on a local disk, a real S3 server, a fake of Google's and in memory: whole objects, one winner,
clear errors, no secrets."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.checkpoint.commits import Commits, _seal, find_commit
from treering.training.checkpoint.config import CheckpointConfig
from treering.training.checkpoint.manifest import DamagedCommit
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store, StoreError
from treering.training.state import RunState
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1),
)


@pytest.fixture(params=["local", "s3", "gs", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{tmp_path.name}"
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue(request.param)


def tensors(fill: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{kind}/layer.{i}": torch.full((50, 40 + i), fill * i) for kind in ("model", "exp_avg") for i in range(3)}


def write(commits: Commits, step: int, attempt: int = 1, fill: float = 1.0) -> str:
    return commits.write(Snapshot(SPEC, RunState(step=step, attempt=attempt), {"name": "x"}, tensors(fill)), ALONE)


def test_objects(url: str) -> None:
    store = Store(url)
    store.check()
    assert store.sizes() == {}
    store.put("a/one", b"123")
    store.put("a/one", b"1234")
    store.put("b", b"")
    assert store.get("a/one") == b"1234"
    assert store.sizes() == {"a/one": 4, "b": 0}
    assert store.sizes("a") == {"a/one": 4}
    assert store.put_new("b", b"other") is False
    assert store.get("b") == b""
    assert store.put_new("c", b"mine") is True
    assert store.put_new("c", b"mine") is True  # a retry of a write that got through
    store.delete(["a/one", "b", "c", "gone"])
    assert store.sizes() == {}
    with pytest.raises(FileNotFoundError):
        store.get("a/one")


def test_one_of_many_writers_wins(url: str) -> None:
    wins, start = [], threading.Barrier(6)

    def race(number: int) -> None:
        store = Store(url)
        start.wait()
        if store.put_new("marker", f"writer {number}".encode()):
            wins.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert Store(url).get("marker") == f"writer {wins[0]}".encode()


def test_commits_round_trip_and_retention(url: str) -> None:
    commits = Commits(Store(url))
    names = [write(commits, step) for step in (3, 20, 100)]
    assert commits.names() == names
    read = commits.open(commits.names()[-1])
    assert read.manifest.state.step == 100
    assert read.manifest.spec == SPEC
    assert all(torch.equal(read.tensors()[name], tensor) for name, tensor in tensors().items())
    assert set(read.tensors("model")) == {name for name in tensors() if name.startswith("model/")}
    commits.retain(CheckpointConfig(keep=2), attempt=1)
    assert commits.names() == names[1:]
    assert not [path for path in commits.store.sizes() if path.startswith(names[0])]


def test_an_unfinished_set_is_never_seen_and_is_swept_by_the_next_attempt(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = Commits(Store(url))
    assert commits.claim_attempt("test") == 1
    done = write(commits, 1)
    monkeypatch.setattr(commits, "seal", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(commits, 2)
    monkeypatch.undo()
    assert commits.names() == [done]
    assert any("step-000000000002" in path for path in commits.store.sizes())
    assert commits.claim_attempt("test") == 2
    commits.retain(CheckpointConfig(keep=5), attempt=2)
    assert not any("step-000000000002" in path for path in commits.store.sizes())


def test_a_second_writer_of_a_commit_loses(url: str) -> None:
    commits = Commits(Store(url))
    name = write(commits, 5)
    with pytest.raises(StoreError, match="committed by another run; give each run its own"):
        write(commits, 5, fill=2.0)
    assert torch.equal(commits.open(name).tensors()["model/layer.2"], tensors()["model/layer.2"])


@pytest.mark.parametrize("file", ["model-00000-00000.safetensors", "manifest.json", "COMMIT"])
def test_a_flipped_byte_is_found_and_named(url: str, file: str) -> None:
    commits = Commits(Store(url))
    name = write(commits, 5)
    data = bytearray(commits.store.get(f"{name}/{file}"))
    data[len(data) // 2] ^= 0x20
    commits.store.put(f"{name}/{file}", bytes(data))
    with pytest.raises(DamagedCommit, match=f"{name}.*(damaged|COMMIT)"):
        commits.open(name).tensors()


def test_a_manifest_cannot_ask_for_anything_outside(url: str) -> None:
    import hashlib
    import json

    commits = Commits(Store(url))
    name = write(commits, 5)
    manifest = json.loads(commits.store.get(f"{name}/manifest.json"))
    manifest["parts"][0]["file"] = "../../etc/passwd"
    data = json.dumps(manifest).encode()
    digest = hashlib.sha256(data).hexdigest()
    check = hashlib.sha256(digest.encode()).hexdigest()[:16]
    commits.store.put(f"{name}/manifest.json", data)
    commits.store.put(f"{name}/COMMIT", json.dumps({"manifest_sha256": digest, "check": check}).encode())
    with pytest.raises(DamagedCommit, match="parts"):
        commits.open(name)


def test_credentials_are_missing_or_wrong(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-98765")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="access is denied; check the credentials") as denied:
        Store(s3).check()
    assert "wrong-secret" not in str(denied.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"no valid credentials; set AWS_ACCESS_KEY_ID|access is denied"):
        Store(s3).check()


def test_no_commit_there(url: str) -> None:
    with pytest.raises(StoreError, match="there is no commit at"):
        find_commit(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(StoreError, match="environment or credentials file") as refused:
        Store("s3://AKIA:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    for protocol in ("gs", "abfs"):  # whoever has the package
        monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"gcsfs to access Google Storage; pip install 'treering\[gcs\]'$"):
        Store("gs://bucket/x")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(StoreError, match=r"abfs://bucket/x: .*adlfs.*; pip install what is missing$"):
        Store("abfs://bucket/x")


def test_an_unknown_protocol() -> None:
    with pytest.raises(StoreError, match="use a local path, s3://"):
        Store("nonsense://x")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    import subprocess

    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(place)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        commits = Commits(Store(str(place / "commits")))
        with pytest.raises(StoreError, match="it is full; free some space, keep fewer commits"):
            write(commits, 1)
        assert commits.names() == []
        assert commits.store.sizes() == {}
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_another_format_is_refused(tmp_path: Path) -> None:
    """One of a later release, and one that was written under the names of the first."""
    commits = Commits(Store(str(tmp_path)))
    name = write(commits, 3)
    manifest = json.loads((tmp_path / name / "manifest.json").read_text()) | {"format": 3, "new": "field"}
    data = json.dumps(manifest).encode()
    (tmp_path / name / "manifest.json").write_bytes(data)
    (tmp_path / name / "COMMIT").write_bytes(_seal(hashlib.sha256(data).hexdigest()))
    with pytest.raises(StoreError, match="is a commit of format 3, and this release reads format 2; use the release"):
        commits.open(name)
    (tmp_path / name).rename(tmp_path / "step-000000000003-life-0001")
    with pytest.raises(StoreError, match="holds commits of format 1, from before release"):
        commits.names()
    newer = write(commits, 4)
    assert commits.names() == [newer], "beside a commit that can be read it is a foreign object"


def test_attempt_ten_thousand_is_the_newest(tmp_path: Path) -> None:
    commits = Commits(Store(str(tmp_path)))
    for attempt in (9999, 10_000):
        write(commits, 3, attempt)
    assert commits.names()[-1].endswith("attempt-10000")
