"""Decoding processes: build a rank's batches while the training process trains.

Why not torch's DataLoader or torchdata's StatefulDataLoader: neither names the sample that killed or hung a process,
both pass pictures through named shared memory (/dev/shm), and both give each process whole batches, so that a small
batch keeps only some processes busy.

The one idea: anonymous memory shared since the fork. Pictures are written into it and used in place, so that only small
messages go through the pipes; and each process records in it which sample it is processing, so that the sample is named
when a process dies or hangs. As the memory is anonymous, /dev/shm does not fill up, nothing is left behind, and two
runs cannot interfere. It uses no locks: a worker that dies cannot block another. Messages are pickled, but only between
these processes, through anonymous pipes made before the fork: nothing from a file, a store or a user is unpickled.

A batch is split into parts. Each goes to the least busy process; parts return in any order, batches in sequence.
"""

from __future__ import annotations

import copyreg
import gc
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from ..errors import DataError
from ..order import Places
from ..samples.sample import Batch

_MIN_PART, _MAX_PART = 8, 32  # samples in one part
_AHEAD = 2  # batches in progress after the one being waited for; more if they are small
_MAX_HELD = 2  # batches that training may hold in the shared memory: the current one and the next
_MAX_QUEUED_BYTES = 1 << 15  # bytes queued in a worker's pipe; below the pipe's capacity, so that sending never blocks
_POLL_SECONDS = 1.0  # seconds between checks of workers that do not answer
_MOST_SLOW = 10  # samples that may take too long before it is no longer the samples' fault
_EXIT_SECONDS = 2.0  # seconds that workers have to exit before they are killed


class Note:
    """The sample that a process is working on, readable by other processes."""

    _FORM = struct.Struct("4q")  # position, source, number, start time in ns (0: no sample)
    size = _FORM.size

    def __init__(self, memory: bytearray | mmap.mmap | None = None, offset: int = 0) -> None:
        self._memory, self._offset = bytearray(self.size) if memory is None else memory, offset

    def write(self, position: int, source: int, number: int) -> None:
        """Records sample `number` of source `source`, for a position of the stream. Takes half a microsecond."""
        self._FORM.pack_into(self._memory, self._offset, position, source, number, time.monotonic_ns())

    def clear(self) -> None:
        """Records that no sample is being processed."""
        self._FORM.pack_into(self._memory, self._offset, 0, 0, 0, 0)

    def read(self) -> tuple[tuple[int, int, int] | None, float]:
        """Position, source and number (None: no sample), and for how many seconds."""
        *place, since = self._FORM.unpack_from(self._memory, self._offset)
        if not since:
            return None, 0.0
        return (place[0], place[1], place[2]), (time.monotonic_ns() - since) / 1e9


SlowSamples = frozenset[tuple[int, int]]  # source and number of samples that took too long
MakeBatch = Callable[[Places, Note, SlowSamples], Batch]  # raises DataError
Describe = Callable[[int, int, int], str]  # describes the sample of a note for an error


@dataclass
class _PendingBatch:
    """A batch in progress: None for parts that have not arrived."""

    slot: int
    parts: list[Batch | DataError | None]


@dataclass
class _Part:
    batch: _PendingBatch
    index: int
    start: int
    places: Places


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    note: Note
    assigned: deque[tuple[_Part, int]] = field(
        default_factory=deque
    )  # in the order sent, with the message size in bytes

    @property
    def samples(self) -> int:
        return sum(len(part.places) for part, _ in self.assigned)

    @property
    def sent(self) -> int:
        return sum(size for _, size in self.assigned)


