"""The exact order for other training loops: a run's stream of samples as a WebDataset pipeline.

WebDataset shuffles shards and a buffer, so its order depends on the number of processes and cannot be resumed in
mid-epoch. Here the order is that of order.py: a function of seed, step and rank. The samples are in WebDataset's form,
dicts of raw bytes by kind, so that its `decode`, `map`, `to_tuple` and `batched` can follow.
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
_UNUSED = 1  # resolution and context of a loader whose samples are delivered raw


class Stream(Protocol):
    """The fields of a recipe that are used here."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def seed(self) -> int: ...

    def mixtures(self) -> list[Mixture]:
        """The weights of the sources, each with the step at which they start."""
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
    """The samples of a recipe, a `data:` block or a source's URL as a WebDataset pipeline, in the order of a run.

    batch: pairs in a global batch, over all ranks; required for a URL, otherwise the recipe's.
    seed: seed of the order; default: the recipe's, or 0.
    step, steps: the first global batch, and the number of them (None: without end).
    rank, world: default: those of torch.distributed or of the environment (RANK, WORLD_SIZE).

    A sample has `__key__`, `__url__` (its shard) and the raw bytes of its members by kind: the picture, `json`, the
    recipe's columns, and as `txt` the caption that the run would use. A bad sample is replaced as in a run, with a
    warning; every picture is decoded once to detect bad ones. The workers of a DataLoader take whole batches in turn,
    so the order is exact if a batch of the DataLoader has batch / world samples.

    Raises DataError if a source cannot be read, batch is not a multiple of world, or too many samples are bad.
    """
    config, seed, mixtures = _resolve(source, batch, seed)
    if step < 0 or (steps is not None and steps < 0):
        raise DataError(f"step = {step}, steps = {steps}: neither may be negative; start at 0")
    found_rank, found_world, *_ = pytorch_worker_info()
    rank, world = found_rank if rank is None else rank, found_world if world is None else world
    if not 0 <= rank < world:
        raise DataError(f"rank = {rank} must be from 0 to world - 1 = {world - 1}")
    if config.batch % world:
        raise DataError(f"batch = {config.batch} must be a multiple of world = {world}")
    return FluidWrapper(_OrderedSamples(config, seed, mixtures, rank, world, step, steps))


def _resolve(
    source: Stream | DataConfig | str, batch: int | None, seed: int | None
) -> tuple[DataConfig, int, Sequence[Mixture]]:
    """The data config, the seed of the order and the mixtures for the arguments of `as_webdataset`."""
    if isinstance(source, str):
        if batch is None:
            raise DataError(
                f"{shown_url(source)}: pass `batch`, the number of pairs in a global batch over all ranks, such as 1024"
            )
        source = DataConfig(train=(SourceConfig(source=source),), batch=batch)
    elif batch is not None:
        own = source if isinstance(source, DataConfig) else source.data
        if batch != own.batch:
            raise DataError(
                f"batch = {batch} differs from the recipe's data.batch = {own.batch}, which fixes the order; omit it"
            )
    if isinstance(source, DataConfig):
        return source, seed or 0, ()
    return source.data, source.seed if seed is None else seed, source.mixtures()


class _OrderedSamples(IterableDataset[dict[str, Any]]):
    """A rank's raw samples, step after step."""

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
        self._loader = Loader(config, _UNUSED, _UNUSED, seed, rank, world, mixtures)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # for DataLoader workers that are not forked: they open the sources again

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self._report_bad([entry for source in self._loader.sources for entry in source.skipped])
        for number in count() if self._count is None else range(self._count):
            if number % workers == worker:
                yield from self._samples(self._first + number)

    def _samples(self, step: int) -> Iterator[dict[str, Any]]:
        for record, caption, bad in self._loader.records(step):
            self._report_bad(bad)
            yield {"__key__": record.key, "__url__": record.shard, **record.fields, "txt": caption.encode("utf-8")}

    def _report_bad(self, entries: Sequence[LedgerEntry]) -> None:
        """Warns of bad samples and counts those found by this process. Raises DataError if there are too many."""
        for entry in entries:
            _LOG.warning("bad sample: key %s in %s: %s", shown(entry.key), shown_url(entry.shard), entry.reason)
        if entries:
            self._loader.check_bad(entries)
