"""`engine.micro_batches: auto`: the fewest pieces that fit, found with errors of the kind that torch raises, and with a
real limit on a process's memory."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.models.towers import ImageTower
from treering.tests.support.tiny_runs import SIZES, dies, lines
from treering.training import loop
from treering.training.checkpoint.commits import find_commit
from treering.training.engines import micro_batches
from treering.training.engines.automatic_micro_batches import fewest_pieces, with_longest_captions
from treering.training.engines.base import Engine
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, FsdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.base import Inputs
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive
from treering.training.state import TrainingError
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 12
SPEC = ModelSpec(
    embed_dim=10,
    image=ImageSpec(width=14, depth=2, heads=2, patch=4, resolution=8),
    text=TextSpec(width=18, depth=2, heads=3, context=9).model_copy(update={"vocabulary": 101}),
    captioner=CaptionerSpec(depth=1),
)


def engine(pieces: Any = "auto", world: World = ALONE) -> Engine:
    objectives = [Contrastive(1.0), CaptionLoss(0.5, parallel_fraction=0.5, seed=3)]
    return build_engine(SPEC, objectives, DdpConfig(micro_batches=pieces), OptimizerConfig(), world, 1)


def batch(world: World = ALONE) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 7, (PAIRS * world.size,), generator=generator)
    tokens = torch.randint(0, 101, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (len(lengths), 3, 8, 8), dtype=torch.uint8, generator=generator)
    ids = torch.arange(len(lengths))
    return micro_batches.cut(Inputs(images, tokens, lengths, ids, ids, ids), world.size)[world.rank]


@contextlib.contextmanager
def room_for(pairs: int) -> Iterator[list[int]]:
    """Memory runs out, with torch's own error, where more pictures than this are kept for a backward pass."""
    real, seen = ImageTower.forward, []

    def limited(tower: ImageTower, images: Tensor, *more: Any) -> Any:
        seen.append(len(images))
        if len(images) > pairs:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(tower, images, *more)

    ImageTower.forward = limited  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ImageTower.forward = real  # type: ignore[method-assign]


@pytest.mark.parametrize(("room", "pieces"), [(12, 1), (11, 2), (6, 2), (5, 3), (3, 4), (2, 6), (1, 12)])
def test_the_fewest_pieces_that_fit(room: int, pieces: int) -> None:
    with room_for(room):
        assert fewest_pieces(engine(), batch(), 9) == pieces


def test_one_pair_that_does_not_fit_is_refused() -> None:
    with room_for(0), pytest.raises(TrainingError, match=r"micro_batches = auto: a single pair does not fit .* rank 0"):
        fewest_pieces(engine(), batch(), 9)


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(ImageTower, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fewest_pieces(engine(), batch(), 9)


def test_trying_leaves_no_trace() -> None:
    tried, plain = engine(), engine(3)
    tried.step(batch(), 1e-3)
    plain.step(batch(), 1e-3)  # the first step in one piece and in three differ in rounding
    plain.load_logical_state({k: v.clone() for k, v in tried.logical_state().items()}, 1, 0, {})
    before = torch.get_rng_state()
    with room_for(4):
        tried.take_pieces(fewest_pieces(tried, batch(), 9))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in tried.model.parameters())
    assert (tried.pieces, tried.recomputing.pieces) == (3, 3)
    ours, theirs = tried.step(batch(), 1e-3), plain.step(batch(), 1e-3)
    assert {k: v.item() for k, v in ours.losses.items()} == {k: v.item() for k, v in theirs.losses.items()}
    mine, its = tried.logical_state(), plain.logical_state()
    assert all(torch.equal(mine[path], its[path]) for path in its)


def test_the_batch_that_is_tried_is_the_fullest() -> None:
    own = batch()
    fullest = with_longest_captions(own, 9)
    assert fullest.lengths.tolist() == fullest.known_lengths.tolist() == [9] * PAIRS
    assert len(fullest.tokens) == 9 * PAIRS
    assert set(fullest.tokens.tolist()) <= set(own.tokens.tolist())
    assert fullest.images is own.images


def test_all_ranks_take_what_the_smallest_needs(on_ranks: Callable[..., list[Any]]) -> None:
    def found(group: World) -> tuple[int, list[float]]:
        one = engine("auto", group)
        with room_for(7 if group.rank == 0 else 2):
            one.take_pieces(fewest_pieces(one, batch(group), 9))
            return one.pieces, [v.item() for v in one.step(batch(group), 1e-3).losses.values()]

    def plain(group: World) -> list[float]:
        return [v.item() for v in engine(6, group).step(batch(group), 1e-3).losses.values()]

    (one, losses), (other, more) = on_ranks(2, found)
    assert one == other == 6
    assert [losses, more] == on_ranks(2, plain)


def test_a_real_limit_on_memory(on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses memory beyond a limit on the address space, and torch's allocator says so in its own words."""
    real = ImageTower.forward

    def hungry(tower: ImageTower, images: Tensor, *more: Any) -> Any:
        torch.empty(len(images) * 200 << 20, dtype=torch.uint8)  # promised, never touched
        return real(tower, images, *more)

    def found(group: World, room: int) -> int:
        one = engine("auto", group)
        one.step(batch(), 0.0)  # libraries have what they need
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
        try:
            return fewest_pieces(one, batch(), 9)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    monkeypatch.setattr(ImageTower, "forward", hungry)
    assert on_ranks(1, found, 12 * 200 + 1000 << 20) == [1]
    assert on_ranks(1, found, 3 * 200 + 100 << 20) == [4]


def test_refused_where_a_process_cannot_try_alone() -> None:
    with pytest.raises(ValidationError, match=r"engine\.micro_batches = auto is for engine\.kind = ddp"):
        FsdpConfig.model_validate({"kind": "fsdp", "micro_batches": "auto"})
    with pytest.raises(ValidationError, match="micro_batches"):
        DdpConfig.model_validate({"micro_batches": "some"})
    with pytest.raises(RecipeError, match="micro_batches"):
        read_recipe("emoji", ["engine={kind: deepspeed, micro_batches: auto}"])


def test_a_run_finds_them_for_each_stage_and_a_resume_takes_them_over(tmp_path: Path) -> None:
    larger = "{samples: 48, grow: {image.width: 24}}"
    recipe = read_recipe(
        "emoji",
        [*SIZES, f"stages=[{{samples: 48}}, {larger}]", "engine={micro_batches: auto}", "eval.suites=[]",
         "checkpoint={every: 24}"],
    ).recipe  # fmt: skip
    with room_for(5):
        loop.train(recipe, tmp_path / "whole")
    with room_for(5), dies("step", 3, lambda run: run.uploads.finish()):  # the commit of step 2 is complete
        loop.train(recipe, tmp_path / "cut")
    with room_for(12) as seen:  # one piece would do now, and does for the stage that is not begun
        loop.train(recipe, tmp_path / "cut")
    assert set(seen[: seen.index(12)]) == {4}
    for name, last in (("whole", 3), ("cut", 1)):
        found = lines(tmp_path / name, "micro_batches")
        assert [(line["stage"], line["pieces"], line["pairs"]) for line in found] == [(0, 3, 4), (1, last, 12 // last)]
        events = [e for e in find_commit(str(tmp_path / name)).manifest.state.lineage if e.event == "micro_batches"]
        assert [(e.step, e.detail["stage"], e.detail["pieces"]) for e in events] == [(0, 0, 3), (4, 1, last)]