class Workers:
    """`count` processes that build batches of `batch` pictures of `resolution` x `resolution` pixels."""

    def __init__(
        self,
        make_batch: MakeBatch,
        places: Iterator[Places],
        describe: Describe,
        count: int,
        batch: int,
        resolution: int,
        timeout: float,
    ) -> None:
        """`places` yields the places of each batch, without end; `describe` describes a sample for an error; `timeout`
        is the number of seconds a process may spend on one sample, which then counts as a bad one."""
        self._places, self._describe, self._timeout = places, describe, timeout
        self._part = min(max(batch // count, _MIN_PART), _MAX_PART, batch)
        self._ahead = max(_AHEAD, -(-2 * count * self._part // batch))
        slots = self._ahead + 1 + _MAX_HELD
        shape = (slots, batch, resolution, resolution, 3)
        memory = mmap.mmap(-1, slots * batch * resolution * resolution * 3)
        self._slots = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
        self._free, self._held = list(range(slots)), 0
        self._pending: deque[_PendingBatch] = deque()
        self._unassigned: deque[_Part] = deque()  # parts not yet sent to a worker
        self._workers: list[_Worker] = []
        self._make_batch, self._slow = make_batch, SlowSamples()
        notes = mmap.mmap(-1, count * Note.size)
        try:
            for number in range(count):
                self._workers.append(self._start_worker(Note(notes, number * Note.size)))
        except BaseException:
            self.close()
            raise

    def _start_worker(self, note: Note) -> _Worker:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        others = [ours, *(worker.pipe for worker in self._workers)]
        process = context.Process(
            target=_worker_main,
            args=(self._make_batch, self._slots, note, theirs, others, os.getpid()),
            name="decoding",
            daemon=True,
        )
        process.start()
        theirs.close()  # so that our end reports EOF when the process ends
        return _Worker(process, ours, note)

    def batches(self) -> Generator[Batch, None, None]:
        """The batches in order. Raises DataError if building one does, or if a process dies or hangs."""
        while True:
            self._start_batches()
            self._assign_parts()
            if None in self._pending[0].parts:
                self._receive()
            else:
                yield self._assemble(self._pending.popleft())

    def close(self) -> None:
        """End the processes; those that do not exit in time are killed."""
        for worker in self._workers:
            worker.pipe.close()
        end = time.monotonic() + _EXIT_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _start_batches(self) -> None:
        """Start batches while there are free slots."""
        while len(self._pending) <= self._ahead and self._free:
            places = next(self._places)
            starts = range(0, len(places), self._part)
            batch = _PendingBatch(self._free.pop(), [None] * len(starts))
            self._pending.append(batch)
            self._unassigned += [_Part(batch, i, at, places[at : at + self._part]) for i, at in enumerate(starts)]

    def _assign_parts(self) -> None:
        """Send parts to the least busy worker, without ever blocking on a full pipe."""
        while self._unassigned:
            part = self._unassigned[0]
            worker = min(self._workers, key=lambda worker: worker.samples)
            message = pickle.dumps((part.batch.slot, part.start, part.places, self._slow))
            if worker.assigned and worker.sent + len(message) > _MAX_QUEUED_BYTES:
                return
            try:
                worker.pipe.send_bytes(message)
            except OSError:
                raise self._death_error(worker) from None
            worker.assigned.append((self._unassigned.popleft(), len(message)))

    def _receive(self) -> None:
        """Wait for finished parts."""
        busy = {worker.pipe: worker for worker in self._workers if worker.assigned}
        ready = wait(list(busy), _POLL_SECONDS)
        for pipe in ready:
            worker = busy[pipe]  # type: ignore[index]
            try:
                answer = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, OSError):
                raise self._death_error(worker) from None
            if isinstance(answer, str):
                raise RuntimeError(f"a decoding process failed:\n{answer}")
            part, _ = worker.assigned.popleft()
            part.batch.parts[part.index] = answer
        if not ready:
            self._check_timeout()

    def _check_timeout(self) -> None:
        """Replaces a worker that has spent too long on a sample; its parts are built again without the sample."""
        for worker in self._workers:
            place, seconds = worker.note.read()
            if place and seconds > self._timeout:
                worker.process.kill()
                if len(self._slow) >= _MOST_SLOW:
                    raise DataError(
                        f"a decoding process hangs: it has spent {seconds:.0f} seconds on {self._describe(*place)}, "
                        f"after {_MOST_SLOW} other samples that took as long; check the disk or store of the shards, "
                        f"or raise data.decode_timeout = {self._timeout:g}"
                    )
                self._slow |= {place[1:]}
                self._replace(worker)
                return

    def _replace(self, worker: _Worker) -> None:
        """Starts another process in place of a killed one, whose parts wait to be assigned again."""
        worker.process.join(_EXIT_SECONDS)
        worker.pipe.close()
        worker.note.clear()
        self._unassigned.extendleft(part for part, _ in reversed(worker.assigned))
        self._workers.remove(worker)
        self._workers.append(self._start_worker(worker.note))

    def _death_error(self, worker: _Worker) -> DataError:
        worker.process.join(_EXIT_SECONDS)
        code = worker.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        place, _ = worker.note.read()
        return DataError(
            f"a decoding process died ({how}) at {self._describe(*place) if place else 'no sample'}; if memory "
            f"ran out, lower data.workers; `data.workers=0` shows the error in the training process"
        )

    def _assemble(self, batch: _PendingBatch) -> Batch:
        """The batch from its parts. Its pictures stay in the shared memory, or are copied if training holds too many
        slots."""
        import torch

        for part in batch.parts:
            if isinstance(part, DataError):
                raise part
        if self._held < _MAX_HELD:
            pixels = self._slots[batch.slot][:]
            self._held += 1
            weakref.finalize(pixels, self._release_slot, batch.slot).atexit = False
        else:
            pixels = self._slots[batch.slot].copy()
            self._free.append(batch.slot)
        whole: Batch = _concatenate(batch.parts)
        return replace(whole, images=torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def _release_slot(self, slot: int) -> None:
        self._held -= 1
        self._free.append(slot)


def _concatenate(parts: Sequence[Any]) -> Any:
    """Concatenates the parts of a batch, field by field."""
    import torch

    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(first, tuple):
        return tuple(value for part in parts for value in part)
    if isinstance(first, dict):
        return {key: _concatenate([part[key] for part in parts]) for key in first}
    assert is_dataclass(first)
    assert not isinstance(first, type)
    return replace(first, **{f.name: _concatenate([getattr(part, f.name) for part in parts]) for f in fields(first)})


def _worker_main(
    make_batch: MakeBatch, slots: np.ndarray, note: Note, pipe: Connection, others: Sequence[Connection], parent: int
) -> None:
    """A worker's main loop, until its pipe is closed or its parent is gone."""
    import torch

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # the parent handles them
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    gc.freeze()  # objects from before the fork are not traversed, so their pages stay shared
    with suppress(EOFError, OSError):  # the other end was closed
        while True:
            while not pipe.poll(5):
                if os.getppid() != parent:
                    return
            slot, start, places, slow = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(_run_part(make_batch, slots[slot, start : start + len(places)], places, note, slow))


def _run_part(make_batch: MakeBatch, slot_part: np.ndarray, places: Places, note: Note, slow: SlowSamples) -> bytes:
    """The pickled batch of some places, its pictures written into `slot_part`; or the pickled error."""
    try:
        batch = make_batch(places, note, slow)
        slot_part[...] = batch.images.permute(0, 2, 3, 1).numpy()
        return _pickled(replace(batch, images=batch.images[:0]))
    except DataError as error:
        return pickle.dumps(error)
    except Exception:
        return pickle.dumps(traceback.format_exc())
    finally:
        note.clear()


def _pickled(batch: Batch) -> bytes:
    """Pickles tensors as numpy arrays: torch's pickling is slow for small tensors."""
    import torch

    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: lambda tensor: (_tensor, (tensor.numpy(),))}
    pickler.dump(batch)
    return file.getvalue()


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)
