"""The file system of a URL (fsspec), with the settings that every reader and writer here wants.

File systems are opened where they are used: fsspec keeps its instances per process, so none is used across a fork.
What a forked child inherits of them must not be closed there: the child shares the epoll object of its parent's event
loop, and closing a connection in the child takes it from the parent's epoll, which then waits for its answer for ever.
So the loop counts as closed in the child, and nothing that is dropped or collected there touches it.
"""

from __future__ import annotations

import asyncio
import os
from functools import lru_cache
from typing import Any

import fsspec
import fsspec.asyn
import fsspec.config
import fsspec.core

from .failures import Failure, failure_of
from .names import is_local
from .retries import http_status

_S3 = ("s3://", "s3a://")
_IDENTITY = {"anon", "key", "secret", "token", "profile", "session"}  # settings of fsspec that say who is asking
_inherited: list[asyncio.AbstractEventLoop] = []  # fsspec's loop at the last fork


def _before_fork() -> None:
    """Notes fsspec's loop, which fsspec forgets in the child before `_in_child`."""
    _inherited[:] = [fsspec.asyn.loop[0]] if fsspec.asyn.loop[0] else []


def _in_child() -> None:
    """Marks the inherited loop as closed: its thread is not here. `close` itself would change the parent's epoll."""
    for loop in _inherited:
        if isinstance(loop, asyncio.BaseEventLoop):
            loop._closed, loop._thread_id = True, None  # type: ignore[attr-defined]


os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """The file system of a URL, for use in this process, and the path in it. A local path may hold the :: that fsspec
    reads as a chain."""
    if is_local(url):
        system = fsspec.filesystem("file")
        return system, system._strip_protocol(url)
    found: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    return found


def single_try_filesystem(url: str, public: bool = True) -> tuple[Any, str]:
    """Like `filesystem`, without the client's retries, for callers that use `retry`. With `public`, buckets that anyone
    may read are read where there are no credentials.

    S3 clients retry in two layers, neither of which can continue a partly received range. Listings are not cached,
    since a cached one would hide newer files."""
    options: dict[str, Any] = {"use_listings_cache": False}
    is_s3 = url.startswith(_S3)
    if is_s3:
        if public and is_anonymous(url):
            options["anon"] = True
        if "?versionId=" in url:
            options["version_aware"] = True
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {**configured, "retries": {"max_attempts": 0}}
    system, path = filesystem(url, **options)
    if is_s3:
        system.retries = 1
    return system, path


def is_anonymous(url: str) -> bool:
    """Whether a URL of S3 is read without credentials, as there are none: public buckets can be read so."""
    if not url.startswith(_S3) or fsspec.config.conf.get("s3", {}).keys() & _IDENTITY:
        return False
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "HOME"}
    return _without_credentials(tuple(sorted(settings.items())))


@lru_cache(maxsize=4)
def _without_credentials(settings: tuple[tuple[str, str], ...]) -> bool:
    """Whether the client of S3 finds no credentials with these environment variables."""
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError:
        return False
    try:
        return botocore.session.Session().get_credentials() is None
    except botocore.exceptions.BotoCoreError:
        return False  # a profile that does not exist, say: the client reports it


def with_code(system: Any, path: str, error: Exception) -> Exception:
    """An error that says why a request was refused: S3 answers HEAD without a body, so a listing is asked for the
    code."""
    if "s3" in system.protocol and (isinstance(error, PermissionError) or http_status(error) in (400, 403)):
        bucket, _, prefix = path.partition("/")
        try:
            system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except Exception as why:
            return why
    return error


def failure_at(url: str, error: Exception) -> Failure | None:
    """The kind of failure behind an error of the file system of `url`; None if it is not one."""
    failure = failure_of(error)
    return "credentials" if failure == "denied" and is_anonymous(url) else failure
