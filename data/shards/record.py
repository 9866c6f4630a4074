"""A sample as stored in a shard: its members as raw bytes, not decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """A sample's raw members. `key` is untrusted text: never use it as a path."""

    key: str
    shard: str
    offset: int  # bytes, of the first member's data
    fields: dict[str, bytes]  # by lower-case extension
    kinds: tuple[str, ...] = ()  # of all members, including those that were not read
