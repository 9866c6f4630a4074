"""Finds every sample that training could not use, and every fault of the shards, before a run does.

The idea is to use the loader's functions: a sample is bad if the functions that decode it for training refuse it, and
the reason is the one that a run's ledger would record. A damaged shard, which training refuses as a whole, is read up
to the damage, so that one lint finds everything that needs repair.

The findings for a shard are cached as soon as all of it was read, under a name that depends on the shard and the
decoders' versions: an interrupted lint continues where it stopped, and a later one only reads changed shards.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import BadSample, DataError, shown
from ..ledger import LedgerEntry
from ..samples.decode import captions_and_labels, picture
from ..shards.account import Account, total
from ..shards.listing import ShardIndex, index_shard, walk
from ..shards.parallel import Progress, silent, sweep, sweep_samples
from ..shards.source import Source, shards_of
from ..storage.atomic_write import atomic_file
from ..storage.files import ShardInfo, cache_folder, shown_url
from ..storage.output import Target
from ..units import counted
from .pack import packed_shards

_FORMAT = 3  # of the cached findings; raise it when other samples are bad, or for other reasons


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a whole shard, because of which training refuses the source."""

    shard: str
    reason: str  # a sentence with the remedy


@dataclass(frozen=True, slots=True)
class Findings:
    """The findings of a lint of one source."""

    source: str
    shards: int
    samples: int
    bad: tuple[LedgerEntry, ...]  # in the order of shards and offsets
    faults: tuple[Fault, ...]
    account: Account  # of all members and bytes of the shards

    @property
    def clean(self) -> bool:
        """Whether training can use all samples, and nothing that was probably meant to be one was skipped."""
        return not self.bad and not self.faults and not self.account.lost

    @property
    def kinds(self) -> dict[str, int]:
        """The number of bad samples by kind of reason, most frequent first."""
        return dict(Counter(entry.reason.partition(":")[0] for entry in self.bad).most_common())


def lint(url: str, workers: int = 1, progress: Progress = silent) -> Findings:
    """Reads and decodes every sample of a URL; `progress(done, total)` counts samples. Raises DataError if nothing
    matches."""
    shards = shards_of(url)
    indexes, faults = [], []
    damaged: set[str] = set()
    for index, reasons in sweep(_examine_shard, shards, workers):
        indexes.append(index)
        faults += [Fault(index.url, reason) for reason in reasons]
        damaged |= {index.url} if reasons else set()
    faults += _shared_keys(indexes) + _unfinished(shards)
    source = Source(url, indexes)
    if not len(source) and not faults:
        faults.append(
            Fault(shards[0].url, f"{shown_url(url)} is empty: its shards hold no samples; check how they were written")
        )
    bad = []
    for found in _all_found(source, indexes, damaged, workers, progress):
        if isinstance(found, LedgerEntry):
            bad.append(found)
        else:
            faults.append(found)
    account = total(index.account for index in indexes)
    return Findings(url, len(shards), len(source), tuple(bad), tuple(dict.fromkeys(faults)), account)


Found = LedgerEntry | Fault


def _all_found(
    source: Source, indexes: Sequence[ShardIndex], damaged: set[str], workers: int, progress: Progress
) -> Iterator[Found]:
    """The findings in the order of shards; shards with cached findings are not read again."""
    trusted = [index.url not in damaged and index.shard.is_dated for index in indexes]
    known = [
        _cached_findings(source.url, index.shard) if believed else None
        for index, believed in zip(indexes, trusted, strict=True)
    ]
    starts = [0]
    for index in indexes:
        starts.append(starts[-1] + len(index.keys))
    left = [n for i, findings in enumerate(known) if findings is None for n in range(starts[i], starts[i + 1])]
    results = sweep_samples(
        lambda number: examine_sample(source, number),
        left,
        workers,
        lambda done, total: progress(done + len(source) - total, len(source)),
    )
    if not left and len(source):
        progress(len(source), len(source))
    for i, (index, findings) in enumerate(zip(indexes, known, strict=True)):
        if findings is None:
            findings = [each for _ in range(starts[i], starts[i + 1]) if (each := next(results)) is not None]
            if index.url not in damaged:
                _cache_findings(index.shard, findings)
        yield from findings


