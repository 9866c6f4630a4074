"""Reading from a store that fails, against the real S3 server: the batches are the same as from a local disk."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from treering.data import DataConfig, DataError, Loader, open_source
from treering.data.loading import loader
from treering.data.storage import retries
from treering.data.storage.block_cache import BlockCache
from treering.data.storage.files import read_range
from treering.data.storage.find import find
from treering.tests.support.faulty_proxy import FAULTS, FaultyProxy, one_in
from treering.tests.support.s3_server import Server

STEPS = 24


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, write_source: Callable[..., str]) -> str:
    return write_source(tmp_path_factory.mktemp("local"), 2, 30)


@pytest.fixture
def uploaded(s3: str, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shards of `local` in the bucket; an empty cache folder, small blocks and a client that waits one second."""
    import s3fs

    monkeypatch.setenv("TREERING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    monkeypatch.setattr(loader, "BlockCache", functools.partial(BlockCache, block=2048))
    for path in sorted(Path(local).parent.glob("*.tar")):
        s3fs.S3FileSystem().put_file(str(path), f"{s3.removeprefix('s3://')}/{path.name}")
    return f"{s3}/part-*.tar"


@pytest.fixture
def proxy(s3_server: Server, uploaded: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    import s3fs

    with FaultyProxy(s3_server.port, lambda n: "") as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield between


def opened(url: str, limit: str | None, workers: int = 0) -> Loader:
    config = DataConfig.model_validate(
        {"train": [{"source": url}], "batch": 8, "workers": workers, "cache": {"limit": limit}}
    )
    return Loader(config, 24, 16, seed=3)


def batches(each: Loader, first: int = 0, count: int = STEPS) -> list[Any]:
    with closing(each.batches(first)) as read:
        return [
            (batch.keys, batch.captions, [zlib.crc32(image.numpy().tobytes()) for image in batch.images], batch.bad)
            for batch in islice(read, count)
        ]


@pytest.mark.parametrize(("limit", "workers"), [(None, 0), ("50GB", 0), (None, 2), ("50GB", 2)])
def test_a_store_that_fails_changes_nothing(
    local: str, uploaded: str, proxy: FaultyProxy, limit: str | None, workers: int
) -> None:
    proxy.plan = one_in(20)
    assert batches(opened(uploaded, limit, workers)) == batches(opened(local, None))
    assert len(proxy.requests) > 120
    assert set(proxy.faults) == set(FAULTS)


@pytest.mark.parametrize(("limit", "workers"), [(None, 0), ("50GB", 0), (None, 2), ("50GB", 2)])
def test_a_server_killed_in_mid_stream_changes_nothing(
    local: str, uploaded: str, s3_server: Server, tmp_path: Path, limit: str | None, workers: int
) -> None:
    each, read = opened(uploaded, limit, workers), []
    try:
        with closing(each.batches(0)) as stream:
            for step, batch in enumerate(islice(stream, STEPS)):
                read.append(batch.keys + tuple(zlib.crc32(image.numpy().tobytes()) for image in batch.images))
                if step == 5:
                    for kept in (tmp_path / "cache" / "blocks").glob("*"):
                        kept.unlink()  # else nobody would ask the server
                    s3_server.kill()
                    threading.Timer(1.0, s3_server.start).start()
    finally:
        s3_server.wait()
    assert read == [keys + tuple(sums) for keys, _, sums, _ in batches(opened(local, None))]


def put(server: Server, url: str, data: bytes) -> None:
    """Past the proxy."""
    import s3fs

    s3fs.S3FileSystem(endpoint_url=server.endpoint).pipe_file(url, data)


def test_a_range_continues_at_the_byte_where_it_failed(s3: str, s3_server: Server, proxy: FaultyProxy) -> None:
    data = os.urandom(4_000_000)
    put(s3_server, f"{s3}/large", data)
    (shard,) = find(f"{s3}/large")
    proxy.requests.clear()
    proxy.plan = lambda n: "short" if n < 3 else ""
    assert read_range(shard, 1000, 3_900_000) == data[1000:3_900_000]
    starts = [int(asked.partition("-")[0]) for asked, _ in proxy.requests]
    assert starts[0] == 1000
    assert starts == sorted(set(starts))  # each goes on behind the one before
    assert starts[1] > 500_000
    assert {asked.partition("-")[2] for asked, _ in proxy.requests} == {"3899999"}


@pytest.mark.parametrize(("status", "sentence"), [("403", "access refused; check"), ("404", "not found; check")])
def test_a_refusal_is_final(uploaded: str, proxy: FaultyProxy, status: str, sentence: str) -> None:
    source = open_source(uploaded)
    proxy.requests.clear()
    proxy.plan = lambda n: status
    with pytest.raises(DataError, match=sentence):
        source.record(0)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_a_store_that_stays_away_is_given_up(
    uploaded: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    source = open_source(uploaded)
    monkeypatch.setattr(retries, "TRIES", 4)
    proxy.requests.clear()
    proxy.plan = lambda n: fault
    with pytest.raises(DataError, match=r"cannot read s3://.*; tried 4 times in \d+ seconds; check that the store"):
        source.record(0)
    assert len(proxy.requests) in (4, 8)  # aiohttp itself asks again, once, when a connection breaks
    monkeypatch.setattr(retries, "TRIES", 100)
    monkeypatch.setattr(retries, "SECONDS", 0.5)
    with pytest.raises(DataError, match=r"tried [2-6] times in [01] seconds"):
        source.record(0)


def test_a_rewritten_shard_is_not_mixed_with_the_old_one(s3: str, s3_server: Server, uploaded: str) -> None:
    put(s3_server, f"{s3}/one", b"a" * 1000)
    (shard,) = find(f"{s3}/on*")
    put(s3_server, f"{s3}/one", b"b" * 1000)
    with pytest.raises(DataError, match="changed while it was read"):
        read_range(shard, 0, 10)
    (shard,) = find(f"{s3}/on*")
    assert read_range(shard, 0, 3) == b"bbb"


def test_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, ranges = os.urandom(3_000_000), []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a connection a request

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", "W/1")
            self.end_headers()

        def do_GET(self) -> None:
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            ranges.append(start)
            if self.path == "/busy" or len(ranges) == 2:
                return self.send_error(503)
            if self.path == "/private":
                return self.send_error(403)
            self.send_response(200 if self.path == "/whole" else 206)
            self.send_header("Content-Length", str(end + 1 - start))
            self.end_headers()
            self.wfile.write(data[start : end + 1] if len(ranges) > 3 else data[start : start + 1_000_000])
            return None

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        (shard,) = find(f"{address}/shard.tar")
        assert (shard.size, shard.stamp) == (len(data), "W/1")
        assert read_range(shard, 5, 2_900_000) == data[5:2_900_000]
        assert ranges == sorted(ranges)
        assert len(set(ranges)) == 3  # begun, gone on after 503, gone on after a short body
        for path, sentence in {"private": "access refused", "whole": "does not support range requests"}.items():
            with pytest.raises(DataError, match=sentence):
                read_range(find(f"{address}/{path}")[0], 0, 9)
        monkeypatch.setattr(retries, "TRIES", 2)
        with pytest.raises(DataError, match="the store answers 503; tried 2 times"):
            read_range(find(f"{address}/busy")[0], 0, 9)
        server.shutdown()
