"""Going through every shard or sample of a source in several processes: what index, lint and inspect share.

Work is handed to the processes by forking, so that a source's index is never copied; only results travel back. They
come in the order of the work, whatever process was first.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ..errors import DataError
from ..storage.files import Reader, ShardInfo, read_range
from .listing import ShardIndex, index_shard

T = TypeVar("T")
R = TypeVar("R")
Told = Callable[[int, int], None]
"""told(done, total), after each piece of work"""

_TOGETHER = 32  # samples a process is handed at a time
_AT_A_STORE = 16  # processes at least, where each waits for a store most of the time
_AHEAD = 8  # pieces of work in hand, for each process: results wait in memory for the first of them
_work: Callable[[Any], Any]


def silent(done: int, total: int) -> None:
    """Tells nobody."""


def enough_workers(url: str) -> int:
    """Processes that keep this machine, or the store behind `url`, busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = "://" not in url or url.startswith(("samples://", "file://"))
    return cores if local else max(cores, _AT_A_STORE)


def sweep(work: Callable[[T], R], items: Sequence[T], workers: int, told: Told = silent) -> Iterator[R]:
    """work(item) for every item, in their order, by `workers` processes (1: in this one).

    Results must be picklable. DataError if a process dies.
    """
    assert workers > 0
    if min(workers, len(items)) < 2:
        for done, item in enumerate(items, 1):
            result = work(item)
            told(done, len(items))
            yield result
        return
    pool = ProcessPoolExecutor(
        min(workers, len(items)), multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,)
    )
    try:
        for done, result in enumerate(_in_order(pool, items, _AHEAD * workers), 1):
            told(done, len(items))
            yield result
    except BrokenProcessPool:
        raise DataError(
            "one of the processes that read the shards died; if memory ran out, give fewer with --workers; "
            "--workers 1 shows the fault in line"
        ) from None
    except KeyboardInterrupt:  # a person waits; whatever is written anywhere is whole or not there
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, items: Iterable[T], most: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(_one, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def sweep_samples(work: Callable[[int], R], numbers: Sequence[int], workers: int, told: Told = silent) -> Iterator[R]:
    """work(number) for the samples `numbers`, in their order; `told` hears of samples."""
    parts = [numbers[i : i + _TOGETHER] for i in range(0, len(numbers), _TOGETHER)]

    def several(part: Sequence[int]) -> list[R]:
        return [work(number) for number in part]

    def told_samples(done: int, total: int) -> None:
        told(min(done * _TOGETHER, len(numbers)), len(numbers))

    for results in sweep(several, parts, workers, told_samples):
        yield from results


def index_all(
    shards: Sequence[ShardInfo], workers: int, told: Told = silent, read: Reader = read_range
) -> Iterator[tuple[ShardInfo, ShardIndex | DataError]]:
    """Each shard with its index, from the cache or made now, or with what is wrong with it.

    Every index is in the cache folder as soon as it is made: cut off, the next call goes on where this one was.
    """

    def indexed(shard: ShardInfo) -> ShardIndex | DataError:
        try:
            return index_shard(shard, read)
        except DataError as error:
            return error

    return zip(shards, sweep(indexed, shards, workers, told), strict=True)


def _begin(work: Callable[[Any], Any]) -> None:
    """In each process: what to do, whose signals to leave alone, and not to outlive the parent."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _one(item: Any) -> Any:
    return _work(item)
