"""Finding, before a run does, every sample that training could not use, and everything wrong with the shards.

The idea is to ask the loader: a sample is bad if the functions that decode it for training refuse it, and the reason
is the one that the run's ledger would give. A damaged shard, which training refuses as a whole, is read as far as it
goes, so that one look shows all there is to mend.

What was found in a shard is kept in the cache folder as soon as all of it was read, under a name that changes with the
shard and with the decoders: an interrupted lint goes on where it was, and one after a few shards changed reads those.
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
from ..shards.listing import ShardIndex, index_shard, walk
from ..shards.parallel import Progress, silent, sweep, sweep_samples
from ..shards.source import Source, shards_of
from ..storage.atomic_write import atomic_file
from ..storage.files import ShardInfo, cache_folder, shown_url
from ..storage.output import Target
from .pack import packed_shards

_FORMAT = 1  # of what is kept; raise it when other samples are bad, or for other reasons


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with a shard as a whole, for which training refuses the source."""

    shard: str
    reason: str  # a sentence with the remedy


@dataclass(frozen=True, slots=True)
class Findings:
    """What lint found in a source."""

    source: str
    shards: int
    samples: int
    bad: tuple[LedgerEntry, ...]  # in the order of shards and offsets
    faults: tuple[Fault, ...]

    @property
    def clean(self) -> bool:
        """Whether training can use all of it."""
        return not self.bad and not self.faults

    @property
    def kinds(self) -> dict[str, int]:
        """How many samples are bad for each kind of reason, most frequent first."""
        return dict(Counter(entry.reason.partition(":")[0] for entry in self.bad).most_common())


def lint(url: str, workers: int = 1, progress: Progress = silent) -> Findings:
    """Reads and decodes every sample of a URL. `progress` hears of samples. Raises DataError if nothing matches."""
    shards = shards_of(url)
    indexes, faults = [], []
    damaged: set[str] = set()
    for index, own in sweep(_examined, shards, workers):
        indexes.append(index)
        faults += [Fault(index.url, reason) for reason in own]
        damaged |= {index.url} if own else set()
    faults += _shared_keys(indexes) + _unfinished(shards)
    source = Source(url, indexes)
    if not len(source) and not faults:
        faults.append(Fault(shards[0].url, f"{shown_url(url)} is empty: there is no sample in its shards"))
    bad = []
    for found in _all_found(source, indexes, damaged, workers, progress):
        if isinstance(found, LedgerEntry):
            bad.append(found)
        else:
            faults.append(found)
    return Findings(url, len(shards), len(source), tuple(bad), tuple(dict.fromkeys(faults)))


Found = LedgerEntry | Fault


def _all_found(
    source: Source, indexes: Sequence[ShardIndex], damaged: set[str], workers: int, progress: Progress
) -> Iterator[Found]:
    """What is wrong with samples, in the order of shards; what is known of a shard is not looked for again."""
    known = [None if index.url in damaged else _kept(source.url, index.shard) for index in indexes]
    starts = [0]
    for index in indexes:
        starts.append(starts[-1] + len(index.keys))
    left = [n for i, own in enumerate(known) if own is None for n in range(starts[i], starts[i + 1])]
    results = sweep_samples(
        lambda number: examine_sample(source, number),
        left,
        workers,
        lambda done, total: progress(done + len(source) - total, len(source)),
    )
    if not left and len(source):
        progress(len(source), len(source))
    for i, (index, own) in enumerate(zip(indexes, known, strict=True)):
        if own is None:
            own = [each for _ in range(starts[i], starts[i + 1]) if (each := next(results)) is not None]
            if index.url not in damaged:
                _keep(index.shard, own)
        yield from own


def _kept_at(shard: ShardInfo) -> Path:
    decoders = {}
    for package in ("pillow", "simplejpeg"):
        with suppress(PackageNotFoundError):
            decoders[package] = version(package)
    return cache_folder("lint") / sha256(json.dumps([_FORMAT, decoders, asdict(shard)]).encode()).hexdigest()


def _kept(source: str, shard: ShardInfo) -> list[Found] | None:
    """What an earlier lint found in a shard; None if there was none."""
    try:
        digest, text = _kept_at(shard).read_text(encoding="ascii").splitlines()
        rows = json.loads(text if sha256(text.encode()).hexdigest() == digest else "")
        return [LedgerEntry(source, shard.url, str(key), int(offset), str(reason)) for key, offset, reason in rows]
    except (OSError, ValueError, TypeError):  # none, or damaged
        return None


def _keep(shard: ShardInfo, found: Iterable[Found]) -> None:
    """Notes what is bad in a shard, whole or not at all. A shard that cannot be read is read again the next time."""
    rows = []
    for each in found:
        if isinstance(each, Fault):
            return
        rows.append([each.key, each.offset, each.reason])
    text = json.dumps(rows)
    write_lines(_kept_at(shard), [sha256(text.encode()).hexdigest(), text])


def write_ledger(path: Path, entries: Iterable[LedgerEntry]) -> None:
    """Writes entries as a run's ledger.jsonl has them, whole or not at all. Raises DataError."""
    write_lines(path, (json.dumps(asdict(entry)) for entry in entries))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file so that no reader ever sees a part of it. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.writelines(f"{line}\n".encode("ascii") for line in lines)
    except OSError as error:
        raise DataError(f"cannot write {shown(str(path))}: {error.strerror}; choose another place for it") from None


def examine_sample(source: Source, number: int) -> LedgerEntry | Fault | None:
    """What keeps training from using sample `number`, by the steps of the loader; None if nothing does."""
    try:
        record = source.record(number)
        captions_and_labels(record.fields)
        picture(record.fields, record.kinds)
    except BadSample as error:
        return LedgerEntry(source.url, source.shard(number), source.key(number), source.offset(number), str(error))
    except DataError as error:  # the shard cannot be read, or changed since it was indexed
        return Fault(source.shard(number), str(error))
    return None


def _examined(shard: ShardInfo) -> tuple[ShardIndex, list[str]]:
    try:
        return index_shard(shard), []
    except DataError:
        return walk(shard)


def _unfinished(shards: Sequence[ShardInfo]) -> list[Fault]:
    """A fault for each folder in which `treering data pack` has not written all shards yet."""
    faults = []
    for folder in dict.fromkeys(shard.url.rpartition("/")[0] for shard in shards):
        target = Target(folder) if folder.rpartition("/")[2] else None
        found = packed_shards(target) if target else None
        if target and found and found[0] < found[1]:
            reason = f"{target.shown()} is not packed to the end: {found[0]} of {found[1]} shards are there"
            faults.append(
                Fault(target.url("*.tar"), f"{reason}; give the command of the pack again, or its other parts")
            )
    return faults


def _shared_keys(shards: Sequence[ShardIndex]) -> list[Fault]:
    """Two shards with samples of one key: a fault for each pair of shards, not for each key."""
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
            f"{shown_url(other)} and {shown_url(shard)} both hold {len(keys)} of their keys, {shown(keys[0])} for one; "
            f"keys must differ within a source, so pack one of them again",
        )
        for (other, shard), keys in pairs.items()
    ]
