"""Statistics of a source: its pictures, captions, labels and columns.

An inspection covers `most` samples, drawn without replacement by a keyed permutation of the source (key "inspect"): the
same ones on every machine, and a larger inspection includes a smaller one. Samples that training could not use are
counted by reason and excluded from the statistics.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np

from ..errors import BadSample
from ..ledger import LedgerEntry
from ..order import permuted, stable_hash
from ..samples.captions import read_texts
from ..samples.clip_tokenizer import Tokenizer
from ..samples.decode import picture
from ..samples.sample import caption_id
from ..shards.listing import IMAGE_KINDS
from ..shards.parallel import Progress, index_all, silent, sweep_samples
from ..shards.source import Source, open_source, shards_of
from ..storage.files import shown_url
from .statistics import Alike, Classes, Copies, Values, difference_hash

CONTEXT = 77
"""CLIP's context length, to which captions are truncated"""
_UNCUT = 1 << 30
_MOST_COLUMNS, _MOST_TEXTS = 100, 20  # columns, and texts of a column, in a summary
_LONGEST = 200  # characters of a text in a summary
_LARGEST = 1e300  # larger numbers count as infinite, as 1e999 in a .json
_REPORTED_ELSEWHERE = {"caption", "captions", "labels"}
_TYPES = {
    bool: "boolean",
    int: "number",
    float: "number",
    str: "text",
    list: "list",
    dict: "object",
    type(None): "null",
}
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Hiragana", "KATAKANA": "Katakana", "IDEOGRAPHIC": "Han"}


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """The facts about one sample that the statistics use."""

    key: str
    size: tuple[int, int]  # width, height of the upright picture
    file: bytes  # checksum of the picture's file
    pixels: bytes  # checksum of what it decodes to
    hash: int | None  # difference hash
    captions: tuple[str, ...]
    tokens: tuple[int, ...]  # of each caption, including START and END, not truncated
    labels: dict[str, str]
    columns: dict[str, Any]  # other keys of the .json
    faults: tuple[str, ...]  # kinds of reasons why some of its texts or its metadata are not read


def open_indexed(url: str, workers: int = 1, progress: Progress = silent) -> Source:
    """The source, its shards indexed in parallel; `progress(done, total)` counts shards. Raises DataError as training
    would."""
    for _ in index_all(shards_of(url), workers, progress):
        pass
    return open_source(url)


def sample_numbers(source: Source, most: int) -> list[int]:
    """The numbers of `most` samples (or of all, if fewer), in the order in which they were drawn."""
    key = stable_hash("inspect", 0)
    return permuted(np.arange(min(most, len(source))), len(source), key).tolist()


def sorted_numbers(source: Source, most: int) -> Sequence[int]:
    """The numbers that `drawn` gives, in the order of the shards, which is read fastest."""
    return range(len(source)) if most >= len(source) else sorted(sample_numbers(source, most))


@dataclass(frozen=True, slots=True)
class LedgerMatches:
    """The entries of a ledger, matched to the samples of a source."""

    notes: dict[int, list[str]]  # reasons by the sample's number, in the order of the ledger
    gone: int  # samples no longer in their shard, which is part of the source
    elsewhere: int  # samples in shards outside the source


def locate_entries(source: Source, entries: Iterable[LedgerEntry]) -> LedgerMatches:
    """Finds the samples that a run's ledger names, each with its reasons."""
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
    return LedgerMatches(notes, gone, len(reasons) - len(notes) - gone)


def inspect(source: Source, numbers: Sequence[int], workers: int = 1, progress: Progress = silent) -> dict[str, Any]:
    """The statistics of the samples `numbers`, as plain data, in memory that does not grow with their number
    (statistics.py). `progress(done, total)` counts samples."""
    tokenizer = Tokenizer()
    pictures, captions, columns = _Pictures(), _Captions(), _Columns()
    labels: dict[str, Classes] = {}
    bad, unread = Classes(), Classes()
    for found in sweep_samples(lambda n: inspect_sample(source, n, tokenizer), numbers, workers, progress):
        if not isinstance(found, SampleFacts):
            bad.add(found.partition(":")[0])
            continue
        pictures.add(found)
        captions.add(found)
        columns.add(found.columns)
        for fault in found.faults:
            unread.add(fault)
        for name, value in found.labels.items():
            if name in labels or len(labels) < _MOST_COLUMNS:
                labels.setdefault(name, Classes()).add(value)
    return {
        "source": shown_url(source.url),
        "shards": len(source.shard_sizes),
        "bytes": sum(source.shard_sizes),
        "samples": len(source),
        "skipped_members": {name: list(count[:2]) for name, count in source.skipped_members.items()},
        "inspected": len(numbers),
        "bad": bad.summary(),
        "unread": unread.summary(),
        "pictures": pictures.summary(),
        "captions": captions.summary(),
        "labels": {name: classes.summary() for name, classes in sorted(labels.items())},
        "columns": columns.summary(),
    }


