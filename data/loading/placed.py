"""The sample at a place of the order, and what stands in for a bad one.

A pure function of the position: its draws come from the position's own row of random numbers, and spares are tried in
the order's own sequence, so that a batch is the same whoever builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, sqrt
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..errors import BadSample, DataError
from ..ledger import LedgerEntry, reasons_text
from ..order import Order, Place, Places, stream
from ..samples.arrays import Vectors
from ..samples.boxes import SampleBoxes, crop_boxes, read_boxes
from ..samples.captions import CLS, Caption, Texts, draw_caption, read_texts
from ..samples.clip_tokenizer import encode_truncated
from ..samples.color_jitter import jittered
from ..samples.decode import Crop, cropped, draw_crop, picture, whole_sides
from ..samples.draws import Draws, draw_rows
from ..samples.sample import Batch, Sample, collate
from ..samples.tokenizer import open_tokenizer
from ..shards.parallel import Progress, silent
from ..shards.record import Record
from ..shards.source import READ_KINDS, Source
from ..storage.files import shown_url
from .workers import Note, SlowSamples

_MAX_SPARES = 1000
_CHUNK = 16  # samples read before their pictures are decoded
_DRAWS_PER_SAMPLE = 48  # caption tag and caption, ten tries at a crop (four draws each), a flip
Drawn = tuple[Sample, list[LedgerEntry]]
T = TypeVar("T")


class PlacedSamples:
    """Builds the sample at a place, as a pure function of its position."""

    def __init__(self, sources: list[Source], order: Order, config: DataConfig, resolution: int, context: int) -> None:
        self.sources, self.order, self.config, self.augment = sources, order, config, config.augment
        self.resolution, self.context = resolution, context
        self.tokenizer = open_tokenizer(config.tokenizer)
        self.vectors = Vectors(config.columns, sources)
        self._slow: SlowSamples = frozenset()
        self.kinds = READ_KINDS | self.vectors.kinds
        self.any_boxes = any(each.boxes for each in config.train)
        self.labels = [each.labels for each in config.train]
        self.kinds |= {CLS} if any(CLS in each for each in self.labels) else set()
        self.tag_weights = [each.tag_weights for each in config.train]
        # Decode no smaller than the smallest crop needs, so that no crop is upsampled.
        self.min_side = ceil(resolution / sqrt(self.augment.crop_scale[0])) if config.decode == "scaled" else 0

    def batch(self, places: Places, note: Note, slow: SlowSamples = frozenset()) -> Batch:
        """The batch of samples at `places`; `note` records the one being processed; `slow` samples are bad. Raises
        DataError."""
        self._slow = slow
        drawn = [each for at in range(0, len(places), _CHUNK) for each in self._chunk(places[at : at + _CHUNK], note)]
        return collate([sample for sample, _ in drawn], [entry for _, bad in drawn for entry in bad])

    def _chunk(self, places: Places, note: Note) -> list[Drawn]:
        """Reads the whole chunk first, then decodes it: each loop is faster alone (CPU caches)."""
        rows = draw_rows(self.order.seed, "sample", places.position, _DRAWS_PER_SAMPLE)
        undecoded = [self._read(place, place.number, row, note) for place, row in zip(places, rows, strict=True)]
        return [self._usable(*each, note, self._decoded) for each in zip(places, rows, undecoded, strict=True)]

    def records(self, places: Places, progress: Progress = silent) -> list[tuple[Record, str, list[LedgerEntry]]]:
        """The raw samples that `Loader.records` returns."""
        rows, note, found = draw_rows(self.order.seed, "sample", places.position, _DRAWS_PER_SAMPLE), Note(), []
        for place, row in zip(places, rows, strict=True):
            read = self._read(place, place.number, row, note)
            (record, caption), bad = self._usable(place, row, read, note, self._checked)
            found.append((record, caption, bad))
            progress(len(found), len(places))
        return found

    def _usable(
        self,
        place: Place,
        row: list[float],
        read: _Undecoded | BadSample,
        note: Note,
        finish: Callable[[_Undecoded, Place], T],
    ) -> tuple[T, list[LedgerEntry]]:
        """The result of `finish` for the sample at a place, or for its first usable spare; and the bad samples before
        it."""
        source, number = self.sources[place.source], place.number
        bad: list[LedgerEntry] = []
        for attempt in range(_MAX_SPARES):
            try:
                if isinstance(read, BadSample):
                    raise read
                note.write(place.position, place.source, number)
                return finish(read, place), bad
            except BadSample as error:
                bad.append(entry_of(source, number, error, place.position))
            spare = self.order.spare(place, attempt)
            if spare is None:
                break
            number = spare
            read = self._read(place, number, row, note)
        raise DataError(
            f"{shown_url(source.url)}: no usable sample in {len(bad)} drawn for one place\n{reasons_text(bad)}\n"
            f"check the content of the shards"
        )

    def _read(self, place: Place, number: int, row: list[float], note: Note) -> _Undecoded | BadSample:
        """Reads sample `number` and draws its caption; its picture is not decoded yet."""
        note.write(place.position, place.source, number)
        if (place.source, number) in self._slow:
            return BadSample(f"sample too slow: it took more than {self.config.decode_timeout:g} seconds")
        random = Draws(row)
        try:
            record = self.sources[place.source].record(number, self.kinds)
            texts = read_texts(record.fields, self.labels[place.source])
            caption = _drawn(texts, self.tag_weights[place.source], random)
            vectors = self.vectors.read(record)
            tokens, cut = encode_truncated(self.tokenizer, caption.text, self.context)
        except BadSample as error:
            return error
        return _Undecoded(record, texts, caption, tokens, cut, vectors, random)

    def _checked(self, read: _Undecoded, place: Place) -> tuple[Record, str]:
        """The raw members and the caption of a sample that `_decoded` accepts; raises BadSample where that does."""
        height, width = self._picture(read.record).shape[:2]
        self._boxes(place.source, read, Crop(0, 0, height, width, False), height, width)
        return read.record, read.caption.text

    def _decoded(self, read: _Undecoded, place: Place) -> Sample:
        record, texts = read.record, read.texts
        full = self._picture(record)
        height, width = full.shape[:2]
        crop = draw_crop(height, width, self.augment, read.random)
        boxes = self._boxes(place.source, read, crop, height, width)
        image = cropped(full, crop, self.resolution)
        if self.augment.color_jitter.active:
            image = jittered(image, self.augment.color_jitter, stream(self.order.seed, "jitter", place.position))
        return Sample(
            shard=record.shard,
            key=record.key,
            image=image,
            captions=tuple(dict.fromkeys(each.text for each in texts.captions)),
            caption=read.caption.text,
            equal=read.caption.equal,
            tokens=read.tokens,
            labels=texts.labels,
            cut=read.cut,
            columns=read.vectors,
            boxes=boxes,
        )

    def _picture(self, record: Record) -> NDArray[np.uint8]:
        return picture(record.fields, record.kinds, self.min_side, self.config.unfinished_jpegs == "keep")

    def _boxes(self, of: int, read: _Undecoded, crop: Crop, height: int, width: int) -> SampleBoxes | None:
        """The boxes inside the crop of a picture decoded to `height` x `width`.

        No boxes if the recipe does not ask for them from this source, None if it asks for them from no source."""
        unit = self.config.train[of].boxes
        if unit is None:
            return SampleBoxes.none() if self.any_boxes else None
        sides = whole_sides(read.record.fields) if self.min_side and unit == "pixels" else (height, width)
        boxes = crop_boxes(
            read_boxes(read.texts.whole_metadata(), unit, *sides), crop, height, width, self.augment.min_box_fraction
        )
        return boxes.tokenised(self.tokenizer, self.context)


def _drawn(texts: Texts, tag_weights: Mapping[str, int], random: Draws) -> Caption:
    """A caption of a sample. Raises BadSample without one to draw; if some could not be read, the reason is theirs."""
    try:
        return draw_caption(texts.captions, tag_weights, random)
    except BadSample as error:
        raise BadSample(texts.faults[0]) if texts.faults else error from None


class _Undecoded(NamedTuple):
    """A sample that is read except that its picture is not decoded."""

    record: Record
    texts: Texts
    caption: Caption
    tokens: list[int]
    cut: bool
    vectors: dict[str, NDArray[np.float32]]
    random: Draws  # the remaining draws, for the picture


def entry_of(source: Source, number: int, error: BadSample, position: int = -1) -> LedgerEntry:
    """The ledger entry of a bad sample of a source."""
    return LedgerEntry(
        source.url, source.shard(number), source.key(number), source.offset(number), str(error), position
    )