def _cache_path(shard: ShardInfo) -> Path:
    decoders = {}
    for package in ("pillow", "simplejpeg"):
        with suppress(PackageNotFoundError):
            decoders[package] = version(package)
    return cache_folder("lint") / sha256(json.dumps([_FORMAT, decoders, asdict(shard)]).encode()).hexdigest()


def _cached_findings(source: str, shard: ShardInfo) -> list[Found] | None:
    """The cached findings for a shard; None without any."""
    try:
        digest, text = _cache_path(shard).read_text(encoding="ascii").splitlines()
        rows = json.loads(text if sha256(text.encode()).hexdigest() == digest else "")
        return [LedgerEntry(source, shard.url, str(key), int(offset), str(reason)) for key, offset, reason in rows]
    except (OSError, ValueError, TypeError):  # none, or damaged
        return None


def _cache_findings(shard: ShardInfo, found: Iterable[Found]) -> None:
    """Caches the findings for a shard atomically. A shard that could not be read is not cached, so it is read again."""
    rows = []
    for each in found:
        if isinstance(each, Fault):
            return
        rows.append([each.key, each.offset, each.reason])
    text = json.dumps(rows)
    write_lines(_cache_path(shard), [sha256(text.encode()).hexdigest(), text])


def write_ledger(path: Path, entries: Iterable[LedgerEntry]) -> None:
    """Writes entries atomically in the format of a run's ledger.jsonl. Raises DataError."""
    write_lines(path, (json.dumps(asdict(entry)) for entry in entries))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes an ASCII text file atomically. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(f"{line}\n".encode("ascii") for line in lines)
    except OSError as error:
        raise DataError(f"cannot write {shown(str(path))}: {error.strerror}; choose another path") from None


def examine_sample(source: Source, number: int) -> LedgerEntry | Fault | None:
    """Why training could not use sample `number`, tested by the loader's steps; None if it can."""
    try:
        record = source.record(number)
        captions_and_labels(record.fields, bare=True)
        picture(record.fields, record.kinds)
    except BadSample as error:
        return LedgerEntry(source.url, source.shard(number), source.key(number), source.offset(number), str(error))
    except DataError as error:  # the shard cannot be read, or changed since it was indexed
        return Fault(source.shard(number), str(error))
    return None


def _examine_shard(shard: ShardInfo) -> tuple[ShardIndex, list[str]]:
    try:
        return index_shard(shard), []
    except DataError:
        return walk(shard)


def _unfinished(shards: Sequence[ShardInfo]) -> list[Fault]:
    """A fault for each folder in which `treering data pack` has not yet written all shards."""
    faults = []
    for folder in dict.fromkeys(shard.url.rpartition("/")[0] for shard in shards):
        target = Target(folder) if folder.rpartition("/")[2] else None
        found = packed_shards(target) if target else None
        if target and found and found[0] < found[1]:
            reason = f"{target.shown()} is not completely packed: {found[0]:,} of {counted(found[1], 'shard')} exist"
            faults.append(Fault(target.url("*.tar"), f"{reason}; run the pack command again, or its other parts"))
    return faults


def _shared_keys(shards: Sequence[ShardIndex]) -> list[Fault]:
    """Keys used by two shards: one fault per pair of shards, not per key."""
    first: dict[str, str] = {}
    pairs: dict[tuple[str, str], list[str]] = {}
    for shard in shards:
        for key in shard.keys:
            other = first.setdefault(key, shard.url)
            if other != shard.url:
                pairs.setdefault((other, shard.url), []).append(key)
    return [
        Fault(
            shard,
            f"{shown_url(other)} and {shown_url(shard)} have {counted(len(keys), 'key')} in common, "
            f"such as {shown(keys[0])}; keys must be unique within a source, so repack one of them",
        )
        for (other, shard), keys in pairs.items()
    ]
