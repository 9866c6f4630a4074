"""Joining the processes of a run; objects between ranks, of unequal sizes and with any text; rows and their sums."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from treering.training.health.watchdog import SLOW_FACTOR, WatchdogConfig
from treering.training.state import TrainingError
from treering.training.world import World, backend


def test_one_long_object_is_not_padded_for_all(on_ranks: Callable[..., list[Any]]) -> None:
    """What collectives fill on a rank that has nothing to say, of 1 MB that one other rank says."""

    def one_rank(world: World) -> Any:
        filled = 0
        real = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

        def counted(name: str) -> Callable[..., Any]:
            def call(out: Any, *more: Any, **options: Any) -> Any:
                nonlocal filled
                filled += sum(each.nbytes for each in (out if isinstance(out, list) else [out]))
                return real[name](out, *more, **options)

            return call

        for name in real:
            setattr(dist, name, counted(name))
        found = world.objects("x" * 1_000_000 if world.is_first else "")
        return [len(each) for each in found], filled

    for lengths, filled in on_ranks(3, one_rank):
        assert lengths == [1_000_000, 0, 0]
        assert filled < 1_001_000


def test_objects(on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(world: World) -> Any:
        own = {"rank": world.rank, "text": "ü\n☃" * (1000 * world.rank)}
        return world.objects(own), [*world.objects_to_first(own)], world.first(own if world.is_first else None)

    truth = [{"rank": rank, "text": "ü\n☃" * (1000 * rank)} for rank in range(3)]
    for size in (1, 3):
        for rank, found in enumerate(on_ranks(size, one_rank)):
            everybody, at_first, first = found
            assert everybody == truth[:size]
            assert at_first == (truth[:size] if rank == 0 else [])
            assert first == truth[0]


def _waits(group: Any) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def test_collectives_wait_longer_than_the_watchdog(on_ranks: Callable[..., list[Any]]) -> None:
    """Also those of groups within a run, whose default is torch's own."""

    def one_rank(world: World) -> Any:
        half = world.part(world.rank % 2, 2, dist.new_subgroups(2)[0])
        return world.patience, _waits(dist.group.WORLD), half.patience, _waits(half.group)

    config = WatchdogConfig(limit="20min")
    assert config.of_collectives > SLOW_FACTOR * config.seconds
    for patience, all_wait, part, half_waits in on_ranks(4, one_rank):
        assert timedelta(seconds=patience) == all_wait == half_waits
        assert part == patience


@pytest.mark.parametrize(("rank", "there"), [("1", 1), ("7", 4), ("0", 0)])
def test_a_process_without_a_gpu_says_so(rank: str, there: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail(f"took {device}"))
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(TrainingError, match=rf"LOCAL_RANK {rank}, {there} GPUs?: .*--processes"):
        World.join()


def test_tensors_go_by_the_backend_of_their_device() -> None:
    assert backend(torch.device("cpu")) == "gloo"
    assert backend(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_all_and_the_sum_of_own(size: int, on_ranks: Callable[..., list[Any]]) -> None:
    """Also through the gradient of `gather`; two collectives may be on their way at once."""

    def one_rank(world: World) -> Any:
        own = torch.arange(4.0).view(2, 2) + 10 * world.rank
        rows, sums = world.start_gather(own), world.start_sum(torch.arange(2.0 * size) + world.rank)
        leaf = own.clone().requires_grad_()
        (world.gather(leaf) * torch.arange(2.0 * size)[:, None] * (world.rank + 1)).sum().backward()
        return rows().tolist(), sums().tolist(), leaf.grad[:, 0].tolist()

    everyone = [
        row for rank in range(size) for row in ([10.0 * rank, 10.0 * rank + 1], [10.0 * rank + 2, 10.0 * rank + 3])
    ]
    for rank, (rows, sums, slopes) in enumerate(on_ranks(size, one_rank)):
        assert rows == everyone
        assert sums == [size * place + size * (size - 1) / 2 for place in (2 * rank, 2 * rank + 1)]
        assert slopes == [place * size * (size + 1) / 2 for place in (2 * rank, 2 * rank + 1)]
