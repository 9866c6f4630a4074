"""Finding, before a run does, every sample that training could not use, and everything wrong with the shards.

The idea is to ask the loader: a sample is bad if the functions that decode it for training refuse it, and the reason
is the one that the run's ledger would give. A damaged shard, which training refuses as a whole, is read as far as it
goes, so that one look shows all there is to mend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .config import DataError
from .decode import captions_and_labels, picture
from .files import ShardInfo, shown_url
from .ledger import BadSample, LedgerEntry, shown
from .shards import ShardIndex, index_shard, walk
from .source import Source, shards_of
from .sweep import Told, silent, sweep, sweep_samples


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


def lint(url: str, workers: int = 1, told: Told = silent) -> Findings:
    """Reads and decodes every sample of a URL. `told` hears of samples. Raises DataError if nothing matches."""
    shards = shards_of(url)
    indexes, faults = [], []
    for index, own in sweep(_examined, shards, workers):
        indexes.append(index)
        faults += [Fault(index.url, reason) for reason in own]
    faults += _shared_keys(indexes)
    source = Source(url, indexes)
    if not len(source) and not faults:
        faults.append(Fault(shards[0].url, f"{shown_url(url)} is empty: there is no sample in its shards"))
    bad = []
    for found in sweep_samples(lambda number: examine(source, number), range(len(source)), workers, told):
        if isinstance(found, LedgerEntry):
            bad.append(found)
        elif found is not None:
            faults.append(found)
    return Findings(url, len(shards), len(source), tuple(bad), tuple(dict.fromkeys(faults)))


def examine(source: Source, number: int) -> LedgerEntry | Fault | None:
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
