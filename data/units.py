"""Sizes and durations as written in recipes and options: 500MB, 50GB, 30s, 2min, 1h; and numbers of things in words."""

from __future__ import annotations

import re

_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(kB|MB|GB|TB)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")


def size_in_bytes(text: str) -> int | None:
    """Bytes of a size such as 50GB; None if `text` is not a size."""
    match = _SIZE.fullmatch(text)
    return int(float(match[1]) * _BYTES[match[2]]) if match else None


def duration(text: str) -> float | None:
    """Seconds of a duration such as 2min; None if `text` is not one."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def counted(count: int, noun: str) -> str:
    """A number of things: 1 shard, 2,000 shards, 3 processes, 0 copies."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{count:,} {noun}es"
    return f"{count:,} {noun[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else f"{count:,} {noun}s"
