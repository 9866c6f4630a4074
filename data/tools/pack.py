"""Packing: pictures and captions, or shards, become shuffled shards NAME-000000.tar of nearly equal size.

The one idea: a *plan*. The input, the seed and the shard size determine which samples go into which shard in which
order, and so each shard's bytes. Every process computes the plan independently and writes those of its shards that are
missing: processes, parts of a Slurm array and a restart after a kill need no communication, and in whatever order and
however often they run, the shards have the same bytes. `packing.json` next to the shards holds the plan's checksum, so
that shards of two inputs are never mixed.

Pictures keep their bytes; each sample is decoded once to check that training can use it. A shard appears under its name
when it is complete on disk (or in the store); one whose size differs from the plan is rewritten.
"""

from __future__ import annotations

import errno
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import BadSample, DataError
from ..ledger import LedgerEntry
from ..order import permuted, stable_hash
from ..shards.parallel import Progress, silent, sweep
from ..shards.source import check_sizes
from ..shards.tar_writer import TarWriter, archive_size, import_writer, member_size
from ..storage.files import shown_url
from ..storage.output import Target
from ..units import size_in_bytes
from .input_table import RowTally
from .pack_input import FileItem, Item, check_key, items_of

_FORMAT = 1  # of the plan; raise it when the same input gives other bytes
_PLAN = "packing.json"


@dataclass(frozen=True, slots=True)
class PackResult:
    """The state after packing all shards or one part of them."""

    shards: tuple[str, ...]  # URLs of all shards of the plan
    samples: int  # in the shards of this call's part, without `bad`
    captions: int | None  # of these samples; None when repacking shards, whose texts are not read beforehand
    part: int  # shards of this call's part, all or every n-th
    written: int  # of these, the ones that were not there yet
    missing: int  # shards of the plan that do not exist yet: the work of other parts
    bad: int  # samples skipped in this call's shards
    rows: int | None = None  # of the table; None if the input is not a table
    refused: tuple[str, ...] = ()  # rows of the table that were skipped, each with its line and the reason


@dataclass(frozen=True, slots=True)
class Plan:
    """The content of every shard: shard i holds items[ends[i - 1]:ends[i]]."""

    items: Sequence[Item]
    ends: list[int]
    name: str
    digest: str

    def shard(self, number: int) -> str:
        """The file name of a shard."""
        return f"{self.name}-{number:06d}.tar"

    def of(self, number: int) -> Sequence[Item]:
        """The items of a shard."""
        return self.items[self.ends[number - 1] if number else 0 : self.ends[number]]


def pack(
    input: str | Path,
    output: str,
    shard_size: str | int = "300MB",
    images: Path | None = None,
    *,
    part: str = "0/1",
    seed: int = 0,
    skip_bad: bool = False,
    workers: int = 1,
    progress: Progress = silent,
) -> PackResult:
    """Packs a table, a folder or shards (pack_input.py) into OUTPUT/NAME-000000.tar, where NAME is OUTPUT's last part.

    shard_size: the approximate size of a shard ("300MB"), or its maximum number of samples (1000).
    part: "i/n" writes only the shards i, i + n, i + 2n, ...; all n parts together write all shards.
    skip_bad: skip samples that training could not use and list them in NAME-000000.bad.jsonl, and skip rows of a table
        that cannot be read and list them in the result; otherwise they raise DataError.
    workers: number of processes; `progress(done, total)` counts shards. The bytes depend on neither.

    After an interruption the same call continues. Raises DataError; complete shards are then kept, nothing else is.
    """
    target = Target(output)
    first, parts = _part(part)
    limit = _limit(str(shard_size))
    _refuse_foreign(target)
    tally = RowTally() if skip_bad else None
    plan = plan_of(items_of(str(input), images, workers, tally=tally), target.name, seed, *limit)
    description = {"format": _FORMAT, "plan": plan.digest, "shards": len(plan.ends), "samples": len(plan.items)}
    _refuse_other_plan(target, plan.digest)
    numbers = range(first, len(plan.ends), parts)
    there = target.sizes()
    work = partial(_write, plan, target, there, skip_bad, json.dumps(description) + "\n")
    import_writer()
    try:
        done = list(sweep(work, numbers, workers, progress))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{shown_url(output)}: the disk is full; free some space or choose another output"
            ) from None
        raise DataError(f"cannot write {shown_url(output)}: {error.strerror or error}; choose another output") from None
    finally:
        target.remove_empty_folder()
    there = target.sizes()
    items = [item for i in numbers for item in plan.of(i)]
    files = [item for item in items if isinstance(item, FileItem)]
    bad, unheard = sum(bad for _, bad, _ in done), sum(captions for _, _, captions in done)
    return PackResult(
        shards=tuple(target.url(plan.shard(i)) for i in range(len(plan.ends))),
        samples=len(items) - bad,
        captions=_captions(files) - unheard if len(files) == len(items) else None,
        part=len(numbers),
        written=sum(new for new, _, _ in done),
        missing=sum(plan.shard(i) not in there for i in range(len(plan.ends))),
        bad=bad,
        rows=tally.used + len(tally.refused) if tally and (tally.used or tally.refused) else None,
        refused=tuple(tally.refused) if tally else (),
    )


