"""The ledger: every sample that could not be used, where it lies and why.

A bad sample never ends in silence: it is replaced by a spare of the same source (order.py), and a `LedgerEntry` travels
with the batch to the run's ledger.jsonl. A reason reads "what is wrong: detail"; the part before the colon is its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class BadSample(Exception):
    """One sample cannot be used; the message is the reason that goes to the ledger."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One bad sample met at one position of the stream (-1: outside the training stream)."""

    source: str
    shard: str
    key: str
    offset: int  # bytes into the shard where the sample's first member starts
    reason: str
    position: int = -1


def reasons_table(entries: Iterable[LedgerEntry]) -> str:
    """The kinds of reasons, most frequent first, each with its count and one example: a few lines for a terminal."""
    entries = list(entries)
    example = {entry.reason.partition(":")[0]: entry for entry in reversed(entries)}
    counts = Counter(entry.reason.partition(":")[0] for entry in entries)
    return "\n".join(
        f"  {count:6}  {kind} (first: key {shown(example[kind].key)} in {shown(example[kind].shard)})"
        for kind, count in counts.most_common(10)
    )


def shown(text: str, most: int = 120) -> str:
    """A name from data made safe for a terminal: quoted, escaped and cut to `most` characters."""
    return ascii(text if len(text) <= most else text[: most - 3] + "...")
