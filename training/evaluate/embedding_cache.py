"""A cache of embeddings on disk: a commit and a data set that do not change are embedded once.

A file in the cache folder is named by a hash of its inputs: the commit, the data (the content of shards, the versions
of files), and the way they are read. A file that cannot be read is recomputed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...data.shards.table_file import write_cache_file
from ...data.storage.files import cache_folder
from ..world import World

_FORMAT = 2
_FIELD = "treering"

Content = tuple[dict[str, Tensor], Any]
"""tensors, and other data that belong to them as JSON"""


class EmbeddingCache:
    """The cached results of one model, identified by `commit`: the URL of a commit and its checksum."""

    def __init__(self, commit: str, world: World) -> None:
        self.commit, self.world = commit, world

    def fetch(self, made_from: object, make: Callable[[], Content]) -> Content:
        """The result for the inputs `made_from`: from the cache if all ranks find it, else computed by all ranks."""
        text = json.dumps([_FORMAT, self.commit, made_from], sort_keys=True)
        path = cache_folder("embeddings") / f"{sha256(text.encode()).hexdigest()}.safetensors"
        found = _read(path)
        if all(self.world.objects(found is not None)) and found is not None:
            return found
        tensors, rest = make()
        if self.world.is_first:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_cache_file(path, save(contiguous, {_FIELD: json.dumps(rest)}))
        self.world.barrier()  # a later look-up finds it on all ranks or on none
        return tensors, rest


def _read(path: Path) -> Content | None:
    try:
        with safe_open(path, "pt") as file:
            rest = json.loads((file.metadata() or {})[_FIELD])
            return {name: file.get_tensor(name) for name in file.keys()}, rest  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
