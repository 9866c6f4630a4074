"""The processes of a run: the rank of this one, and the few collectives that everything else uses.

A world of one needs no process group and every collective is the identity, so one process and many run the same code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.units import counted
from .state import TrainingError

T = TypeVar("T")
_LET_GLOO_FINISH = 0.2
"""seconds"""
_JOINING = timedelta(minutes=10)
"""for the processes of a run to find each other"""
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def backend(device: torch.device) -> str:
    """What a process group on `device` exchanges tensors by: those of a GPU by NCCL, those of the host by gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _wait_for(seconds: float, group: dist.ProcessGroup | None) -> None:
    """Let collectives of a group wait so long; torch has no public way to say it of a group that exists."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _own_gpu(local_rank: int) -> torch.device:
    """The GPU of this process among those of its machine. Raises TrainingError if there are too few."""
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise TrainingError(
            f"LOCAL_RANK {local_rank}, {counted(there, 'GPU')}: every process of a machine needs a GPU of its own; "
            f"start {there} with --processes, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def _output_to_stderr() -> Iterator[None]:
    """Keeps a command's standard output to its answer: gloo of torch 2.10 prints there that it is connected."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of a run."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    """the process group, if these are only some of the processes of the run"""
    patience: float = field(default=3600.0, compare=False)
    """seconds that a collective waits for the others"""

    @staticmethod
    def join(patience: float = 3600.0) -> World:
        """Join the process group that the launcher described in the environment (RANK, WORLD_SIZE, ...), if any.

        A collective for which others do not come within `patience` seconds fails. Raises TrainingError where this
        machine has no GPU for the process.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = _own_gpu(int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            with _output_to_stderr():
                dist.init_process_group(backend(device), rank=rank, world_size=size, timeout=_JOINING)
            _wait_for(patience, dist.group.WORLD)
        return World(rank, size, device, patience=patience)

    def part(self, rank: int, size: int, group: dist.ProcessGroup) -> World:
        """Some of these processes, which wait for each other as long as all of them do."""
        _wait_for(self.patience, group)  # a new group has torch's own patience
        return World(rank, size, self.device, group, self.patience)

    def leave(self) -> None:
        """Leave the process group; nothing that holds it (an engine) may still exist.

        gloo's threads need Python's lock to release the tensors of the last collective, and its destructor waits for
        them while holding that lock: a deadlock seen in one exit of ten. A pause without the lock lets them finish.
        """
        if dist.is_initialized():  # DeepSpeed makes a group also for one process
            time.sleep(_LET_GLOO_FINISH)
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the logs."""
        return self.rank == 0

    def gather(self, own: Tensor) -> Tensor:
        """Rows of all ranks in rank order, [b, ...] -> [b * size, ...]; every rank has the same b.

        Differentiable: the gradient of a rank's rows is the sum of what all ranks ask of them.
        """
        if self.size == 1:
            return own
        gathered: Tensor = _Gather.apply(own, self)
        return gathered

    def sum(self, value: Tensor) -> Tensor:
        """Elementwise sum over ranks; not differentiable."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def max(self, value: Tensor) -> Tensor:
        """Elementwise largest over ranks; not differentiable."""
        if self.size == 1:
            return value
        largest = value.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return largest

    def start_gather(self, own: Tensor) -> Callable[[], Tensor]:
        """Start to gather the rows of all ranks in rank order, [n, ...] -> [n * size, ...]; call the result for them.

        Every rank has the same n. Not differentiable.
        """
        own = own.detach()
        if self.size == 1:
            return lambda: own
        everyone = own.new_empty(own.shape[0] * self.size, *own.shape[1:])
        return _finished(_all_gather(everyone, own.contiguous(), group=self.group, async_op=True), everyone)

    def start_sum(self, of_all: Tensor) -> Callable[[], Tensor]:
        """Start to sum rows for all ranks over the ranks, [n * size, ...]; call the result for those of this one.

        Not differentiable.
        """
        if self.size == 1:
            return lambda: of_all
        if of_all.device.type == "cpu":  # gloo has no sum for each rank but one for all, with twice the bytes
            came = torch.empty_like(of_all)
            wait = _finished(dist.all_to_all_single(came, of_all.contiguous(), group=self.group, async_op=True), came)
            return lambda: wait().unflatten(0, (self.size, -1)).sum(0)
        own = of_all.new_empty(of_all.shape[0] // self.size, *of_all.shape[1:])
        return _finished(_reduce_scatter(own, of_all.contiguous(), group=self.group, async_op=True), own)

    def exchange(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send `parts[r]` to rank r, and get from each rank r the flat `lengths[r]` elements that it sends here.

        Ranks beyond the last part get nothing. Not differentiable; all ranks call it together.
        """
        sent = [part.detach().flatten() for part in parts]
        if self.size == 1:
            return sent
        sizes = [len(part) for part in sent] + [0] * (self.size - len(sent))
        own = torch.cat(sent) if sent else torch.empty(0, device=self.device)
        came = own.new_empty(sum(lengths))
        dist.all_to_all_single(came, own, list(lengths), sizes, group=self.group)
        return list(came.split(list(lengths)))

    def any(self, *flags: bool) -> list[bool]:
        """Which flags are set on at least one rank. Runs on the CPU, so it never synchronises with the device."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self.group)
        return [bool(r) for r in raised]

    def objects(self, own: Any) -> list[Any]:
        """A JSON-like object from every rank, on every rank, in rank order."""
        if self.size == 1:
            return [own]
        data = _bytes(own)
        lengths = self._lengths(data)
        everyone = torch.zeros(sum(lengths), dtype=torch.uint8)  # one may be long: the others are not padded to it
        parts = everyone.split(lengths)
        parts[self.rank].copy_(data)
        dist.all_reduce(everyone, group=self.group)
        return [_unpacked(part, len(part)) for part in parts]

    def objects_to_first(self, own: Any) -> Iterator[Any]:
        """A JSON-like object from every rank, in rank order, on the first rank alone; the others get none.

        Each is parsed when it is taken, which may be in another thread.
        """
        if self.size == 1:
            return iter([own])
        data, lengths = self._packed(own)
        padded = [torch.empty_like(data) for _ in range(self.size if self.is_first else 0)]
        dist.gather(data, padded or None, group=self.group, group_dst=0)
        return (_unpacked(each, length) for each, length in zip(padded, lengths, strict=False))

    def first(self, own: T) -> T:
        """The first rank's JSON-like object on every rank; what the others give is not sent."""
        if self.size == 1:
            return own
        data = _bytes(own) if self.is_first else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, group=self.group, group_src=0)
        data = data if self.is_first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, group=self.group, group_src=0)
        return own if self.is_first else cast(T, _unpacked(data, len(data)))

    def _packed(self, own: Any) -> tuple[Tensor, list[int]]:
        """An object as bytes, padded to the longest of all ranks, and how many bytes each rank's are."""
        data = _bytes(own)
        lengths = self._lengths(data)
        return torch.cat([data, data.new_zeros(max(lengths) - len(data))]), lengths

    def _lengths(self, data: Tensor) -> list[int]:
        """How many bytes each rank has."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), self.group)
        return [int(length) for length in lengths]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(self.group)

    def hosts(self) -> list[str]:
        """Names of the machines, in rank order without repeats."""
        return list(dict.fromkeys(self.objects(socket.gethostname())))


def _finished(work: dist.Work, result: Tensor) -> Callable[[], Tensor]:
    """A function that waits for a collective (on a GPU, the stream does) and returns what it filled."""

    def wait() -> Tensor:
        work.wait()
        return result

    return wait


def _bytes(value: Any) -> Tensor:
    """As JSON: torch's own object collectives use pickle."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _unpacked(data: Tensor, length: int) -> Any:
    return json.loads(data[:length].numpy().tobytes())


class _Gather(torch.autograd.Function):
    """A differentiable all-gather; torch's own is deprecated."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, world: World) -> Tensor:
        ctx.world = world
        everyone = own.new_empty(own.shape[0] * world.size, *own.shape[1:])
        _all_gather(everyone, own.contiguous(), group=world.group)
        return everyone

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return ctx.world.start_sum(slopes[0])(), None
