"""Embeddings that are kept: a commit and a data set that do not change are embedded once.

What is kept lies in the cache folder under a hash of what it was made from: the commit, the data with their sizes and
times, and how they were read. Nothing else is believed, and a file that cannot be read is made again.
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

_FORMAT = 1
_FIELD = "treering"

Content = tuple[dict[str, Tensor], Any]
"""tensors, and what else belongs to them as JSON"""


class Kept:
    """What was made with one model; the model is named by `commit`, the URL of a commit and its checksum."""

    def __init__(self, commit: str, world: World) -> None:
        self.commit, self.world = commit, world

    def fetch(self, made_from: object, make: Callable[[], Content]) -> Content:
        """What was made from `made_from`, now (by all ranks) or before (if all of them find it)."""
        text = json.dumps([_FORMAT, self.commit, made_from], sort_keys=True)
        path = cache_folder("embeddings") / f"{sha256(text.encode()).hexdigest()}.safetensors"
        found = _read(path)
        if all(self.world.objects(found is not None)) and found is not None:
            return found
        tensors, rest = make()
        if self.world.is_first:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_cache_file(path, save(contiguous, {_FIELD: json.dumps(rest)}))
        self.world.barrier()  # the next that looks for it finds it, or none does
        return tensors, rest


def _read(path: Path) -> Content | None:
    try:
        with safe_open(path, "pt") as file:
            rest = json.loads((file.metadata() or {})[_FIELD])
            return {name: file.get_tensor(name) for name in file.keys()}, rest  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
