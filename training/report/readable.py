"""Formats numbers and names for the report page and the terminal."""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, datetime
from typing import Any

MISSING = "–"

_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_FLOPS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (bool does not count)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    return float(value) if is_number(value) else None


def plain(name: str) -> str:
    """A name from a file in plain words: underscores become spaces."""
    return printable(name).replace("_", " ")


def general(value: object) -> str:
    """A model size: 8, 0.5."""
    return f"{value:g}" if is_number(value) else MISSING


def decimal(value: float | None, digits: int = 4) -> str:
    """`digits` significant figures: 3.214, 0.00025, 1.5e-7."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else str(value)
    text = f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*(\d+)$", lambda m: f"e{'-' if m[1] == '-' else ''}{m[2]}", text)


def exact(value: float | None) -> str:
    """An integer with thousands separators: 60,160."""
    return MISSING if value is None else f"{round(value):,}"


def compact(value: float | None) -> str:
    """Three significant figures and a unit prefix: 834, 340 k, 14.1 M, 1.24 B."""
    return _scaled(value, _LARGE)


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units: 812 B, 12.4 MB."""
    return _scaled(value, _BYTES, smallest=" B")


def flops(value: float | None) -> str:
    """Floating-point operations: 1.24 PFLOP."""
    return _scaled(value, _FLOPS, smallest=" FLOP")


def percent(fraction: float | None) -> str:
    """A fraction as a percentage: 61.3% for 0.613; small ones keep two significant figures: 0.42%."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    value = fraction * 100
    if value == 0 or abs(value) >= 1:
        return f"{value:.1f}%"
    return f"{decimal(value, 2)}%"


def measure_text(key: str) -> str:
    """The measure in a score's key: accuracy for pets/accuracy@1, image_to_text for retrieval/image_to_text@5. The
    scores of the suite zero_shot are accuracies, called by a label of the data: that may be any text."""
    suite, _, measure = key.partition("/")
    return "accuracy" if suite == "zero_shot" else measure.partition("@")[0]


def counts_first(key: str) -> bool:
    """Whether a score counts first results alone, unlike R@5 and R@10, which lose some of the same queries."""
    suite, _, measure = key.partition("/")
    return suite == "zero_shot" or not measure.endswith(("@5", "@10"))


def is_fraction(key: str) -> bool:
    """Whether a score is a fraction between 0 and 1."""
    return measure_text(key) not in _NUMBERS


def score(key: str, value: float | None) -> str:
    """A score as text: a fraction as 61.3%, any other score as a number."""
    return percent(value) if is_fraction(key) else decimal(value)


def lower_is_better(key: str) -> bool | None:
    """Whether a lower score is better; None if neither direction is better."""
    name = measure_text(key)
    return None if name == "modality_gap" else name in _LOWER


_LOWER = {"calibration_error", "alignment", "uniformity_image", "uniformity_text"}
_NUMBERS = {"modality_gap", "alignment", "uniformity_image", "uniformity_text", "cider"}


def unbroken(text: str) -> str:
    """A text in which no line ends between a number and its unit."""
    return re.sub(r"(?<=\d) (?=\D)", "\u00a0", text)


def duration_text(seconds: float | None) -> str:
    """0.3 s, 42 s, 3 min 20 s, 1 h 04 min, 2 d 3 h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{decimal(seconds, 1) if seconds < 0.095 else f'{seconds:.1f}'} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def moment(unix: float | None) -> str:
    """22 November 2026, 15:51 UTC."""
    if unix is None:
        return MISSING
    when = datetime.fromtimestamp(unix, UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def times(value: float, other: float) -> str:
    """The ratio of `value` to `other`: 7.4 ×."""
    return f"{decimal(value / other, 2 if value < 100 * other else 3)} ×" if other > 0 else MISSING


def printable(text: object) -> str:
    """`text` with control characters (cursor, bell, writing direction) replaced by �, cut to 1,000 characters; safe for
    terminals and pages."""
    text = str(text)
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return "".join("�" if unicodedata.category(c) in _UNSAFE and c not in _JOINERS else c for c in text)


_LONGEST = 1_000  # characters of a text that is shown
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\n\t\u200d\u200c"  # white space, and the joiners in emoji and in Persian words


def _scaled(value: float | None, units: tuple[tuple[float, str], ...], smallest: str = "") -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    for factor, unit in units:
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{decimal(value, 3)}{smallest}"
