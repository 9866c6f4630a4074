"""What is streamed: tar shards of pictures and captions, as batches in an exact order.

The way of a sample: `source` -> `Record` -> `decode`, `text`, by the `draws` of its position -> `Sample` -> `loader`,
in the order of `order`, in the processes of `workers` -> `Batch`; what a sample may carry beside its picture is in
`captions`, `boxes` and `vectors`. Under a source: `opening` finds out about its shards and what its `filter` accepts,
`shards` walks them (`tar`, `unpack`) and makes an `index` each with the `metadata`, kept in `tables`; `summary` sums
them up, `beside` is where they lie. `files` reads bytes; `retries`, `blocks` and `ahead` stand between it and a store.
`ledger` records what could not be used. Names are imported on first use: a recipe is checked without waiting for
decoders.

`pictures` reads sets to evaluate on that are no shards of pairs: folders of classes, tables, shards with classes.

`webdataset` hands the same stream to other training loops. `pack` makes shards, `emoji` is the built-in data set.
`lint` and `inspect` look into a source before a run does, in parallel (`sweep`); `sheet` is the page of samples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AugmentConfig as AugmentConfig
    from .config import CacheConfig as CacheConfig
    from .config import DataConfig as DataConfig
    from .config import DataError as DataError
    from .config import SourceConfig as SourceConfig
    from .ledger import LedgerEntry as LedgerEntry
    from .loader import EvaluationSet as EvaluationSet
    from .loader import Loader as Loader
    from .order import Order as Order
    from .order import stream as stream
    from .record import Batch as Batch
    from .record import Record as Record
    from .record import Sample as Sample
    from .source import Source as Source
    from .source import held_out as held_out
    from .source import open_source as open_source
    from .text import Tokenizer as Tokenizer
    from .webdataset import as_webdataset as as_webdataset

_MODULES = {
    "config": ("AugmentConfig", "CacheConfig", "DataConfig", "DataError", "SourceConfig"),
    "ledger": ("LedgerEntry",),
    "loader": ("EvaluationSet", "Loader"),
    "order": ("Order", "stream"),
    "record": ("Batch", "Record", "Sample"),
    "source": ("Source", "held_out", "open_source"),
    "text": ("Tokenizer",),
    "webdataset": ("as_webdataset",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
