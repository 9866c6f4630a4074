"""Stores that nobody serves, on addresses of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from treering.launch.errors import RecipeError
from treering.launch.jobs.reachable import endpoint, refuse_unreachable


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST", "HTTP_PROXY", "HTTPS_PROXY",
                 "http_proxy", "https_proxy", "NO_PROXY", "no_proxy", "AWS_PROFILE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is taken and on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


def test_the_endpoint_is_that_of_the_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert endpoint("s3://bucket/run") == "https://s3.amazonaws.com"
    assert endpoint("gs://bucket/run") == "https://storage.googleapis.com"
    assert endpoint("/scratch/run") is None
    assert endpoint("memory://run") is None
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://ceph.example:8080\n")
    assert endpoint("s3://bucket/run") == "http://ceph.example:8080"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert endpoint("s3://bucket/run") == "http://127.0.0.1:9"


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(RecipeError, match=f"nothing answers at http://127.0.0.1:{port}; check AWS_ENDPOINT_URL"):
        refuse_unreachable("s3://bucket/run")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        refuse_unreachable("s3://bucket/run")


def test_behind_a_proxy_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    refuse_unreachable("s3://bucket/run")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(RecipeError, match="nothing answers"):
        refuse_unreachable("s3://bucket/run")


def test_settings_that_are_wrong_are_left_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    refuse_unreachable("s3://bucket/run")
