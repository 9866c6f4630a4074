"""The exact order for other training loops: a run's stream of samples as a WebDataset pipeline.

WebDataset itself shuffles shards and a buffer, so what it gives depends on the number of processes and cannot be taken
up in mid-epoch. Here the order stays ours (order.py): a function of seed, step and rank. What comes out are
WebDataset's own samples, dicts of raw bytes by kind, so that its `decode`, `map`, `to_tuple` and `batched` follow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info
from webdataset import FluidWrapper
from webdataset.utils import pytorch_worker_info

from ..config import DataConfig, SourceConfig
from ..errors import DataError, shown
from ..ledger import LedgerEntry
from ..order import Mixture
from ..storage.files import shown_url
from .loader import Loader

_LOG = logging.getLogger(__name__)
_ANY = 1  # resolution and context of a loader whose samples are handed out raw


class Stream(Protocol):
    """What is needed of a recipe."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def seed(self) -> int: ...

    def mixtures(self) -> list[Mixture]:
        """The weights of the sources, by the step they begin at."""
        ...


def as_webdataset(
    source: Stream | DataConfig | str,
    batch: int | None = None,
    *,
    seed: int | None = None,
    step: int = 0,
    steps: int | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> FluidWrapper:
    """The samples of a recipe, of a `data:` block or of a source's URL as a WebDataset pipeline, in the order of a run.

    batch: pairs of a global batch, over all ranks; needed for a URL, else the recipe's.
    seed: of the order; the recipe's, or 0.
    step, steps: the global batch to begin with, and how many to give (None: without end).
    rank, world: left out, they are those of torch.distributed or of the environment (RANK, WORLD_SIZE).

    A sample has `__key__`, `__url__` (its shard) and the raw bytes of its members by kind: the picture, `json`, the
    recipe's columns, and as `txt` the caption that the run would show. A bad sample is replaced as in a run, with a
    warning; its picture is decoded once to know. The workers of a DataLoader take whole batches in turn, so the order
    is exact where a batch of the DataLoader is batch / world samples.

    Raises DataError where a source cannot be read, the batch does not fit the world, or too many samples are bad.
    """
    config, seed, mixtures = _settled(source, batch, seed)
    if step < 0 or (steps is not None and steps < 0):
        raise DataError(f"step = {step}, steps = {steps}: neither may be negative; begin at 0")
    found_rank, found_world, *_ = pytorch_worker_info()
    rank, world = found_rank if rank is None else rank, found_world if world is None else world
    if not 0 <= rank < world:
        raise DataError(f"rank = {rank} must be from 0 to world - 1 = {world - 1}")
    if config.batch % world:
        raise DataError(f"batch = {config.batch} must be a multiple of world = {world}")
    return FluidWrapper(_InOrder(config, seed, mixtures, rank, world, step, steps))


def _settled(
    source: Stream | DataConfig | str, batch: int | None, seed: int | None
) -> tuple[DataConfig, int, Sequence[Mixture]]:
    """The data, the seed of the order and the mixtures of what a caller gave."""
    if isinstance(source, str):
        if batch is None:
            raise DataError(
                f"{shown_url(source)}: give `batch`, the pairs of a global batch over all ranks, as in 1024"
            )
        source = DataConfig(train=(SourceConfig(source=source),), batch=batch)
    elif batch is not None:
        own = source if isinstance(source, DataConfig) else source.data
        if batch != own.batch:
            raise DataError(
                f"batch = {batch} is not that of the recipe, {own.batch}; the order depends on it, leave it out"
            )
    if isinstance(source, DataConfig):
        return source, seed or 0, ()
    return source.data, source.seed if seed is None else seed, source.mixtures()


class _InOrder(IterableDataset[dict[str, Any]]):
    """A rank's samples, raw, step after step."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        mixtures: Sequence[Mixture],
        rank: int,
        world: int,
        step: int,
        steps: int | None,
    ) -> None:
        super().__init__()
        self._arguments = (config, seed, mixtures, rank, world, step, steps)
        self._first, self._count = step, steps
        self._loader = Loader(config, _ANY, _ANY, seed, rank, world, mixtures)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # to a DataLoader's worker that is not forked: it opens the sources itself

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self._count_bad([entry for source in self._loader.sources for entry in source.left_out])
        for number in count() if self._count is None else range(self._count):
            if number % workers == worker:
                yield from self._samples(self._first + number)

    def _samples(self, step: int) -> Iterator[dict[str, Any]]:
        for record, caption, bad in self._loader.records(step):
            self._count_bad(bad)
            yield {"__key__": record.key, "__url__": record.shard, **record.fields, "txt": caption.encode("utf-8")}

    def _count_bad(self, entries: Sequence[LedgerEntry]) -> None:
        """Warns of bad samples, and counts those that this process met. DataError if they are too many."""
        for entry in entries:
            _LOG.warning("bad sample: key %s in %s: %s", shown(entry.key), shown_url(entry.shard), entry.reason)
        if entries:
            self._loader.check_bad(entries)
