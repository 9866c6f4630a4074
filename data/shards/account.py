"""The account of a shard: every member and every byte of the file is counted under exactly one heading.

Why: a tar holds more than samples (links, directories, hidden files, archives behind the archive), and what is passed
over without a word is lost without a trace. The bytes of an account add up to the size of the (unpacked) file, which is
checked whenever an index is opened.

`treering data index`, `lint` and `inspect` show what was skipped, and a run says it in one line when it starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import shown

SAMPLES = "pictures, captions and metadata"
OTHER = "other members of samples"
TWICE = "second members for one key"
DIRECTORIES = "directories"
LINKS = "links"
SPECIAL = "devices, pipes and other special members"
SPARSE = "sparse files"
BEHIND = "members behind the end of the archive"
TRAILING = "data behind the end of the archive"
HIDDEN = "hidden files"
UNDERSCORED = "files named __*__"
NO_EXTENSION = "files without an extension"
PICTURES = "pictures that are not named KEY.jpg, KEY.png or KEY.webp"
UNREAD = "unread, behind the damage"
END = "end of the archive"

HEADINGS = (
    SAMPLES, OTHER, TWICE, DIRECTORIES, LINKS, SPECIAL, SPARSE, BEHIND, TRAILING, HIDDEN, UNDERSCORED, NO_EXTENSION,
    PICTURES, UNREAD, END,
)  # fmt: skip
LOST = frozenset((TWICE, LINKS, SPARSE, BEHIND, TRAILING, PICTURES))
"""headings of what was probably meant to be a sample"""
_IN_ORDER = frozenset((SAMPLES, OTHER, UNREAD, END))
_LONGEST_EXAMPLE = 100  # characters of a name


class Count(NamedTuple):
    """The number of members under a heading, the bytes they take with headers and padding, and the first one's name."""

    members: int = 0
    bytes: int = 0
    example: str = ""

    def plus(self, other: Count) -> Count:
        """The counts of both."""
        return Count(self.members + other.members, self.bytes + other.bytes, self.example or other.example)


@dataclass
class Account:
    """Counts by heading."""

    counts: dict[str, Count] = field(default_factory=dict)

    def add(self, heading: str, members: int, size: int, name: str = "") -> None:
        """Counts `members` members of together `size` bytes."""
        found = Count(members, size, shown(name, _LONGEST_EXAMPLE) if name else "")
        before = self.counts.get(heading)
        self.counts[heading] = found if before is None else before.plus(found)

    @property
    def bytes(self) -> int:
        """The bytes under all headings."""
        return sum(count.bytes for count in self.counts.values())

    @property
    def members(self) -> int:
        """The members under all headings."""
        return sum(count.members for count in self.counts.values())

    @property
    def skipped_members(self) -> dict[str, Count]:
        """The counts of what belongs to no sample."""
        return {name: self.counts[name] for name in HEADINGS if name in self.counts and name not in _IN_ORDER}

    @property
    def lost(self) -> bool:
        """Whether something was skipped that was probably meant to be a sample."""
        return not LOST.isdisjoint(self.counts)

    def json(self) -> dict[str, list[Any]]:
        """Plain data, from which `parsed` makes the account again."""
        return {name: list(count) for name, count in self.counts.items()}


def parsed(data: Any) -> Account | None:
    """The account in plain data from an index; None if it is not one."""
    if not isinstance(data, dict) or not set(data) <= set(HEADINGS):
        return None
    counts = {}
    for name, values in data.items():
        if not isinstance(values, list) or [type(value) for value in values] != [int, int, str]:
            return None
        if min(values[:2]) < 0 or len(values[2]) > 2 * _LONGEST_EXAMPLE or not values[2].isascii():
            return None
        counts[name] = Count(*values)
    return Account(counts)


def total(accounts: Iterable[Account]) -> Account:
    """The account of several shards together."""
    whole = Account()
    for each in accounts:
        for name, count in each.counts.items():
            whole.counts[name] = whole.counts.get(name, Count()).plus(count)
    return whole