def inspect_sample(source: Source, number: int, tokenizer: Tokenizer) -> SampleFacts | str:
    """The facts about one sample, or the reason why training could not use it."""
    try:
        record = source.record(number)
        texts = read_texts(record.fields, bare=True)
        pixels = picture(record.fields, record.kinds)
    except BadSample as error:
        return str(error)
    data = next(record.fields[kind] for kind in IMAGE_KINDS if kind in record.fields)
    size = (pixels.shape[1], pixels.shape[0])
    checksum = blake2b(np.ascontiguousarray(pixels).data, digest_size=16, salt=f"{size[0]}x{size[1]}".encode())
    captions = tuple(dict.fromkeys(caption.text for caption in texts.captions))
    return SampleFacts(
        key=record.key,
        size=size,
        file=blake2b(data, digest_size=16).digest(),
        pixels=checksum.digest(),
        hash=difference_hash(pixels),
        captions=captions,
        tokens=tuple(len(tokenizer.encode(caption, _UNCUT)) for caption in captions),
        labels=texts.labels,
        columns={name: _plain(texts.metadata[name]) for name in texts.metadata.keys() - _REPORTED_ELSEWHERE},
        faults=tuple(fault.partition(":")[0] for fault in texts.faults),
    )


def _plain(value: Any) -> Any:
    """A column's value without what is never reported: texts are truncated, lists and objects emptied."""
    return value[:_LONGEST] if isinstance(value, str) else type(value)() if isinstance(value, list | dict) else value


class _Pictures:
    def __init__(self) -> None:
        self._values = {name: Values() for name in ("width", "height", "short_side", "width_over_height")}
        self._files, self._equal, self._alike = Copies(), Copies(), Alike()

    def add(self, facts: SampleFacts) -> None:
        width, height = facts.size
        for values, value in zip(
            self._values.values(), (width, height, min(width, height), width / height), strict=True
        ):
            values.add(value)
        self._files.add(facts.file, facts.key)
        self._equal.add(facts.pixels, facts.key)
        self._alike.add(facts.hash, facts.key)

    def summary(self) -> dict[str, Any]:
        return {
            **{name: values.summary() for name, values in self._values.items()},
            "equal": self._equal.summary(),
            "equal_files": self._files.summary(),
            "alike": self._alike.summary(),
        }


class _Captions:
    def __init__(self) -> None:
        self._a_sample, self._tokens, self._characters = Values(), Values(), Values()
        self._cut, self._scripts, self._equal = 0, Classes(), Copies()

    def add(self, facts: SampleFacts) -> None:
        self._a_sample.add(len(facts.captions))
        for caption, tokens in zip(facts.captions, facts.tokens, strict=True):
            self._tokens.add(tokens)
            self._characters.add(len(caption))
            self._cut += tokens > CONTEXT
            self._scripts.add(script(caption))
            self._equal.add(caption_id(caption).to_bytes(8, "little", signed=True), caption[:_LONGEST])

    def summary(self) -> dict[str, Any]:
        count = self._tokens.count
        return {
            "count": count,
            "a_sample": self._a_sample.summary(),
            "tokens": self._tokens.summary(),
            "characters": self._characters.summary(),
            "cut_at_77": self._cut / count if count else None,
            "scripts": self._scripts.summary(),
            "equal": self._equal.summary(),
        }


class _Columns:
    """The columns of the metadata other than captions and labels: how many samples have them, and their values."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[Classes, Values, Classes]] = {}

    def add(self, columns: dict[str, Any]) -> None:
        for name, value in columns.items():
            if name not in self._columns and len(self._columns) >= _MOST_COLUMNS:
                continue
            types, numbers, texts = self._columns.setdefault(name, (Classes(), Values(), Classes()))
            types.add(_TYPES[type(value)])
            if isinstance(value, bool | str):
                texts.add(value if isinstance(value, str) else str(value).lower())
            elif isinstance(value, int | float) and abs(value) < _LARGEST:  # False for NaN
                numbers.add(float(value))

    def summary(self) -> dict[str, Any]:
        return {
            name: {
                "samples": sum(types.summary().values()),
                "types": types.summary(),
                "numbers": numbers.summary(),
                "texts": dict(list(texts.summary().items())[:_MOST_TEXTS]),
                "different": len(texts.summary()),
            }
            for name, (types, numbers, texts) in sorted(self._columns.items())
        }


def script(text: str) -> str:
    """The most frequent script of a text's letters, by their Unicode names: Latin, Han, Cyrillic, ...; "none" without
    letters."""
    scripts = Counter(name for c in unicodedata.normalize("NFKC", text) if (name := _script_of(c)))
    return scripts.most_common(1)[0][0] if scripts else "none"


@cache
def _script_of(character: str) -> str:
    if not unicodedata.category(character).startswith("L"):
        return ""
    first = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    return "" if first == "MODIFIER" else _SCRIPTS.get(first, first.capitalize())
