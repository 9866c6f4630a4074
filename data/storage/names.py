"""What a name means: a file of exactly this name, a pattern, or something of another kind.

The one idea: what exists under exactly a name is that name. So a folder called `[2024] photos` is that folder, whether
it is named or stood in, and only what does not exist as written is read as a pattern.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import fsspec

from ..errors import DataError
from .credentials import without_user

_GLOB = frozenset("*?[")
_SPECIAL = frozenset("*?[{")
_LOCAL = ("file://", "local://")
_WRAPPERS = frozenset(("simplecache", "filecache", "blockcache", "cached", "zip", "tar", "libarchive", "dir"))
_PATHS = frozenset(("file", "local", "data", "dir", "memory"))  # protocols whose names are words of everyday folders


def is_local(url: str) -> bool:
    """Whether a URL is a path on this machine."""
    return "://" not in url or url.startswith(_LOCAL)


def is_pattern(url: str) -> bool:
    """Whether a URL has the signs of a glob. The query of a web address and the version of an object are none."""
    if url.startswith(("http://", "https://")):
        url = url.partition("?")[0]
    return bool(_GLOB & set(url.partition("?versionId=")[0] if url.startswith("s3") else url))


def split_local(url: str) -> tuple[str, str]:
    """The protocol that a local URL was written with (or nothing), and its absolute path."""
    before = next((protocol for protocol in _LOCAL if url.startswith(protocol)), "")
    path = url[len(before) :]
    if not path.startswith("/") or "/." in path or "//" in path:
        path = os.path.abspath(os.path.expanduser(path))
    return before, path


def literal_part(path: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """The folder that a path begins with, and the pattern in it; the whole path and nothing if it exists as written.

    `exists` is asked once for every part with special signs, up to the first that does not exist.
    """
    parts = path.split("/")
    for count, part in enumerate(parts, 1):
        if _SPECIAL & set(part) and not exists("/".join(parts[:count])):
            return "/".join(parts[: count - 1]), "/".join(parts[count - 1 :])
    return path, ""


def split_braces(url: str) -> tuple[str, str]:
    """The beginning of a URL whose braces are signs of a name, and the rest, whose braces are ranges and lists."""
    if not is_local(url) or "{" not in url:
        return "", url
    before, path = split_local(url)
    folder, pattern = literal_part(path, os.path.lexists)
    return before + folder + "/" * bool(pattern), pattern


def _is_shard(piece: str) -> bool:
    """Whether what stands before :: is an address of its own, and not a layer of fsspec over the next one."""
    protocol, slashes, _ = piece.partition("://")
    return protocol not in _WRAPPERS if slashes else piece.endswith((".tar", ".tar.gz", ".tgz"))


def refuse_other_syntax(url: str) -> None:
    """Raise DataError for what other tools would read and we do not: commands, lists, URLs with a slip."""
    if is_local(url):
        parts = split_local(url)[1].split("/")
        odd = next((count for count, part in enumerate(parts, 1) if ":" in part or part != part.strip()), 0)
        if odd and os.path.lexists("/".join(parts[:odd])):
            return
    if url.startswith("pipe:"):
        raise DataError("pipe: a command is not run; name the files that it reads, as in s3://BUCKET/{000..012}.tar")
    name = without_user(url)
    *outer, _ = url.split("::")
    if any(_is_shard(piece) for piece in outer):
        raise DataError(f"{name}: a list with :: is not read; write {{a,b}} or a pattern, or a source for each")
    protocol = re.match(r"([a-z][a-z0-9+]+):(?!//)", url, re.IGNORECASE)
    if protocol and protocol[1].lower() in {*fsspec.available_protocols()} - _PATHS:
        raise DataError(f"{name}: a URL has two slashes after {protocol[1]}: as in {protocol[1].lower()}://BUCKET/NAME")
    if url != url.strip():
        raise DataError(f"{name!r} begins or ends with a space; remove it")
