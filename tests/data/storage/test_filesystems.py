"""File systems and forks: whatever a child drops of what it inherits, its parent's connections go on."""

from __future__ import annotations

import asyncio
import gc
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import fsspec.asyn
import pytest

from treering.data.shards.parallel import sweep
from treering.data.storage.filesystems import filesystem

LIMIT = 10  # seconds for an answer of this machine


class Answers(http.server.BaseHTTPRequestHandler):
    """Keeps its connections open, as stores do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def read(system: Any, url: str) -> Any:
    found = fsspec.asyn.sync(system.loop, system._cat_file, url, timeout=LIMIT)
    fsspec.asyn.sync(system.loop, asyncio.sleep, 0.01)  # so that the loop holds nothing of it when we fork
    return found


def in_child(work: Callable[[], None]) -> None:
    """`work` in a forked process, which must succeed."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_child_that_drops_a_file_system_leaves_its_parents_connection(
    url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    held = [fsspec.filesystem("http", skip_instance_cache=True)]
    assert read(held[0], url) == b"ok"

    def drop() -> None:
        held.clear()
        gc.collect()

    in_child(drop)
    in_child(lambda: in_child(drop))
    assert read(held[0], url) == b"ok"
    assert not capfd.readouterr().err


def test_a_child_that_collects_garbage_leaves_its_parents_connection(url: str) -> None:
    """Errors of a client hold it, in cycles, until garbage is collected: then often in a child."""
    lost: list[Any] = [fsspec.filesystem("http", skip_instance_cache=True)]
    session = fsspec.asyn.sync(lost[0].loop, lost[0].set_session)
    loop = lost[0].loop

    async def ask() -> bytes:
        async with session.get(url) as answer:
            return bytes(await answer.read())

    assert fsspec.asyn.sync(loop, ask, timeout=LIMIT) == b"ok"
    fsspec.asyn.sync(loop, asyncio.sleep, 0.01)
    lost.append(lost)
    gc.disable()
    try:
        del lost
        in_child(lambda: [gc.collect()].clear())
        assert fsspec.asyn.sync(loop, ask, timeout=LIMIT) == b"ok"
    finally:
        gc.enable()


def test_a_child_has_a_loop_of_its_own(url: str) -> None:
    """A new file system works in the child; its parent's is refused at once there, and works on in the parent."""
    system, path = filesystem(url)
    assert read(system, path) == b"ok"

    def child() -> None:
        assert read(filesystem(url)[0], path) == b"ok"
        with pytest.raises(RuntimeError):
            fsspec.asyn.sync(inherited, system._cat_file, path, timeout=LIMIT)

    inherited = system.loop
    in_child(child)
    assert read(system, path) == b"ok"


def test_a_file_system_serves_after_each_sweep(url: str) -> None:
    systems = [fsspec.filesystem("http", client_kwargs={"headers": {"n": str(n)}}) for n in range(3)]

    def drop(_: int) -> int:
        systems.clear()
        fsspec.filesystem("http")  # the first use in a process forgets the parent's instances
        return gc.collect()

    for _ in range(3):
        assert [read(each, url) for each in systems] == [b"ok"] * 3
        assert len(list(sweep(drop, range(8), 2))) == 8
    assert [read(each, url) for each in systems] == [b"ok"] * 3
