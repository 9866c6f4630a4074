"""The loader: batches of training samples, decoded beside the training process.

What lies at a position of the order (order.py) depends on the position alone, with its random streams named by it, so
neither world size nor decoding processes (workers.py) can change a global batch. A bad sample is replaced by the
order's spares, one after another, and each one met is an entry of the batch's ledger.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from math import ceil, floor, sqrt
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..config import CacheConfig, DataConfig
from ..errors import BadSample, DataError, shown
from ..ledger import LedgerEntry, reasons_text
from ..order import Line, Mixture, Order, Place, Places, stream
from ..samples.arrays import Vectors, present
from ..samples.boxes import SampleBoxes, read_boxes, seen_boxes
from ..samples.captions import Texts, drawn_caption, looks, read_texts, tags_of
from ..samples.clip_tokenizer import fitted
from ..samples.color_jitter import jittered
from ..samples.decode import Crop, captions_and_labels, centre_crop, cropped, drawn_crop, picture, whole_sides
from ..samples.draws import Draws, draw_rows
from ..samples.sample import Batch, Sample, collate
from ..samples.tokenizer import open_tokenizer
from ..shards.record import Record
from ..shards.source import READ_KINDS, Source, open_source
from ..storage.block_cache import BlockCache
from ..storage.files import shown_url
from .prefetch import Ahead
from .workers import Note, Workers

_MOST_SPARES = 1000
_AT_ONCE = 16  # samples that are read before their pictures are decoded
_MOST_DRAWS = 48  # for one sample: its caption's tag and its caption, ten tries at a crop, a flip
Drawn = tuple[Sample, list[LedgerEntry]]
T = TypeVar("T")


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
        self.sources = [open_source(each.source, self.cache, each.filter, config.bad_shards) for each in config.train]
        for source, each in zip(self.sources, config.train, strict=True):
            check_tags(source, each.caption_weights)
        shards = [source.shard_lengths for source in self.sources]
        mixtures = mixtures or [Mixture(0, tuple(each.weight for each in config.train))]
        self.order = Order(seed, shards, mixtures, config.batch, config.shuffle_window, config.lanes)
        for source, line in zip(self.sources, self.order.sources, strict=True):
            self._cache_windows(source, line)
        self._items = _Items(self.sources, self.order, config, resolution, context)
        self._bad: dict[str, dict[tuple[str, str], LedgerEntry]] = {}

    def _cache_windows(self, source: Source, line: Line) -> None:
        """Reads a source that is too large for the cache through it all the same, where its windows are not."""
        if source.is_cached or not source.is_remote or not self.cache.limit:
            return
        total = need = source.size
        if line.lanes:  # of each lane a window, the one after it, and the blocks at their ends
            window = line.most_in_window * total // len(source) + min(self.cache.block, max(source.shard_sizes))
            need = min(need, 2 * line.lanes * window)
        source.read_through(self.cache, need)
        if not source.is_cached and self.rank == 0:
            logging.getLogger(__name__).warning(
                "%s: data.cache.limit = %s has no room for the %.1f GB that are drawn from at a time, so every sample "
                "is a request of its own; raise the limit, or lower data.shuffle_window = %d or data.lanes = %d",
                shown_url(source.url),
                self.config.cache.limit,
                need / 1e9,
                self.config.shuffle_window,
                self.config.lanes,
            )

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample's array in each column that is delivered."""
        return self._items.vectors.shapes

    def batches(self, step: int) -> Generator[Batch, None, None]:
        """This rank's share of global batch `step`, `step` + 1, ... without end. Close the iterator to end its
        processes. Raises DataError if a source cannot be read, or a decoding process dies or hangs."""
        ahead = None
        if any(source.is_cached for source in self.sources):
            ahead = Ahead(self.order, self.sources, self.cache, self.rank, self.world, step)
        left_out = self._shards_left_out() if self.rank == 0 else ()
        try:
            with closing(self._made(step)) as batches:
                for reached in count(step):
                    if ahead:
                        ahead.reached(reached)
                    batch = next(batches)
                    yield replace(batch, bad=(*left_out, *batch.bad)) if left_out else batch
                    left_out = ()
        finally:
            if ahead:
                ahead.close()

    def _made(self, step: int) -> Generator[Batch, None, None]:
        """The batches, in line or by processes."""
        places = (self.order.places(n, self.rank, self.world) for n in count(step))
        if not self.config.workers:
            note = Note()
            yield from (self._items.batch(each, note) for each in places)
            return
        config, batch = self.config, self.config.batch // self.world
        workers = Workers(
            self._items.batch, places, self._named, config.workers, batch, self._items.resolution, config.decode_timeout
        )
        try:
            yield from workers.batches()
        finally:
            workers.close()

    def _named(self, position: int, source: int, number: int) -> str:
        """A sample as an error names it."""
        of = self.sources[source]
        return (
            f"sample {shown(of.key(number))} of {shown_url(of.shard(number))} in {shown_url(of.url)}, "
            f"for position {position} on rank {self.rank}"
        )

    def _shards_left_out(self) -> tuple[LedgerEntry, ...]:
        """The damaged shards that the ledger does not name yet; they travel with the first batch."""
        every = [entry for source in self.sources for entry in source.left_out]
        return tuple(entry for entry in every if (entry.shard, entry.key) not in self._bad.get(entry.source, {}))

    def keys(self, step: int) -> list[str]:
        """The keys of the whole global batch `step`; nothing is read. A bad sample is named, not its spare."""
        return [self.sources[place.source].key(place.number) for place in self.order.places(step)]

    def records(self, step: int) -> list[tuple[Record, str, list[LedgerEntry]]]:
        """This rank's part of global batch `step` as it lies in the shards: of each sample the raw members, the caption
        drawn, and the bad samples it stands in for. Pictures are decoded once, to see that they can be: the samples are
        those of `batches`. Raises DataError as `batches` does."""
        return self._items.records(self.order.places(step, self.rank, self.world))

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
            self._check_left_out(source)
            bad = {place: entry for place, entry in self._bad.get(source.url, {}).items() if entry.key}
            allowed = floor(self.config.max_bad_fraction * len(source))
            if len(bad) > allowed:
                raise DataError(
                    f"{shown_url(source.url)}: {len(bad)} of {len(source)} samples are bad, {allowed} are allowed\n"
                    f"{reasons_text(bad.values())}\n"
                    f"mend or leave out these samples (ledger.jsonl names them), or raise data.max_bad_fraction"
                )

    def _check_left_out(self, source: Source) -> None:
        """DataError if the ledger names a shard as left out that is whole by now: the order would be another."""
        out = {entry.shard for entry in source.left_out}
        for shard, key in self._bad.get(source.url, {}):
            if not key and shard not in out:
                raise DataError(
                    f"{shown_url(shard)} was damaged and left out when the run began, and is not now, which changes "
                    f"the order of samples; put it elsewhere until the run is done, or start a new run"
                )


