"""Reading ahead: a process that fetches into the node's cache (blocks.py) what a rank is about to decode.

Why not a read-ahead cache of fsspec: it fetches what follows in the file, and what comes next here follows in the order
of samples.

What comes next is known for ever, because the order is a function (order.py): the process walks along it in front of
the training, and stops where it is some bytes or steps ahead. Nothing depends on it. A block that it has not brought in
time is fetched by whoever needs it, and an error that it meets is met again there, and told there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import DataError
from ..order import Order
from ..shards.source import Source
from ..storage.block_cache import BlockCache, CachedBlock

_REQUESTS = 8  # at a time
_MOST_BYTES = 512 << 20  # fetched and not yet reached by the training
_MOST_OF_CACHE = 8  # and at most this part of the cache, which must not evict what is in use
_MOST_STEPS = 512
_PAUSE = 0.05  # seconds


class Ahead:
    """Fetches the blocks of rank `rank`'s share of global batches `step`, `step` + 1, ... in a process of its own."""

    def __init__(
        self, order: Order, sources: Sequence[Source], cache: BlockCache, rank: int, world: int, step: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._reached: Any = context.RawValue(ctypes.c_int64, step)
        self._process = context.Process(
            target=_in_background,
            args=(_Walk(order, sources, cache, rank, world), self._reached, os.getpid()),
            name="reading ahead",
            daemon=True,
        )
        self._process.start()

    def reached(self, step: int) -> None:
        """Global batch `step` is about to be trained on."""
        self._reached.value = step

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


class _Walk:
    """What lies in front of a rank, batch by batch."""

    def __init__(self, order: Order, sources: Sequence[Source], cache: BlockCache, rank: int, world: int) -> None:
        self._order, self._sources, self._cache = order, sources, cache
        self._rank, self._world = rank, world
        self.most_bytes = min(_MOST_BYTES, cache.limit // _MOST_OF_CACHE)

    def blocks(self, step: int) -> list[CachedBlock]:
        """The blocks that the rank reads of global batch `step`, each once."""
        found: dict[CachedBlock, None] = {}
        for place in self._order.places(step, self._rank, self._world):
            source = self._sources[place.source]
            if source.is_cached:
                found |= dict.fromkeys(self._cache.blocks(*source.span(place.number)))
        return list(found)

    def fetch(self, block: CachedBlock) -> int:
        """Bytes fetched for a block."""
        try:
            return self._cache.fetch(block)
        except DataError:  # whoever decodes it will say so
            time.sleep(_PAUSE)
            return 0


def _in_background(walk: _Walk, reached: Any, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the run's handlers, inherited, are its business
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    step = reached.value
    fetched: deque[tuple[int, int]] = deque()  # step, bytes
    with ThreadPoolExecutor(_REQUESTS) as pool:
        while True:
            while fetched and fetched[0][0] <= reached.value:
                fetched.popleft()
            if step - reached.value >= _MOST_STEPS or sum(size for _, size in fetched) >= walk.most_bytes:
                time.sleep(_PAUSE)
                continue
            step = max(step, reached.value)
            fetched.append((step, sum(pool.map(walk.fetch, walk.blocks(step)))))
            step += 1


def _end_with(parent: int) -> None:
    """A killed parent cannot end its children."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
