"""The identity of a source: its samples in their order, wherever they are and whatever their shards are called.

The idea: the order of samples is a function of the number of samples in each shard (order.py), so what a run has read
is identified by the shards' samples, one after another, which their digests stand for (shards/content.py). It is kept
with a run's state, and compared when the run continues and between its processes. Names are only for messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Self

from pydantic import BaseModel, Field, model_validator

from .units import counted

_MARK = 8  # hexadecimal digits that tell a shard from others of its source


class SourceIdentity(BaseModel, frozen=True, extra="forbid", strict=True):
    """The samples of a source."""

    digest: str = Field(pattern=r"^[0-9a-f]{32}$")
    """hash of all shards' contents, in order: equal for equal samples"""
    samples: int = Field(ge=0)
    """after the filter"""
    names: str
    """of the shards with samples, below the folder they have in common, one a line"""
    marks: str = Field(pattern=r"^[0-9a-f]*$")
    """the first digits of each shard's own hash, joined: which shard differs"""

    @model_validator(mode="after")
    def _a_mark_each(self) -> Self:
        if len(self.marks) != _MARK * len(self.shards):
            raise ValueError("names and marks differ in number")
        return self

    @classmethod
    def of(cls, urls: Sequence[str], contents: Sequence[str], samples: int) -> SourceIdentity:
        """The identity of shards with these URLs; `contents` identify their samples."""
        hashes = [blake2b(each.encode(), digest_size=16).hexdigest() for each in contents]
        digest = blake2b("\n".join(hashes).encode(), digest_size=16).hexdigest()
        folder = _common_folder(urls)
        names = "\n".join(ascii(url[len(folder) :])[1:-1] for url in urls)
        return cls(digest=digest, samples=samples, names=names, marks="".join(each[:_MARK] for each in hashes))

    @property
    def shards(self) -> list[str]:
        """The names of the shards, safe to show."""
        return self.names.split("\n") if self.names else []

    def mark(self, shard: int) -> str:
        """What tells shard number `shard` from others; "" behind the last."""
        return self.marks[_MARK * shard : _MARK * (shard + 1)]

    def first(self, count: int) -> str:
        """A hash of the first `count` shards."""
        return blake2b(self.marks[: _MARK * count].encode(), digest_size=16).hexdigest()

    @property
    def size(self) -> str:
        """How large it is, in words."""
        return f"{counted(self.samples, 'sample')} in {counted(len(self.shards), 'shard')}"


def _common_folder(urls: Sequence[str]) -> str:
    if not urls:
        return ""
    first, last = min(urls), max(urls)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, length) + 1]


def difference(before: SourceIdentity, now: SourceIdentity) -> str:
    """The first shard that differs, in words; empty if the samples are the same."""
    if before.digest == now.digest:
        return ""
    old, new = before.shards, now.shards
    at = next((i for i in range(min(len(old), len(new))) if before.mark(i) != now.mark(i)), min(len(old), len(new)))
    if at == len(old) == len(new):
        return "its shards differ"
    was, is_ = (each.mark(at) for each in (before, now))
    gone, here = (was in _marks(now)) if was else True, (is_ in _marks(before)) if is_ else True
    if at < len(old) and at < len(new) and not gone and not here:
        return f"{new[at]} has other samples" if old[at] == new[at] else f"{new[at]} is in the place of {old[at]}"
    if at < len(new) and not here:
        return f"{new[at]} is new"
    if at < len(old) and not gone:
        return f"{old[at]} is missing"
    if len(old) != len(new):
        return f"{old[at]} is missing" if len(old) > len(new) else f"{new[at]} is new"
    return f"{new[at]} is at another place among them"


def _marks(of: SourceIdentity) -> set[str]:
    return {of.mark(i) for i in range(len(of.shards))}