class _Items:
    """What lies at a place, a pure function of its position."""

    def __init__(self, sources: list[Source], order: Order, config: DataConfig, resolution: int, context: int) -> None:
        self.sources, self.order, self.config, self.augment = sources, order, config, config.augment
        self.resolution, self.context = resolution, context
        self.tokenizer = open_tokenizer(config.tokenizer)
        self.vectors = Vectors(config.columns, sources)
        self.kinds = READ_KINDS | self.vectors.kinds
        self.any_boxes = any(each.boxes for each in config.train)
        self.caption_shares = [each.caption_shares for each in config.train]
        # A crop has at least its share of the area; it shall not have to be enlarged for having been decoded smaller.
        self.least = ceil(resolution / sqrt(self.augment.crop_scale[0])) if config.decode == "scaled" else 0

    def batch(self, places: Places, note: Note) -> Batch:
        """The samples at some places; `note` says at which of them it is. Raises DataError."""
        drawn = [
            each for at in range(0, len(places), _AT_ONCE) for each in self._some(places[at : at + _AT_ONCE], note)
        ]
        return collate([sample for sample, _ in drawn], [entry for _, bad in drawn for entry in bad])

    def _some(self, places: Places, note: Note) -> list[Drawn]:
        """All is read before the first picture is decoded: each runs faster, for the processor's caches, by itself."""
        chances = draw_rows(self.order.seed, "sample", places.position, _MOST_DRAWS)
        begun = [self._read(place, place.number, chance, note) for place, chance in zip(places, chances, strict=True)]
        return [self._drawn(*each, note, self._decoded) for each in zip(places, chances, begun, strict=True)]

    def records(self, places: Places) -> list[tuple[Record, str, list[LedgerEntry]]]:
        """What `Loader.records` gives."""
        chances, note, found = draw_rows(self.order.seed, "sample", places.position, _MOST_DRAWS), Note(), []
        for place, chance in zip(places, chances, strict=True):
            read = self._read(place, place.number, chance, note)
            (record, caption), bad = self._drawn(place, chance, read, note, self._checked)
            found.append((record, caption, bad))
        return found

    def _drawn(
        self,
        place: Place,
        chance: list[float],
        read: _Undecoded | BadSample,
        note: Note,
        finish: Callable[[_Undecoded, Place], T],
    ) -> tuple[T, list[LedgerEntry]]:
        """What `finish` makes of the sample at a place, or of the first of its spares that can be used."""
        source, number = self.sources[place.source], place.number
        bad: list[LedgerEntry] = []
        for attempt in range(_MOST_SPARES):
            try:
                if isinstance(read, BadSample):
                    raise read
                note.write(place.position, place.source, number)
                return finish(read, place), bad
            except BadSample as error:
                bad.append(_entry(source, number, error, place.position))
            spare = self.order.spare(place, attempt)
            if spare is None:
                break
            number = spare
            read = self._read(place, number, chance, note)
        raise DataError(
            f"{shown_url(source.url)}: no usable sample in {len(bad)} drawn for one place\n{reasons_text(bad)}\n"
            f"check what the shards hold"
        )

    def _read(self, place: Place, number: int, chance: list[float], note: Note) -> _Undecoded | BadSample:
        """Sample `number` but for its picture."""
        note.write(place.position, place.source, number)
        random = Draws(chance)
        try:
            record = self.sources[place.source].record(number, self.kinds)
            texts = read_texts(record.fields)
            caption = drawn_caption(texts.captions, self.caption_shares[place.source], random).text
            vectors = self.vectors.read(record)
        except BadSample as error:
            return error
        tokens, cut = fitted(self.tokenizer, caption, self.context)
        return _Undecoded(record, texts, caption, tokens, cut, vectors, random)

    def _checked(self, read: _Undecoded, place: Place) -> tuple[Record, str]:
        """The raw members and the caption of a sample that `_decoded` can use. Raises BadSample as that does."""
        height, width = picture(read.record.fields, read.record.kinds, self.least).shape[:2]
        self._boxes(place.source, read, Crop(0, 0, height, width, False), height, width)
        return read.record, read.caption

    def _decoded(self, read: _Undecoded, place: Place) -> Sample:
        record, texts = read.record, read.texts
        whole = picture(record.fields, record.kinds, self.least)
        height, width = whole.shape[:2]
        crop = drawn_crop(height, width, self.augment, read.random)
        boxes = self._boxes(place.source, read, crop, height, width)
        image = cropped(whole, crop, self.resolution)
        if self.augment.color_jitter.active:
            image = jittered(image, self.augment.color_jitter, stream(self.order.seed, "jitter", place.position))
        return Sample(
            source=self.sources[place.source].url,
            key=record.key,
            image=image,
            captions=tuple(dict.fromkeys(each.text for each in texts.captions)),
            caption=read.caption,
            tokens=read.tokens,
            labels=texts.labels,
            cut=read.cut,
            columns=read.vectors,
            boxes=boxes,
        )

    def _boxes(self, of: int, read: _Undecoded, crop: Crop, height: int, width: int) -> SampleBoxes | None:
        """The boxes that are left in the crop of a picture decoded to these sides; none of a source that is not asked
        for them, None if no source is."""
        unit = self.config.train[of].boxes
        if unit is None:
            return SampleBoxes.none() if self.any_boxes else None
        sides = whole_sides(read.record.fields) if self.least and unit == "pixels" else (height, width)
        boxes = seen_boxes(
            read_boxes(read.texts.metadata, unit, *sides), crop, height, width, self.augment.min_box_fraction
        )
        return boxes.tokenised(self.tokenizer, self.context)


