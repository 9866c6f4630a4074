"""The loader: batches of training samples, decoded beside the training process.

Every position of the order (order.py) is one item of a map-style data set; torch's DataLoader brings the processes and
the bounded prefetch. What an item is depends on its position alone, with its random streams named by the position, so
neither world size nor workers can change a global batch. A bad sample is replaced by the order's spares, one after
another, and each one met is an entry of the batch's ledger.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Generator, Iterator, Sequence
from math import floor
from typing import TYPE_CHECKING, Any

from .ahead import Ahead
from .blocks import BlockCache
from .config import CacheConfig, DataConfig, DataError
from .decode import captions_and_labels, centre_crop, picture, random_crop
from .files import is_remote, shown_url
from .ledger import BadSample, LedgerEntry, reasons_table
from .order import Line, Mixture, Order, Place, Places, stream
from .record import Batch, Sample, collate
from .source import Source, open_source
from .text import Tokenizer

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_MOST_SPARES = 1000
_AHEAD = 2  # batches a worker may be ahead
Drawn = tuple[Sample, list[LedgerEntry]]


class Loader:
    """Rank `rank`'s share of the stream of a run, batch by batch, from any step on."""

    def __init__(
        self,
        config: DataConfig,
        resolution: int,
        context: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        mixtures: Sequence[Mixture] = (),
    ) -> None:
        """Opens the sources, mixed by their weights unless `mixtures` says how. Pictures come at `resolution` pixels,
        captions at most `context` tokens long."""
        assert config.batch % world == 0, "the recipe checks this"
        self.config, self.rank, self.world = config, rank, world
        self.cache = BlockCache(config.cache.bytes)
        self.sources = [open_source(each.source, self.cache) for each in config.train]
        shards = [source.shard_lengths for source in self.sources]
        mixtures = mixtures or [Mixture(0, tuple(each.weight for each in config.train))]
        self.order = Order(seed, shards, mixtures, config.batch, config.shuffle, config.lanes)
        for source, line in zip(self.sources, self.order.sources, strict=True):
            self._cache_windows(source, line)
        self._items = _Items(self.sources, self.order, config, resolution, context)
        self._bad: dict[str, dict[tuple[str, str], LedgerEntry]] = {}

    def _cache_windows(self, source: Source, line: Line) -> None:
        """Reads a source that is too large for the cache through it all the same, where its windows are not."""
        if source.is_cached or not is_remote(source.url) or not self.cache.limit:
            return
        total, need = sum(source.shard_sizes), sum(source.shard_sizes)
        if line.lanes:  # of each lane a window, the one after it, and the blocks at their ends
            window = line.most_in_window * total // len(source) + min(self.cache.block, max(source.shard_sizes))
            need = min(need, 2 * line.lanes * window)
        source.read_through(self.cache, need)
        if not source.is_cached and self.rank == 0:
            logging.getLogger(__name__).warning(
                "%s: data.cache.limit = %s has no room for the %.1f GB that are drawn from at a time, so every sample "
                "is a request of its own; raise the limit, or lower data.shuffle = %d or data.lanes = %d",
                shown_url(source.url),
                self.config.cache.limit,
                need / 1e9,
                self.config.shuffle,
                self.config.lanes,
            )

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """This rank's share of global batch `step`, `step` + 1, ... without end. Close the iterator to end its
        processes. Raises DataError if a source cannot be read, or a decoding process dies."""
        ahead = None
        if any(source.is_cached for source in self.sources):
            ahead = Ahead(self.order, self.sources, self.cache, self.rank, self.world, step)
        batches, batch = iter(self._data_loader(step)), None
        try:
            while True:
                if ahead:
                    ahead.reached(step)
                try:
                    batch = next(batches)
                except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: it died handing over
                    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                        raise
                    batch = DataError(self._worker_died(step, error))
                if isinstance(batch, DataError):
                    raise batch
                yield batch
                step += 1
        finally:  # end the processes here and now, not when a traceback that holds this frame is collected
            del batches, batch
            if ahead:
                ahead.close()

    def keys(self, step: int) -> list[str]:
        """The keys of the whole global batch `step`; nothing is read. A bad sample is named, not its spare."""
        return [self.sources[place.source].key(place.number) for place in self.order.places(step)]

    def coverage(self, step: int) -> dict[str, float]:
        """How often each source has been read through before global batch `step`, by its name: below 1 it is the share
        of its samples that were seen, all of them different; from 1 on each was seen at least once."""
        drawn = zip(self.config.train, self.order.counts(step), self.order.lengths, strict=True)
        return {source.label: count / length for source, count, length in drawn}

    def check_bad(self, entries: Sequence[LedgerEntry]) -> None:
        """Counts the bad samples that all ranks met (and, after a resume, those of the ledger). Raises DataError once
        more distinct samples of a source are bad than its share `bad_samples` allows, rounded down."""
        for entry in entries:
            self._bad.setdefault(entry.source, {})[entry.shard, entry.key] = entry
        for source in self.sources:
            bad = self._bad.get(source.url, {})
            allowed = floor(self.config.bad_samples * len(source))
            if len(bad) > allowed:
                raise DataError(
                    f"{shown_url(source.url)}: {len(bad)} of {len(source)} samples are bad, {allowed} are allowed\n"
                    f"{reasons_table(bad.values())}\n"
                    f"mend or leave out these samples (ledger.jsonl names them), or raise data.bad_samples"
                )

    def _data_loader(self, step: int) -> DataLoader[Any]:
        from torch.utils.data import DataLoader

        workers = self.config.workers
        return DataLoader(
            self._items,  # type: ignore[arg-type]
            batch_sampler=_Steps(self.order, step, self.rank, self.world),  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_collated,
            prefetch_factor=_AHEAD if workers else None,
            worker_init_fn=_quiet_worker,
            multiprocessing_context="fork" if workers else None,
        )

    def _worker_died(self, step: int, error: Exception) -> str:
        positions = sorted(self.order.places(step, self.rank, self.world).position.tolist())
        reason = (str(error) or type(error).__name__).split("\n")[0]
        return (
            f"a decoding process of rank {self.rank} died at step {step}, positions {positions[0]} to {positions[-1]} "
            f"({reason}); if memory ran out, lower data.workers; `data.workers=0` shows the fault in line"
        )


