"""Objects between ranks, of unequal sizes and with any text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from treering.training.world import World


def test_objects(on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(world: World) -> Any:
        own = {"rank": world.rank, "text": "ü\n☃" * (1000 * world.rank)}
        return world.objects(own), world.objects_to_first(own), world.first(own if world.is_first else None)

    truth = [{"rank": rank, "text": "ü\n☃" * (1000 * rank)} for rank in range(3)]
    for size in (1, 3):
        for rank, found in enumerate(on_ranks(size, one_rank)):
            everybody, at_first, first = found
            assert everybody == truth[:size]
            assert at_first == (truth[:size] if rank == 0 else [])
            assert first == truth[0]