class _Undecoded(NamedTuple):
    """A sample that is read, all but its picture."""

    record: Record
    texts: Texts
    caption: str
    tokens: list[int]
    cut: bool
    vectors: dict[str, NDArray[np.float32]]
    random: Draws  # for its picture


class EvaluationSet:
    """A source read in index order and without chance: centre crops and first captions."""

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
    ) -> None:
        """Opens the source; raises DataError if it cannot be read. For `resize` and `interpolation` see `centre_crop`;
        of `columns` those are delivered that it has."""
        self.source = open_source(url, BlockCache((cache or CacheConfig()).bytes))
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
        """A hash of what is read: other data has another."""
        return self.source.identity

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that every sample has beside picture and captions."""
        return tuple(self.vectors.shapes)

    def sample(self, number: int) -> Sample | LedgerEntry:
        """Sample `number`, or the reason why it cannot be used."""
        try:
            record = self.source.record(number, READ_KINDS | self.vectors.kinds)
            columns = self.vectors.read(record)
            captions, labels = captions_and_labels(record.fields)
            whole = picture(record.fields, record.kinds)
            image = centre_crop(whole, self.resolution, self._resize, self._interpolation)
            tokens = self.tokenizer.encode(captions[0], self.context)
        except BadSample as error:
            return _entry(self.source, number, error)
        return Sample(self.source.url, record.key, image, captions, captions[0], tokens, labels, columns)


def _entry(source: Source, number: int, error: BadSample, position: int = -1) -> LedgerEntry:
    return LedgerEntry(
        source.url, source.shard(number), source.key(number), source.offset(number), str(error), position
    )


def check_tags(source: Source, wanted: Iterable[str]) -> None:
    """Looks at samples until each wanted tag was met. Raises DataError if a few hundred do not have it."""
    missing, found, numbers = set(wanted), Counter[str](), looks(len(source))
    for number in numbers:
        if not missing:
            return
        try:
            captions = read_texts(source.record(number, frozenset(("txt", "json"))).fields).captions
        except BadSample:  # the run's ledger will name it
            continue
        found.update(tags_of(captions))
        missing -= found.keys()
    if missing:
        tags = ", ".join(f"{shown(tag, 40)} ({count} samples)" for tag, count in found.most_common(10)) or "none"
        raise DataError(
            f"{shown_url(source.url)}: captions asks for {', '.join(shown(tag) for tag in sorted(missing))}, but of "
            f"{len(numbers)} samples looked at none has it; found {tags}; correct the tag or leave it out"
        )
