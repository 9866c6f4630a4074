"""Parallel maps over the shards or samples of a source, used by index, lint, inspect and pack.

The work function and the source reach the worker processes by forking, so that a source's index is never copied; only
results are sent back. They are yielded in the order of the items, whichever process finishes first.
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
from ..machine import usable_cores
from ..storage.files import Reader, ShardInfo, read_range
from .listing import ShardIndex, index_shard

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]
"""progress(done, total), called after each item"""

_SAMPLES_PER_TASK = 32  # samples per task
_REMOTE_WORKERS = 16  # minimum processes for remote shards, which mostly wait for the store
_TASKS_IN_FLIGHT = 8  # tasks in flight per process; bounds the results held in memory to keep the order
_work: Callable[[Any], Any]


def silent(done: int, total: int) -> None:
    """No-op progress callback."""


def enough_workers(url: str) -> int:
    """The number of processes that keep this machine, or the store behind `url`, busy."""
    cores = usable_cores()
    local = "://" not in url or url.startswith(("samples://", "file://"))
    return cores if local else max(cores, _REMOTE_WORKERS)


def sweep(work: Callable[[T], R], items: Sequence[T], workers: int, progress: Progress = silent) -> Iterator[R]:
    """work(item) for every item, in order, by `workers` processes (1: in this process).

    Results must be picklable. DataError if a process dies.
    """
    assert workers > 0
    if min(workers, len(items)) < 2:
        for done, item in enumerate(items, 1):
            result = work(item)
            progress(done, len(items))
            yield result
        return
    pool = ProcessPoolExecutor(
        min(workers, len(items)), multiprocessing.get_context("fork"), initializer=_init_worker, initargs=(work,)
    )
    try:
        for done, result in enumerate(_in_order(pool, items, _TASKS_IN_FLIGHT * workers), 1):
            progress(done, len(items))
            yield result
    except BrokenProcessPool:
        raise DataError(
            "one of the processes that read the shards died; if memory ran out, use fewer --workers; "
            "--workers 1 shows the error in the main process"
        ) from None
    except KeyboardInterrupt:  # stop at once: every file is written atomically, so nothing is left half-written
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, items: Iterable[T], most: int) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(_run_work, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def sweep_samples(
    work: Callable[[int], R], numbers: Sequence[int], workers: int, progress: Progress = silent
) -> Iterator[R]:
    """work(number) for the samples `numbers`, in order; `progress` counts samples."""
    parts = [numbers[i : i + _SAMPLES_PER_TASK] for i in range(0, len(numbers), _SAMPLES_PER_TASK)]

    def several(part: Sequence[int]) -> list[R]:
        return [work(number) for number in part]

    def report_samples(done: int, total: int) -> None:
        progress(min(done * _SAMPLES_PER_TASK, len(numbers)), len(numbers))

    for results in sweep(several, parts, workers, report_samples):
        yield from results


def index_all(
    shards: Sequence[ShardInfo], workers: int, progress: Progress = silent, read: Reader = read_range
) -> Iterator[tuple[ShardInfo, ShardIndex | DataError]]:
    """Each shard with its index, from the cache or created now, or with the error.

    Every index is cached as soon as it is complete: after an interruption the next call continues from there.
    """

    def indexed(shard: ShardInfo) -> ShardIndex | DataError:
        try:
            return index_shard(shard, read)
        except DataError as error:
            return error

    return zip(shards, sweep(indexed, shards, workers, progress), strict=True)


def _init_worker(work: Callable[[Any], Any]) -> None:
    """Initialises a worker: sets its work, leaves Ctrl-C to the parent, and ends with the parent."""
    global _work
    _work = work
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_work(item: Any) -> Any:
    return _work(item)
