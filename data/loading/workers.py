"""Decoding processes: a rank's batches, made beside the process that trains.

Why not torch's DataLoader or torchdata's StatefulDataLoader: neither names the sample that killed or hung a process,
both pass pictures through named shared memory (/dev/shm), and both give a process whole batches, so that a small batch
keeps only some of them busy.

The one idea: memory that both sides have since the fork. Pictures are written into it and handed on where they lie, so
that what goes through the pipes is small; and each process notes in it which sample it is at, so that one that dies or
hangs is named together with its sample. The memory has no name: nothing fills /dev/shm, nothing is left behind, no two
runs can meet in it. There is no lock either, so that nobody's death holds up anybody.

A batch is cut into parts. Each goes to whoever has least to do; parts come back in any order, batches in theirs.
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

_LEAST_PART, _MOST_PART = 8, 32  # samples that a process gets at a time
_AHEAD = 2  # batches under way behind the one that is waited for, or more of them where they are small
_LENT = 2  # batches that the training may hold in our memory: the one at work and the one it asks for
_MOST_IN_PIPE = 1 << 15  # bytes that wait for a process; a pipe holds more, so that sending never blocks
_LOOK = 1.0  # seconds between looks at those that do not answer
_GRACE = 2.0  # seconds that processes are given to end by themselves


class Note:
    """Which sample a process is at, for others to read."""

    _FORM = struct.Struct("4q")  # position, source, number, since when in ns (0: at none)
    size = _FORM.size

    def __init__(self, memory: bytearray | mmap.mmap | None = None, offset: int = 0) -> None:
        self._memory, self._offset = bytearray(self.size) if memory is None else memory, offset

    def write(self, position: int, source: int, number: int) -> None:
        """Sample `number` of source `source`, for a position of the stream. Takes half a microsecond."""
        self._FORM.pack_into(self._memory, self._offset, position, source, number, time.monotonic_ns())

    def clear(self) -> None:
        """At none."""
        self._FORM.pack_into(self._memory, self._offset, 0, 0, 0, 0)

    def read(self) -> tuple[tuple[int, int, int] | None, float]:
        """Position, source and number, None if at none; and for how many seconds."""
        *place, since = self._FORM.unpack_from(self._memory, self._offset)
        if not since:
            return None, 0.0
        return (place[0], place[1], place[2]), (time.monotonic_ns() - since) / 1e9


Make = Callable[[Places, Note], Batch]  # raises DataError
Name = Callable[[int, int, int], str]  # what to call the sample of a note


@dataclass
class _UnderWay:
    """A batch some parts of which are not there yet."""

    slot: int
    parts: list[Batch | DataError | None]


@dataclass
class _Part:
    batch: _UnderWay
    index: int
    start: int
    places: Places


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    note: Note
    in_hand: deque[tuple[_Part, int]] = field(default_factory=deque)  # in the order sent, with the bytes of each

    @property
    def samples(self) -> int:
        return sum(len(part.places) for part, _ in self.in_hand)

    @property
    def sent(self) -> int:
        return sum(size for _, size in self.in_hand)


class Workers:
    """`count` processes that make batches of `batch` pictures of `resolution` x `resolution` pixels."""

    def __init__(
        self, make: Make, places: Iterator[Places], name: Name, count: int, batch: int, resolution: int, patience: float
    ) -> None:
        """`places` says, without end, what lies in each batch, `name` what a sample is called in an error. `patience`
        is how many seconds a process may be at one sample."""
        self._places, self._name, self._patience = places, name, patience
        self._part = min(max(batch // count, _LEAST_PART), _MOST_PART, batch)
        self._ahead = max(_AHEAD, -(-2 * count * self._part // batch))
        slots = self._ahead + 1 + _LENT
        shape = (slots, batch, resolution, resolution, 3)
        memory = mmap.mmap(-1, slots * batch * resolution * resolution * 3)
        self._slots = np.frombuffer(memory, dtype=np.uint8).reshape(shape)
        self._free, self._lent = list(range(slots)), 0
        self._under_way: deque[_UnderWay] = deque()
        self._waiting: deque[_Part] = deque()  # parts that nobody has yet
        self._workers: list[_Worker] = []
        notes = mmap.mmap(-1, count * Note.size)
        try:
            for number in range(count):
                self._workers.append(self._started(make, Note(notes, number * Note.size)))
        except BaseException:
            self.close()
            raise

    def _started(self, make: Make, note: Note) -> _Worker:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        others = [ours, *(worker.pipe for worker in self._workers)]
        process = context.Process(
            target=_work, args=(make, self._slots, note, theirs, others, os.getpid()), name="decoding", daemon=True
        )
        process.start()
        theirs.close()  # so that its end is closed when the process ends
        return _Worker(process, ours, note)

    def batches(self) -> Generator[Batch, None, None]:
        """The batches in order. Raises DataError where making one does, and if a process dies or hangs."""
        while True:
            self._begin()
            self._deal()
            if None in self._under_way[0].parts:
                self._receive()
            else:
                yield self._finished(self._under_way.popleft())

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.pipe.close()
        end = time.monotonic() + _GRACE
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _begin(self) -> None:
        """Batches get under way while there is room for them."""
        while len(self._under_way) <= self._ahead and self._free:
            places = next(self._places)
            starts = range(0, len(places), self._part)
            batch = _UnderWay(self._free.pop(), [None] * len(starts))
            self._under_way.append(batch)
            self._waiting += [_Part(batch, i, at, places[at : at + self._part]) for i, at in enumerate(starts)]

    def _deal(self) -> None:
        """Parts go to whoever has least to do."""
        while self._waiting:
            part = self._waiting[0]
            worker = min(self._workers, key=lambda worker: worker.samples)
            message = pickle.dumps((part.batch.slot, part.start, part.places))
            if worker.in_hand and worker.sent + len(message) > _MOST_IN_PIPE:
                return
            try:
                worker.pipe.send_bytes(message)
            except OSError:
                raise self._died(worker) from None
            worker.in_hand.append((self._waiting.popleft(), len(message)))

    def _receive(self) -> None:
        """Waits for parts."""
        busy = {worker.pipe: worker for worker in self._workers if worker.in_hand}
        ready = wait(list(busy), _LOOK)
        for pipe in ready:
            worker = busy[pipe]  # type: ignore[index]
            try:
                answer = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, OSError):
                raise self._died(worker) from None
            if isinstance(answer, str):
                raise RuntimeError(f"a decoding process failed:\n{answer}")
            part, _ = worker.in_hand.popleft()
            part.batch.parts[part.index] = answer
        if not ready:
            self._check_patience()

    def _check_patience(self) -> None:
        for worker in self._workers:
            place, seconds = worker.note.read()
            if place and seconds > self._patience:
                worker.process.kill()
                raise DataError(
                    f"a decoding process hangs: it has been for {seconds:.0f} seconds at {self._name(*place)}; "
                    f"leave the sample out, or raise data.decode_timeout = {self._patience:g}"
                )

    def _died(self, worker: _Worker) -> DataError:
        worker.process.join(_GRACE)
        code = worker.process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        place, _ = worker.note.read()
        return DataError(
            f"a decoding process died ({how}) at {self._name(*place) if place else 'no sample'}; if memory ran out, "
            f"lower data.workers; `data.workers=0` shows the fault in line"
        )

    def _finished(self, batch: _UnderWay) -> Batch:
        """The parts put together, and their pictures: where they lie, or copied if too much of that is held already."""
        import torch

        for part in batch.parts:
            if isinstance(part, DataError):
                raise part
        if self._lent < _LENT:
            pixels = self._slots[batch.slot][:]
            self._lent += 1
            weakref.finalize(pixels, self._returned, batch.slot).atexit = False
        else:
            pixels = self._slots[batch.slot].copy()
            self._free.append(batch.slot)
        whole: Batch = _joined(batch.parts)
        return replace(whole, images=torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def _returned(self, slot: int) -> None:
        self._lent -= 1
        self._free.append(slot)


def _joined(parts: Sequence[Any]) -> Any:
    """Parts of a batch, field by field, one behind the other."""
    import torch

    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts))
    if isinstance(first, tuple):
        return tuple(value for part in parts for value in part)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    assert is_dataclass(first)
    assert not isinstance(first, type)
    return replace(first, **{f.name: _joined([getattr(part, f.name) for part in parts]) for f in fields(first)})


def _work(
    make: Make, slots: np.ndarray, note: Note, pipe: Connection, others: Sequence[Connection], parent: int
) -> None:
    """What a process does until its pipe is closed or its parent is gone."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's signals are its parent's business
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    gc.freeze()  # what was there before the fork is not looked through, and so stays shared
    with suppress(EOFError, OSError):  # the other end was closed
        while True:
            while not pipe.poll(5):
                if os.getppid() != parent:
                    return
            slot, start, places = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(_answer(make, slots[slot, start : start + len(places)], places, note))


def _answer(make: Make, room: np.ndarray, places: Places, note: Note) -> bytes:
    """The batch of some places, its pictures laid into `room`; or what went wrong."""
    try:
        batch = make(places, note)
        room[...] = batch.images.permute(0, 2, 3, 1).numpy()
        return _pickled(replace(batch, images=batch.images[:0]))
    except DataError as error:
        return pickle.dumps(error)
    except Exception:
        return pickle.dumps(traceback.format_exc())
    finally:
        note.clear()


def _pickled(batch: Batch) -> bytes:
    """Tensors as arrays: torch's own way is slow for small ones."""
    import torch

    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: lambda tensor: (_tensor, (tensor.numpy(),))}
    pickler.dump(batch)
    return file.getvalue()


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)
