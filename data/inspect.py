"""Looking into a source: what its pictures, captions and labels are like, by numbers, and samples to look at.

A look covers `most` samples, drawn without replacement by a keyed permutation of the source (stream "inspect"): the
same ones on every machine, and a longer look holds the shorter one. Samples that training could not use are counted
by reason and left out of the numbers.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

from .decode import captions_and_labels, picture
from .files import shown_url
from .ledger import BadSample, LedgerEntry
from .order import permuted, stable_hash
from .record import caption_id
from .source import Source, open_source, shards_of
from .sweep import Told, index_all, silent, sweep_samples
from .text import Tokenizer

CONTEXT = 77
"""CLIP's context length, at which captions are cut"""
_UNCUT = 1 << 30
_MOST_EQUAL = 10  # groups of equal pictures or captions that are named
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Hiragana", "KATAKANA": "Katakana", "IDEOGRAPHIC": "Han"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look at one sample gives."""

    key: str
    size: tuple[int, int]  # width, height of the upright picture
    pixels: bytes  # checksum
    captions: tuple[str, ...]
    tokens: tuple[int, ...]  # of each caption: START and END included, uncut
    labels: dict[str, str]


def opened(url: str, workers: int = 1, told: Told = silent) -> Source:
    """The source, its shards indexed in parallel. Raises DataError as training would. `told` hears of shards."""
    for _ in index_all(shards_of(url), workers, told):
        pass
    return open_source(url)


def drawn(source: Source, most: int) -> list[int]:
    """The numbers of `most` samples, or of all there are, in the order in which they were drawn."""
    key = stable_hash("inspect", 0)
    return permuted(np.arange(min(most, len(source))), len(source), key).tolist()


@dataclass(frozen=True, slots=True)
class Met:
    """What a ledger says of the samples of a source."""

    notes: dict[int, list[str]]  # by the sample's number, in the order in which they were met
    gone: int  # samples whose shard is one of the source's, but no longer holds them
    elsewhere: int  # samples in other shards


def met(source: Source, entries: Iterable[LedgerEntry]) -> Met:
    """Where the samples lie that a run's ledger names, each with the reasons it gives."""
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for entry in entries:
        reasons.setdefault((entry.shard, entry.key), Counter())[entry.reason] += 1
    places = ((n, (source.shard(n), source.key(n))) for n in range(len(source)))
    numbers = {place: n for n, place in places if place in reasons}
    shards = {source.shard(n) for n in range(len(source))}
    gone = sum(place not in numbers and place[0] in shards for place in reasons)
    notes = {
        numbers[place]: [f"{reason} (met {n} times)" if n > 1 else reason for reason, n in own.items()]
        for place, own in reasons.items()
        if place in numbers
    }
    return Met(notes, gone, len(reasons) - len(notes) - gone)


def inspect(source: Source, numbers: Sequence[int], workers: int = 1, told: Told = silent) -> dict[str, Any]:
    """The statistics of the samples `numbers`, as plain data. `told` hears of samples."""
    tokenizer = Tokenizer()
    seen: list[Seen] = []
    bad: Counter[str] = Counter()
    for found in sweep_samples(lambda n: look(source, n, tokenizer), sorted(numbers), workers, told):
        if isinstance(found, Seen):
            seen.append(found)
        else:
            bad[found.partition(":")[0]] += 1
    return {
        "source": shown_url(source.url),
        "shards": len(source.shard_sizes),
        "bytes": sum(source.shard_sizes),
        "samples": len(source),
        "looked_at": len(numbers),
        "bad": dict(bad.most_common()),
        "pictures": _pictures(seen),
        "captions": _captions(seen),
        "labels": _labels(seen),
    }


def look(source: Source, number: int, tokenizer: Tokenizer) -> Seen | str:
    """One sample, or the reason why training could not use it."""
    record = source.record(number)
    try:
        captions, labels = captions_and_labels(record.fields)
        pixels = picture(record.fields)
    except BadSample as error:
        return str(error)
    height, width = pixels.shape[:2]
    checksum = blake2b(np.ascontiguousarray(pixels).data, digest_size=16, salt=f"{width}x{height}".encode()).digest()
    tokens = tuple(len(tokenizer.encode(caption, _UNCUT)) for caption in captions)
    return Seen(record.key, (width, height), checksum, captions, tokens, labels)


def _pictures(seen: Sequence[Seen]) -> dict[str, Any]:
    widths, heights = np.array([each.size for each in seen], dtype=np.int64).reshape(-1, 2).T
    return {
        "width": quantiles(widths),
        "height": quantiles(heights),
        "short_side": quantiles(np.minimum(widths, heights)),
        "width_over_height": quantiles(widths / heights),
        "equal": _equal((each.pixels, each.key) for each in seen),
    }


def _captions(seen: Sequence[Seen]) -> dict[str, Any]:
    texts = [caption for each in seen for caption in each.captions]
    tokens = np.array([count for each in seen for count in each.tokens], dtype=np.int64)
    return {
        "count": len(texts),
        "a_sample": quantiles(np.array([len(each.captions) for each in seen])),
        "tokens": quantiles(tokens),
        "cut_at_77": float((tokens > CONTEXT).mean()) if len(tokens) else None,
        "scripts": dict(Counter(map(script, texts)).most_common()),
        "equal": _equal((caption_id(text), text) for text in texts),
    }


def _labels(seen: Sequence[Seen]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for each in seen:
        for name, value in each.labels.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: dict(classes.most_common()) for name, classes in sorted(counts.items())}


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Mean, least, p10, p50, p90, p99 (numpy's linear interpolation) and most of a list; None of an empty one."""
    if not len(values):
        return None
    least, p10, p50, p90, p99, most = (float(q) for q in np.quantile(values, [0, 0.1, 0.5, 0.9, 0.99, 1]))
    return {
        "mean": float(values.mean()), "least": least, "p10": p10, "p50": p50, "p90": p90, "p99": p99, "most": most
    }  # fmt: skip


def _equal(pairs: Iterable[tuple[Hashable, str]]) -> dict[str, Any]:
    """How many items are copies of an earlier one, and the largest groups of equal ones by their first names."""
    groups: dict[Hashable, list[Any]] = {}
    total = 0
    for identity, name in pairs:
        groups.setdefault(identity, [0, name])[0] += 1
        total += 1
    largest = sorted((group for group in groups.values() if group[0] > 1), key=lambda group: -group[0])
    return {
        "copies": total - len(groups),
        "groups": len(largest),
        "largest": [{"times": times, "first": name} for times, name in largest[:_MOST_EQUAL]],
    }


def script(text: str) -> str:
    """The script of most letters of a text, by their Unicode names: Latin, Han, Cyrillic, ...; "none" without any."""
    scripts = Counter(name for c in unicodedata.normalize("NFKC", text) if (name := _script_of(c)))
    return scripts.most_common(1)[0][0] if scripts else "none"


@cache
def _script_of(character: str) -> str:
    if not unicodedata.category(character).startswith("L"):
        return ""
    first = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    return "" if first == "MODIFIER" else _SCRIPTS.get(first, first.capitalize())
