"""The loader: batches of training samples, decoded in line or by worker processes.

A sample and its random draws depend only on its position in the order (order.py), so neither world size nor the number
of decoding processes (workers.py) can change a global batch. A bad sample is replaced by the order's spares, tried one
after another, and each bad one is recorded in the batch's ledger entries.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from math import ceil, floor

from ..config import CacheConfig, DataConfig
from ..errors import BadSample, DataError, shown
from ..ledger import BadSamples, LedgerEntry, reasons_text
from ..order import Line, Mixture, Order, default_window
from ..samples.arrays import Vectors, present
from ..samples.captions import CLS, probe_numbers, read_texts, tags_of
from ..samples.clip_tokenizer import TextTokenizer
from ..samples.decode import captions_and_labels, centre_crop, picture
from ..samples.sample import Batch, Sample
from ..samples.tokenizer import open_tokenizer
from ..shards.parallel import Progress, silent
from ..shards.record import Record
from ..shards.source import READ_KINDS, Source, open_source
from ..storage.block_cache import BlockCache
from ..storage.files import shown_url
from ..units import counted
from .placed import PlacedSamples, entry_of
from .prefetch import Prefetcher
from .workers import Note, Workers


class Loader:
    """Rank `rank`'s part of the stream of a run, batch by batch, from any step on."""

    def __init__(
        self,
        config: DataConfig,
        resolution: int,
        context: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        mixtures: Sequence[Mixture] = (),
        progress: Progress = silent,
    ) -> None:
        """Opens the sources; `mixtures` overrides their weights. Pictures are delivered at `resolution` x `resolution`
        pixels, captions with at most `context` tokens. `progress(done, total)` counts the shards that must be indexed.
        Raises DataError if a source cannot be read."""
        assert config.batch % world == 0, "the recipe checks this"
        config.check_train()
        self.config, self.rank, self.world = config, rank, world
        self.cache = BlockCache(config.cache.bytes)
        self.sources = [
            open_source(each.source, self.cache, each.filter, config.bad_shards, progress=progress)
            for each in config.train
        ]
        for source, each in zip(self.sources, config.train, strict=True):
            check_tags(source, each.caption_weights, each.labels)
        shards = [source.shard_lengths for source in self.sources]
        mixtures = mixtures or [Mixture(0, tuple(each.weight for each in config.train))]
        self.order = Order(seed, shards, mixtures, config.batch, config.shuffle_window, config.lanes)
        for source, line in zip(self.sources, self.order.sources, strict=True):
            self._cache_windows(source, line)
        self._samples = PlacedSamples(self.sources, self.order, config, resolution, context)
        self._bad: dict[str, BadSamples] = {}

    def _cache_windows(self, source: Source, line: Line) -> None:
        """Uses the cache for a source larger than the cache if the windows read at a time fit."""
        if source.is_cached or not source.is_remote or not self.cache.limit:
            return
        total = need = source.size
        if line.lanes:  # per lane: a window, some of the next one, and the blocks at their ends
            window, end = line.window_size * total // len(source), min(self.cache.block, max(source.shard_sizes))
            need = min(need, ceil(line.lanes * self._of_this_node()) * (window + window // 4 + 2 * end))
        source.read_through(self.cache, need)
        if not source.is_cached and self.rank == 0:
            logging.getLogger(__name__).warning(
                "%s: data.cache.limit = %s is less than the %.1f GB that are read from at a time, so every sample "
                "needs a separate request; raise the limit, or lower data.shuffle_window = %d or data.lanes = %d",
                shown_url(source.url),
                self.config.cache.limit,
                need / 1e9,
                self.config.shuffle_window or default_window(self.config.batch),
                self.config.lanes,
            )

    def _of_this_node(self) -> float:
        """The fraction of the run's processes that are on this node and share its cache, as torchrun says it."""
        return min(1.0, int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) / self.world)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the captions."""
        return self._samples.tokenizer

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample's array, by delivered column."""
        return self._samples.vectors.shapes

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """This rank's part of global batches `step`, `step` + 1, ... without end. Close the iterator to end its
        processes. Raises DataError if a source cannot be read, or a decoding process dies or hangs."""
        prefetcher = None
        if any(source.is_cached for source in self.sources):
            prefetcher = Prefetcher(self.order, self.sources, self.cache, self.rank, self.world, step)
        skipped = self._new_skipped_shards() if self.rank == 0 else ()
        try:
            with closing(self._build_batches(step)) as batches:
                for reached in count(step):
                    if prefetcher:
                        prefetcher.reached(reached)
                    batch = next(batches)
                    yield replace(batch, bad=(*skipped, *batch.bad)) if skipped else batch
                    skipped = ()
        finally:
            if prefetcher:
                prefetcher.close()

    def _build_batches(self, step: int) -> Generator[Batch, None, None]:
        """The batches, built in this process or by workers."""
        places = (self.order.places(n, self.rank, self.world) for n in count(step))
        if not self.config.workers:
            note = Note()
            yield from (self._samples.batch(each, note) for each in places)
            return
        config, batch = self.config, self.config.batch // self.world
        workers = Workers(
            self._samples.batch,
            places,
            self._describe,
            config.workers,
            batch,
            self._samples.resolution,
            config.decode_timeout,
        )
        try:
            yield from workers.batches()
        finally:
            workers.close()

    def _describe(self, position: int, source: int, number: int) -> str:
        """Describes a sample for an error message."""
        of = self.sources[source]
        return (
            f"sample {shown(of.key(number))} of {shown_url(of.shard(number))} in {shown_url(of.url)}, "
            f"for position {position} on rank {self.rank}"
        )

    def _new_skipped_shards(self) -> tuple[LedgerEntry, ...]:
        """The damaged shards not yet in the ledger; their entries are sent with the first batch."""
        every = [entry for source in self.sources for entry in source.skipped]
        known = {source: bad.shards for source, bad in self._bad.items()}
        return tuple(entry for entry in every if entry.shard not in known.get(entry.source, ()))

    def keys(self, step: int) -> list[str]:
        """The keys of the whole global batch `step`; nothing is read. A bad sample's key is given, not its spare's."""
        return [self.sources[place.source].key(place.number) for place in self.order.places(step)]

    def records(self, step: int, progress: Progress = silent) -> list[tuple[Record, str, list[LedgerEntry]]]:
        """This rank's part of global batch `step`, raw: for each sample its members, the drawn caption, and the bad
        samples it replaces; `progress(done, total)` counts samples.

        Each picture is decoded once as a check, so that the samples are the same as those of `batches`. Raises
        DataError as `batches` does."""
        return self._samples.records(self.order.places(step, self.rank, self.world), progress)

    def coverage(self, step: int) -> dict[str, float]:
        """The number of passes over each source before global batch `step`, by its name.

        Below 1 it is the fraction of its samples that were seen, each once; from 1 on each was seen at least once."""
        drawn = zip(self.config.train, self.order.counts(step), self.order.lengths, strict=True)
        return {source.label: count / length for source, count, length in drawn}

    def check_bad(self, entries: Sequence[LedgerEntry]) -> None:
        """Counts the bad samples found by all ranks (and, after a resume, those in the ledger). The cost is that of the
        new entries, however many are known.

        Raises DataError once more than `max_bad_fraction` of a source's samples (rounded down) are bad."""
        for entry in entries:
            self._bad.setdefault(entry.source, BadSamples()).add(entry)
        for source in self.sources:
            new = [entry for entry in entries if entry.source == source.url]
            self._check_skipped(source, (entry.shard for entry in new if not entry.key))
            bad = self._bad[source.url].samples if new else {}
            allowed = floor(self.config.max_bad_fraction * len(source))
            if len(bad) > allowed:
                raise DataError(
                    f"{shown_url(source.url)}: {len(bad)} of {counted(len(source), 'sample')} are bad, "
                    f"at most {allowed} may be\n"
                    f"{reasons_text(bad.values())}\n"
                    f"repair or remove these samples (ledger.jsonl lists them), or raise data.max_bad_fraction"
                )

    def _check_skipped(self, source: Source, shards: Iterable[str]) -> None:
        """DataError if one of `shards`, which the ledger lists as skipped, is intact now: the order would change."""
        for shard in shards:
            if all(entry.shard != shard for entry in source.skipped):
                raise DataError(
                    f"{shown_url(shard)} was damaged and skipped when the run began but is intact now, which would "
                    f"change the order of samples; move it away until the run is done, or start a new run"
                )


class EvaluationSet:
    """A source read in index order without randomness: centre crops and first captions."""

    def __init__(
        self,
        url: str,
        resolution: int,
        context: int,
        cache: CacheConfig | None = None,
        tokenizer: str = "clip",
        *,
        resize: str = "crop",
        interpolation: str = "bicubic",
        columns: Collection[str] = (),
        progress: Progress = silent,
    ) -> None:
        """Opens the source; raises DataError if it cannot be read. For `resize` and `interpolation` see `centre_crop`.
        Those of `columns` that the source has are delivered. `progress(done, total)` counts shards to be indexed."""
        self.source = open_source(url, BlockCache((cache or CacheConfig()).bytes), progress=progress)
        self.vectors = Vectors(present(columns, self.source), [self.source])
        self.tokenizer = open_tokenizer(tokenizer)
        self.resolution, self.context = resolution, context
        self._resize, self._interpolation = resize, interpolation

    def __len__(self) -> int:
        return len(self.source)

    @property
    def url(self) -> str:
        """Where the samples come from."""
        return self.source.url

    @property
    def identity(self) -> str:
        """A hash that identifies the data."""
        return self.source.identity.digest

    @property
    def contents(self) -> str:
        """The same: it depends on the samples alone."""
        return self.identity

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every sample has in addition to picture and captions."""
        return tuple(self.vectors.shapes)

    def sample(self, number: int) -> Sample | LedgerEntry:
        """Sample `number`, or a ledger entry with the reason why it cannot be used."""
        try:
            record = self.source.record(number, READ_KINDS | self.vectors.kinds)
            columns = self.vectors.read(record)
            captions, labels = captions_and_labels(record.fields)
            full = picture(record.fields, record.kinds)
            image = centre_crop(full, self.resolution, self._resize, self._interpolation)
            tokens = self.tokenizer.encode(captions[0], self.context)
        except BadSample as error:
            return entry_of(self.source, number, error)
        return Sample(record.shard, record.key, image, captions, captions[0], tokens, labels, columns)


def check_tags(source: Source, weights: Iterable[str], labels: Mapping[str, Sequence[str]]) -> None:
    """Reads samples until each tag of `weights` and each of `labels` was found. Raises DataError if none of a few
    hundred has it."""
    wanted = dict.fromkeys(weights, "caption_weights") | {f"label:{name}": "labels" for name in labels}
    kinds = frozenset(("txt", "json", *({CLS} & labels.keys())))
    found, numbers = Counter[str](), probe_numbers(len(source))
    for number in numbers:
        if found.keys() >= wanted.keys():
            return
        try:
            texts = read_texts(source.record(number, kinds).fields, labels, bare=True)
        except BadSample:  # the run's ledger will record it
            continue
        found.update(tags_of(texts.captions))
        found.update(f"label:{name}" for name in texts.labels if name not in labels)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        tags = ", ".join(f"{shown(tag, 40)} ({counted(count, 'sample')})" for tag, count in found.most_common(10))
        names = ", ".join(shown(tag.removeprefix("label:") if wanted[tag] == "labels" else tag) for tag in missing)
        raise DataError(
            f"{shown_url(source.url)}: {wanted[missing[0]]} names {names}, but none of {len(numbers)} inspected "
            f"samples has it; found {tags or 'none'}; correct the name or remove it"
        )
