"""The files that URLs name: one by one, by patterns, or by listing a folder of a store.

Few requests are the idea: a folder of tens of thousands of shards is listed once, a local path costs one system call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from stat import S_ISDIR, S_ISREG
from typing import Any, TypeVar

from fsspec.utils import glob_translate

from ..errors import DataError
from .files import SIDECAR_FOLDER, ShardInfo, info_of, readable_errors, shown_url, stamp_of, version_of
from .filesystems import filesystem, single_try_filesystem
from .names import is_local, is_pattern, literal_part, split_local
from .retries import retry

T = TypeVar("T")
_LISTED = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs"))  # stores that list the names with a prefix
_LIST_FROM = 16  # from this many names in a folder it is listed; concurrent requests if it cannot be
_START_SECONDS = 20.0  # a store that does not answer at all is more likely misspelt than restarting


def lists_by_prefix(url: str) -> bool:
    """Whether the store of a URL lists the names with a prefix, without looking at others."""
    return url.partition("://")[0] in _LISTED


def find_all(urls: Sequence[str]) -> list[ShardInfo]:
    """The files behind URLs without braces. Many names in one folder of a store are looked up by listing the folder:
    separate requests for tens of thousands would take minutes. Raises as `find` does."""
    found: list[ShardInfo] = []
    single: list[str] = []
    local: list[str] = []
    folders: dict[str, list[str]] = {}
    for url in urls:
        if is_local(url):
            local.append(url)
        elif is_pattern(url):
            found += find(url)
        elif lists_by_prefix(url) and "?" not in url:
            folders.setdefault(url.rpartition("/")[0], []).append(url)
        else:
            single.append(url)
    found += _find_local(local)
    for folder, names in folders.items():
        if len(names) < _LIST_FROM:
            single += names
        else:
            found += _listed(folder, names)
    if len(single) < _LIST_FROM:
        return found + [each for url in single for each in find(url)]
    with ThreadPoolExecutor(_LIST_FROM) as pool:
        return found + [each for few in pool.map(find, single) for each in few]


def _listed(folder: str, urls: Sequence[str]) -> list[ShardInfo]:
    """The files of one folder of a store that `urls` name."""
    with readable_errors(folder):
        system, path = single_try_filesystem(folder)
        matches = retry(
            shown_url(folder),
            lambda: system.find(path, maxdepth=1, detail=True),  # with a prefix too, s3fs before 2026 refuses it
            seconds=_START_SECONDS,
        )
    there = {_with_protocol(folder, name): match for name, match in matches.items() if match["type"] == "file"}
    missing = [url for url in urls if url not in there]
    if missing:
        more = f" (and {len(missing) - 1:,} more of {len(urls):,})" if len(missing) > 1 else ""
        raise DataError(
            f"no shards match {shown_url(missing[0])}{more}: not found; check the bucket and the names in it"
        )
    return [ShardInfo(url, int(there[url]["size"]), stamp_of(there[url])) for url in urls]


def _find_local(urls: Sequence[str]) -> list[ShardInfo]:
    """`find` for local paths, with one system call per file. Raises DataError."""
    found = []
    for url in urls:
        before, path = split_local(url)
        folder, pattern = literal_part(path, os.path.lexists) if is_pattern(path) else (path, "")
        try:
            stats = _matches(folder, pattern) if pattern else [(path, os.stat(path))]
        except FileNotFoundError:
            stats = []
        except OSError as error:
            with readable_errors(url):
                raise error
        regular = [(name, stat) for name, stat in stats if S_ISREG(stat.st_mode)]
        shards = [ShardInfo(before + name, stat.st_size, version_of(stat)) for name, stat in regular]
        if not shards:
            if stats and S_ISDIR(stats[0][1].st_mode) and not pattern:
                where = shown_url(url).rstrip("/")
                raise DataError(f"{shown_url(url)} is a folder; name the tar files in it, as in {where}/*.tar")
            raise DataError(f"no shards match {shown_url(url)}: not found; check the path")
        found += shards
    return found


def _matches(folder: str, pattern: str) -> list[tuple[str, os.stat_result]]:
    """The paths in a folder that a pattern matches, with their stat results."""
    if "/" in pattern or "**" in pattern:
        names = _globbed(filesystem(folder or "/")[0], folder, pattern)
        return [(each, os.stat(each)) for each in names]
    fits = re.compile(glob_translate(pattern)).match
    with os.scandir(folder or "/") as entries:
        return [(entry.path, entry.stat()) for entry in entries if fits(entry.name)]


def _globbed(system: Any, folder: str, pattern: str) -> dict[str, dict[str, Any]]:
    """What a pattern matches in a folder, by path; the name of the folder is taken as it is."""
    depth = None if "**" in pattern else pattern.count("/") + 1
    fits = re.compile(glob_translate(pattern)).match
    found: dict[str, dict[str, Any]] = system.find(folder or "/", maxdepth=depth, detail=True)
    return {
        name: info
        for name, info in found.items()
        if fits(name[len(folder) + 1 :]) and f"/{SIDECAR_FOLDER}/" not in name
    }


def find(url: str) -> list[ShardInfo]:
    """The files behind a URL without braces. Raises DataError if there are none or the store does not answer."""
    if is_local(url):
        return _find_local([url])
    with readable_errors(url):
        system, path = single_try_filesystem(url)
        folder, pattern = path, ""
        if is_pattern(url):
            folder, pattern = literal_part(path, lambda name: _tried(url, lambda: system.exists(name)))
        if pattern:
            glob = _globbed if is_pattern(folder) else lambda system, folder, pattern: system.glob(path, detail=True)
            found = _tried(url, lambda: glob(system, folder, pattern))
            files = [match for match in found.values() if match["type"] == "file"]
            files = [match for match in files if f"/{SIDECAR_FOLDER}/" not in match["name"]]
            urls = [_with_protocol(url, match["name"]) for match in files]
        else:
            match = _tried(url, lambda: info_of(system, path))
            if match and match["type"] == "directory":
                raise DataError(
                    f"{shown_url(url)} is a folder; name the tar files in it, as in {shown_url(url).rstrip('/')}/*.tar"
                )
            files, urls = ([match], [url]) if match else ([], [])
        if not files:
            twice = "; a double slash is a folder without a name, which some servers drop" if "//" in path else ""
            raise DataError(f"no shards match {shown_url(url)}: not found; check the bucket and the names in it{twice}")
        return [ShardInfo(each, int(m["size"]), stamp_of(m)) for each, m in zip(urls, files, strict=True)]


def _tried(url: str, ask: Callable[[], T]) -> T:
    return retry(shown_url(url), ask, seconds=_START_SECONDS)


def _with_protocol(url: str, name: str) -> str:
    protocol, separator, _ = url.partition("://")
    return name if not separator or "://" in name else f"{protocol}://{name}"
