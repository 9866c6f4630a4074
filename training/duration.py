"""Lengths of time as recipes write them: 30s, 2min, 1h."""

from __future__ import annotations

import re

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")


def duration(text: str) -> float | None:
    """Seconds; None if the text is no length of time."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _UNITS[match[2]] if match else None