class _Steps:
    """For DataLoader: the places of one rank's batch, step after step, without end."""

    def __init__(self, order: Order, step: int, rank: int, world: int) -> None:
        self.order, self.step, self.rank, self.world = order, step, rank, world

    def __iter__(self) -> Iterator[Places]:
        step = self.step
        while True:
            yield self.order.places(step, self.rank, self.world)
            step += 1


class _Items:
    """For DataLoader: what lies at a place, a pure function of its position."""

    def __init__(self, sources: list[Source], order: Order, config: DataConfig, resolution: int, context: int) -> None:
        self.sources, self.order, self.augment = sources, order, config.augment
        self.resolution, self.context, self.tokenizer = resolution, context, Tokenizer()

    def __getitem__(self, place: Place) -> Drawn | DataError:
        try:
            return self._drawn(place)
        except DataError as error:  # handed over as a value: DataLoader would bury it in a traceback
            return error

    def _drawn(self, place: Place) -> Drawn:
        source, number = self.sources[place.source], place.number
        bad: list[LedgerEntry] = []
        for attempt in range(_MOST_SPARES):
            try:
                return self._sample(source, number, place.position), bad
            except BadSample as error:
                bad.append(_entry(source, number, error, place.position))
            spare = self.order.spare(place, attempt)
            if spare is None:
                break
            number = spare
        raise DataError(
            f"{shown_url(source.url)}: no usable sample in {len(bad)} drawn for one place\n{reasons_table(bad)}\n"
            f"check what the shards hold"
        )

    def _sample(self, source: Source, number: int, position: int) -> Sample:
        record = source.record(number)
        captions, labels = captions_and_labels(record.fields)
        chosen = int(stream(self.order.seed, "caption", position).integers(len(captions)))
        image = random_crop(
            picture(record.fields), self.resolution, self.augment, stream(self.order.seed, "augment", position)
        )
        tokens = self.tokenizer.encode(captions[chosen], self.context)
        return Sample(source.url, record.key, image, captions, captions[chosen], tokens, labels)


class EvaluationSet:
    """A source read in index order and without chance: centre crops and first captions."""

    def __init__(self, url: str, resolution: int, context: int, cache: CacheConfig | None = None) -> None:
        """Opens the source; raises DataError if it cannot be read."""
        self.source, self.tokenizer = open_source(url, BlockCache((cache or CacheConfig()).bytes)), Tokenizer()
        self.resolution, self.context = resolution, context

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, number: int) -> Sample | LedgerEntry:
        """Sample `number`, or the reason why it cannot be used."""
        try:
            record = self.source.record(number)
            captions, labels = captions_and_labels(record.fields)
            image = centre_crop(picture(record.fields), self.resolution)
        except BadSample as error:
            return _entry(self.source, number, error)
        tokens = self.tokenizer.encode(captions[0], self.context)
        return Sample(self.source.url, record.key, image, captions, captions[0], tokens, labels)


def _entry(source: Source, number: int, error: BadSample, position: int = -1) -> LedgerEntry:
    return LedgerEntry(
        source.url, source.shard(number), source.key(number), source.offset(number), str(error), position
    )


def _collated(items: list[Drawn | DataError]) -> Batch | DataError:
    drawn = []
    for item in items:
        if isinstance(item, DataError):
            return item
        drawn.append(item)
    return collate([sample for sample, _ in drawn], [entry for _, bad in drawn for entry in bad])


def _quiet_worker(_: int) -> None:
    """A worker ends when its parent does or tells it to; the run's signal handlers, inherited by the fork, are the
    parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
