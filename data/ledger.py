"""The ledger: a record of every sample that could not be used, with its location and the reason.

No bad sample is dropped silently: it is replaced by a spare of the same source (order.py), and a `LedgerEntry` travels
with the batch to the run's ledger.jsonl. A reason reads "what is wrong: detail"; the part before the colon is its kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import DataError, shown


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One bad sample at one position of the stream (-1: outside the training stream).

    With an empty key: a damaged shard that was skipped; `offset` is then the byte where the damage was found."""

    source: str
    shard: str
    key: str
    offset: int  # bytes into the shard where the sample's first member starts
    reason: str
    position: int = -1


@dataclass(frozen=True, slots=True)
class BadSamples:
    """The different bad samples and skipped shards of one source, whatever number of entries each has."""

    samples: dict[tuple[str, str], LedgerEntry] = field(default_factory=dict)  # by shard and key
    shards: set[str] = field(default_factory=set)

    def add(self, entry: LedgerEntry) -> None:
        """Adds the sample or shard of an entry."""
        if entry.key:
            self.samples[entry.shard, entry.key] = entry
        else:
            self.shards.add(entry.shard)


def read_ledger(path: Path) -> list[LedgerEntry]:
    """The entries of a run's ledger.jsonl, in file order. An incomplete last line (still being written) is ignored.
    Raises DataError."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {shown(str(path))}: {error.strerror}; name a run's ledger.jsonl") from None
    entries = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            texts = [row[name] for name in ("source", "shard", "key", "reason")]
            offset, position = row["offset"], row["position"]
        except (ValueError, TypeError, KeyError, RecursionError):
            texts, offset, position = [], None, None
        if not texts or not all(isinstance(text, str) for text in texts) or {type(offset), type(position)} != {int}:
            raise DataError(f"{shown(str(path))}, line {number}: not an entry of a ledger; name a run's ledger.jsonl")
        source, shard, key, reason = texts
        entries.append(LedgerEntry(source, shard, key, offset, reason, position))
    return entries


def entries_of(rows: Iterable[Mapping[str, Any]]) -> list[LedgerEntry]:
    """The entries of ledger lines that a run has written, this release's or another; what else they hold is left out,
    as are lines that do not hold one."""
    names = [each.name for each in fields(LedgerEntry)]
    needed = names[:-1]  # the position has a default
    return [
        LedgerEntry(**{name: row[name] for name in names if name in row})
        for row in rows
        if all(name in row for name in needed)
    ]


def reasons_text(entries: Iterable[LedgerEntry]) -> str:
    """A few lines for a terminal: the kinds of reasons, most frequent first, each with its count and one example."""
    entries = list(entries)
    example = {entry.reason.partition(":")[0]: entry for entry in reversed(entries)}
    counts = Counter(entry.reason.partition(":")[0] for entry in entries)
    return "\n".join(
        f"  {count:6}  {kind} (first: key {shown(example[kind].key)} in {shown(example[kind].shard)})"
        for kind, count in counts.most_common(10)
    )
