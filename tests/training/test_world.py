"""Objects between ranks, of unequal sizes and with any text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from treering.training.world import World


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
