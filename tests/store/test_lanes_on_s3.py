"""A source too large for the node's cache, read in lanes by two nodes: each fetches its part of the shards, once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treering.data import DataConfig, Loader
from treering.data.shards.tar_writer import write_shards
from treering.tests.support.faulty_proxy import FaultyProxy
from treering.tests.support.s3_server import Server

SHARDS, EACH, BATCH, WORLD = 40, 24, 16, 2
STEPS = SHARDS * EACH // BATCH
OPTIONS: dict[str, Any] = {"batch": BATCH, "shuffle_window": 96, "lanes": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 shards of about 340 kB: pictures of noise, so that the bytes are theirs."""
    import io

    from PIL import Image

    def picture(seed: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 64, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    samples = [
        (f"{n:05d}", {"png": picture(n), "txt": f"picture {n}".encode(), "json": json.dumps({"n": n}).encode()})
        for n in range(SHARDS * EACH)
    ]
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "part", samples, len(samples), EACH)
    return folder


def rows(url: str, rank: int, world: int, limit: str, steps: int = STEPS) -> list[Any]:
    config = DataConfig.model_validate({"train": [{"source": url}], "cache": {"limit": limit}, **OPTIONS})
    loader, found = Loader(config, 24, 16, 3, rank, world), []
    with closing(loader.batches(0)) as batches:
        for batch in islice(batches, steps):
            sums = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
            found += zip(batch.keys, sums, strict=True)
    return found


def on_a_node(results: Any, cache: Path, *arguments: Any) -> None:
    os.environ["TREERING_CACHE"] = str(cache)
    results.put((arguments[1], rows(*arguments)))


@pytest.mark.timeout(180)
def test_two_nodes_fetch_each_shard_once(
    folder: Path, s3: str, s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "indexes"))
    s3fs.S3FileSystem().put([str(path) for path in sorted(folder.iterdir())], f"{s3.removeprefix('s3://')}/")
    expected = [rows(str(folder / "*.tar"), rank, WORLD, "50GB") for rank in range(WORLD)]
    assert len({key for node in expected for key, _ in node}) == SHARDS * EACH
    rows(f"{s3}/*.tar", 0, 1, "50GB", steps=1)  # the walk over the shards is not what is counted here
    context = multiprocessing.get_context("fork")
    with FaultyProxy(s3_server.port, lambda request: "") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        results: Any = context.Queue()
        for rank in range(WORLD):
            cache = tmp_path / f"node-{rank}"
            cache.mkdir()
            (cache / "index").symlink_to(tmp_path / "indexes" / "index")
            process = context.Process(target=on_a_node, args=(results, cache, f"{s3}/*.tar", rank, WORLD, "9MB"))
            process.start()
        found = dict(results.get(timeout=150) for _ in range(WORLD))
    assert [found[rank] for rank in range(WORLD)] == expected
    fetched = Counter(
        Path(target).name for target, (span, _) in zip(proxy.targets, proxy.requests, strict=True) if span
    )
    assert len(fetched) == SHARDS
    # 16 pieces of the line end inside a shard at most, and a block may be fetched by two processes of a node at once.
    assert fetched.total() < 2 * SHARDS  # sample by sample it is 24
    for rank in range(WORLD):
        kept = sum(path.stat().st_size for path in (tmp_path / f"node-{rank}" / "blocks").iterdir())
        assert kept <= 9e6 * 1.1


def test_a_limit_too_small_for_the_windows_is_told(
    folder: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path))
    s3fs.S3FileSystem().put([str(path) for path in sorted(folder.iterdir())], f"{s3.removeprefix('s3://')}/")
    assert rows(f"{s3}/*.tar", 0, 1, "1MB", steps=2) == rows(str(folder / "*.tar"), 0, 1, "1MB", steps=2)
    assert "data.cache.limit = 1MB is less than the 0.0 GB" in caplog.text
    assert not list((tmp_path / "blocks").iterdir() if (tmp_path / "blocks").exists() else [])


def test_the_reader_ahead_stays_within_its_bounds_and_ends_with_its_rank(
    folder: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    from treering.data.loading import prefetch

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path))
    monkeypatch.setattr(prefetch, "_MAX_BYTES", 2_000_000)
    s3fs.S3FileSystem().put([str(path) for path in sorted(folder.iterdir())], f"{s3.removeprefix('s3://')}/")
    config = DataConfig.model_validate({"train": [{"source": f"{s3}/*.tar"}], "cache": {"limit": "1GB"}, **OPTIONS})
    loader = Loader(config, 24, 16, 3)
    for path in (tmp_path / "blocks").iterdir():  # left there by the walk
        path.unlink()
    reader = prefetch.Prefetcher(loader.order, loader.sources, loader.cache, 0, 1, 0)
    sizes = [0]
    for step in (0, 10, 20):
        reader.reached(step)
        sizes.append(settled(tmp_path / "blocks", max(sizes[-1], 2_000_000 if step == 20 else 0)))
    assert sizes[-1] < sum(loader.sources[0].shard_sizes)
    reader.close()
    pid = os.fork()
    if pid == 0:  # a rank that is killed
        reader = prefetch.Prefetcher(loader.order, loader.sources, loader.cache, 0, 1, 0)
        (tmp_path / "reader").write_text(str(multiprocessing.active_children()[0].pid))
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    orphan = int((tmp_path / "reader").read_text())
    wait(lambda: not Path(f"/proc/{orphan}").exists() or "Z" in Path(f"/proc/{orphan}/stat").read_text().split()[2])


def settled(folder: Path, more_than: int) -> int:
    """The bytes in a folder once they are more than they were, and do not grow any more."""
    sizes = [0]

    def quiet() -> bool:
        time.sleep(0.4)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
        return sizes[-1] == sizes[-2] > more_than

    wait(quiet)
    return sizes[-1]


def wait(done: Callable[[], bool], seconds: float = 100.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
