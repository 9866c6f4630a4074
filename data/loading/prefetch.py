"""Prefetching: a process that fetches the blocks a rank is about to decode into the node's cache (block_cache.py).

Why not fsspec's read-ahead cache: it fetches what follows in the file, while the next samples here follow the order of
samples.

All future reads are known because the order is a function (order.py): the process runs through it ahead of training and
pauses when it is a certain number of bytes or steps ahead. It only saves time. A block that is not there in time is
fetched by the process that needs it, and a read error shows up again there and is reported there.
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

_CONCURRENT_REQUESTS = 8
_MAX_BYTES = 512 << 20  # fetched and not yet reached by training
_CACHE_DIVISOR = 8  # prefetch at most 1/8 of the cache, so that it does not evict blocks in use
_MAX_STEPS = 512
_POLL_SECONDS = 0.05  # seconds


class Prefetcher:
    """Fetches the blocks of rank `rank`'s part of global batches `step`, `step` + 1, ... in a separate process."""

    def __init__(
        self, order: Order, sources: Sequence[Source], cache: BlockCache, rank: int, world: int, step: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._reached: Any = context.RawValue(ctypes.c_int64, step)
        self._process = context.Process(
            target=_run,
            args=(_UpcomingBlocks(order, sources, cache, rank, world), self._reached, os.getpid()),
            name="reading ahead",
            daemon=True,
        )
        self._process.start()

    def reached(self, step: int) -> None:
        """Report that global batch `step` is about to be trained on."""
        self._reached.value = step

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


class _UpcomingBlocks:
    """The blocks that a rank will read, batch by batch."""

    def __init__(self, order: Order, sources: Sequence[Source], cache: BlockCache, rank: int, world: int) -> None:
        self._order, self._sources, self._cache = order, sources, cache
        self._rank, self._world = rank, world
        self.max_bytes = min(_MAX_BYTES, cache.limit // _CACHE_DIVISOR)

    def blocks(self, step: int) -> list[CachedBlock]:
        """The blocks that the rank reads for global batch `step`, without duplicates."""
        found: dict[CachedBlock, None] = {}
        for place in self._order.places(step, self._rank, self._world):
            source = self._sources[place.source]
            if source.is_cached:
                found |= dict.fromkeys(self._cache.blocks(*source.span(place.number)))
        return list(found)

    def fetch(self, block: CachedBlock) -> int:
        """Fetches a block and returns the bytes transferred (0 if it is cached or cannot be read)."""
        try:
            return self._cache.fetch(block)
        except DataError:  # the decoding process meets the same error and reports it
            time.sleep(_POLL_SECONDS)
            return 0


def _run(upcoming: _UpcomingBlocks, reached: Any, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the training process handles them; drop the inherited handlers
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    step = reached.value
    fetched: deque[tuple[int, int]] = deque()  # step, bytes
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        while True:
            while fetched and fetched[0][0] <= reached.value:
                fetched.popleft()
            if step - reached.value >= _MAX_STEPS or sum(size for _, size in fetched) >= upcoming.max_bytes:
                time.sleep(_POLL_SECONDS)
                continue
            step = max(step, reached.value)
            fetched.append((step, sum(pool.map(upcoming.fetch, upcoming.blocks(step)))))
            step += 1


def _exit_with_parent(parent: int) -> None:
    """Exits when the parent is gone: a killed parent cannot end its children."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
