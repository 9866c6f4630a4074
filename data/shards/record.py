"""A sample as it lies in a shard: its members as raw bytes, nothing decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """A sample's members as they lie in the shard. `key` is text from outside: never use it as a path."""

    key: str
    shard: str
    offset: int  # bytes, of the first member's data
    fields: dict[str, bytes]  # by lower-case extension
    kinds: tuple[str, ...] = ()  # of all members, also of those that were not read