def plan_of(items: Sequence[Item], name: str, seed: int, most_bytes: int | None, most_samples: int | None) -> Plan:
    """The plan: the items, shuffled by the seed and split into shards of nearly equal bytes or numbers of samples."""
    key = stable_hash("pack", seed)
    items = [items[i] for i in permuted(np.arange(len(items)), len(items), key).tolist()]
    if most_samples is not None:
        count = -(-len(items) // most_samples)
        ends = [len(items) * (i + 1) // count for i in range(count)]
    else:
        assert most_bytes is not None
        sums = list(accumulate(_tar_size(item.key, item.sizes) for item in items))
        count = -(-sums[-1] // most_bytes)
        cuts = {bisect_left(sums, sums[-1] * (i + 1) // count) + 1 for i in range(count)}  # a set: no shard is empty
        ends = sorted({*(cut for cut in cuts if cut < len(items)), len(items)})
    digest = sha256(json.dumps([_FORMAT, name, ends]).encode())
    for item in items:
        own = (item.txt, item.json) if isinstance(item, FileItem) else ()
        digest.update(b"".join([json.dumps([item.key, item.sizes]).encode(), b"\n", *own]))
    return Plan(items, ends, name, digest.hexdigest())


def packed_shards(target: Target) -> tuple[int, int] | None:
    """How many shards of a pack exist, and how many there will be; None if nothing was packed here."""
    names = target.sizes()
    if _PLAN not in names:
        return None
    try:
        wanted = int(json.loads(target.text(_PLAN))["shards"])
    except (ValueError, KeyError, TypeError):
        return None
    return sum(name.endswith(".tar") for name in names), wanted


def _write(
    plan: Plan, target: Target, there: dict[str, int], skip_bad: bool, description: str, number: int
) -> tuple[bool, int, int]:
    """Writes one shard unless it exists. Returns whether it was written, and the number of samples skipped in it and of
    their captions."""
    name, items = plan.shard(number), plan.of(number)
    listed = name.removesuffix(".tar") + ".bad.jsonl"
    if name in there:
        skipped = target.text(listed).splitlines() if listed in there else []
        bad_keys = {json.loads(line)["key"] for line in skipped}
        if there[name] == _shard_size(item for item in items if item.key not in bad_keys):
            if skipped and not skip_bad:
                raise DataError(
                    f"{target.shown(listed)} lists samples that were skipped; repair them, or pass --skip-bad"
                )
            target.clean(name)
            return False, len(bad_keys), _captions(item for item in items if item.key in bad_keys)
    bad: list[LedgerEntry] = []
    with target.writing(name) as file, TarWriter(file) as writer:
        for item in items:
            try:
                writer.write(item.key, _checked(item))
            except BadSample as error:
                if not skip_bad:
                    raise DataError(f"{_location(item)}: {error}; {_remedy(item)}") from None
                bad.append(_entry(item, error))
        if _PLAN not in target.sizes():
            target.put_text(_PLAN, description)
        if bad:
            target.put_text(listed, "".join(json.dumps(asdict(entry)) + "\n" for entry in bad))
    _refuse_other_plan(target, plan.digest)
    bad_keys = {entry.key for entry in bad}
    return True, len(bad), _captions(item for item in items if item.key in bad_keys)


def _captions(items: Iterable[Item]) -> int:
    """The captions of picture files; those of samples from shards are not counted."""
    return sum(item.captions for item in items if isinstance(item, FileItem))


def _tar_size(key: str, sizes: Mapping[str, int]) -> int:
    return sum(member_size(f"{key}.{kind}", size) for kind, size in sizes.items())


def _shard_size(items: Iterable[Item]) -> int:
    return archive_size(sum(_tar_size(item.key, item.sizes) for item in items))


def _checked(item: Item) -> dict[str, bytes]:
    """An item's members, checked by the steps of training. Raises BadSample."""
    from ..samples.decode import captions_and_labels, picture

    check_sizes(item.sizes)
    members = item.members()
    if {kind: len(data) for kind, data in members.items()} != item.sizes:
        raise DataError(f"{_location(item)} changed while it was packed; start again")
    check_key(item.key, members)
    captions_and_labels(members, bare=True)
    picture(members)
    return members


def _location(item: Item) -> str:
    return f"{item.where}: {item.picture}" if isinstance(item, FileItem) else item.where


def _remedy(item: Item) -> str:
    what = "replace the picture or remove its lines" if isinstance(item, FileItem) else "repair the shard"
    return f"{what}, or skip bad samples with --skip-bad"


def _entry(item: Item, error: BadSample) -> LedgerEntry:
    if isinstance(item, FileItem):
        return LedgerEntry(item.where, item.picture, item.key, 0, str(error))
    offset = min(at for at, _ in item.places.values())
    return LedgerEntry(item.shard.url, item.shard.url, item.key, offset, str(error))


def _part(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    i, n = (int(match[1]), int(match[2])) if match else (0, 0)
    if not i < n:
        raise DataError(f"part = {part!r} must be i/n with i from 0 to n - 1, as in 0/8, 1/8, ... 7/8")
    return i, n


def _limit(shard_size: str) -> tuple[int | None, int | None]:
    """The maximum bytes, or the maximum samples, of a shard; the other is None. Raises DataError."""
    if re.fullmatch(r"\d{1,12}", shard_size) and int(shard_size):
        return None, int(shard_size)
    most = size_in_bytes(shard_size)
    if not most:
        raise DataError(f"shard_size = {shard_size!r} must be a size such as 300MB or 1GB, or a number of samples")
    return most, None


def _refuse_foreign(target: Target) -> None:
    """Refuses an output folder that holds anything but this pack's files. Raises DataError."""
    own = re.compile(rf"{re.escape(_PLAN)}|{re.escape(target.name)}-\d{{6,}}\.(tar|bad\.jsonl)")
    names = target.sizes()
    if (names and _PLAN not in names) or not all(own.fullmatch(name) for name in names):
        raise DataError(f"{target.shown()} already exists; remove it or choose another name")


def _refuse_other_plan(target: Target, digest: str) -> None:
    if _PLAN not in target.sizes():
        return
    try:
        there = json.loads(target.text(_PLAN))["plan"]
    except (ValueError, KeyError, TypeError):
        there = None
    if there != digest:
        raise DataError(
            f"{target.shown()} holds shards packed from another input, or with another seed or shard size; use the "
            f"same ones, or choose another output"
        )
