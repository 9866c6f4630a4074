"""The data stream: tar shards of pictures and captions, delivered as batches in an exact order.

The path of a sample: bytes of a shard -> `Record` -> `Sample` (with random draws that depend on its position) ->
`Batch`, in the order that `order` computes. Each folder is one step:

- `storage`: reading and writing bytes anywhere fsspec reaches
- `shards`: the shards of a source and their indexes
- `samples`: decoding one sample
- `loading`: batches, built by worker processes
- `tools`: packing, checking and inspecting shards
- `builtin`: data sets that come with the package

`ledger` records unusable samples; `evaluation_sets` reads evaluation sets that are not shards of pairs.
Names are imported on first use, so that checking a recipe does not import decoders.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AugmentConfig as AugmentConfig
    from .config import CacheConfig as CacheConfig
    from .config import DataConfig as DataConfig
    from .config import SourceConfig as SourceConfig
    from .errors import DataError as DataError
    from .ledger import LedgerEntry as LedgerEntry
    from .loading.loader import EvaluationSet as EvaluationSet
    from .loading.loader import Loader as Loader
    from .loading.webdataset import as_webdataset as as_webdataset
    from .order import Order as Order
    from .order import stream as stream
    from .samples.clip_tokenizer import Tokenizer as Tokenizer
    from .samples.sample import Batch as Batch
    from .samples.sample import Sample as Sample
    from .shards.record import Record as Record
    from .shards.source import Source as Source
    from .shards.source import held_out as held_out
    from .shards.source import open_source as open_source

_MODULES = {
    "config": ("AugmentConfig", "CacheConfig", "DataConfig", "SourceConfig"),
    "errors": ("DataError",),
    "ledger": ("LedgerEntry",),
    "loading.loader": ("EvaluationSet", "Loader"),
    "order": ("Order", "stream"),
    "loading.webdataset": ("as_webdataset",),
    "samples.clip_tokenizer": ("Tokenizer",),
    "samples.sample": ("Batch", "Sample"),
    "shards.record": ("Record",),
    "shards.source": ("Source", "held_out", "open_source"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
