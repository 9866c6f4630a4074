"""Every engine at every world against one plain process: losses, state, and commits that go from any to any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from treering.models.spec import CaptionSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.engine import Engine, EngineConfig, build_engine
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.caption import Caption
from treering.training.objectives.contrastive import Contrastive
from treering.training.optimizer import OptimizerConfig
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 8
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.3, clip=0.5)
ENGINES = {"ddp": EngineConfig(), "fsdp": EngineConfig(kind="fsdp")}
RANKS = (1, 2, 4)


def spec(caption: bool) -> ModelSpec:
    """Widths that no number of ranks divides: shards are uneven, some are empty. A short token table saves time."""
    text = TextSpec(width=18, depth=2, heads=3, context=9).model_copy(update={"vocabulary": 101})
    return ModelSpec(
        embed_dim=10,
        image=ImageSpec(width=14, depth=2, heads=2, patch=4, resolution=8),
        text=text,
        caption=CaptionSpec(depth=1) if caption else None,
    )


def objectives(caption: bool) -> list[Objective]:
    return [Contrastive(1.0), *([Caption(0.5)] if caption else [])]


def batch(step: int, world: World) -> Inputs:
    """This rank's part of a global batch."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 9, (PAIRS,), generator=generator)
    tokens = torch.randint(0, 101, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    mine = slice(world.rank * PAIRS // world.size, (world.rank + 1) * PAIRS // world.size)
    ids = torch.arange(PAIRS)
    return Inputs(images[mine], torch.cat(tokens.split(lengths.tolist())[mine]), lengths[mine], ids[mine], ids[mine])


def engine(config: EngineConfig, world: World, caption: bool = True, seed: int = 1) -> Engine:
    return build_engine(spec(caption), objectives(caption), config, OPTIMIZER, world, seed)


def train(ours: Engine, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = []
    for step in steps:
        result = ours.step(batch(step, ours.world), 1e-3 * min(1.0, (step + 1) / 10))
        losses = ours.world.sum(torch.stack([o.weight * result.losses[o.name] for o in ours.objectives]))
        found.append((losses.sum().item(), result.grad_norm.item()))
    return found


def wholes(ours: Engine) -> dict[str, Any]:
    """The whole logical state, as numpy."""
    state = ours.logical_state()
    return {path: ours.whole(path.partition("/")[2], own).clone().numpy() for path, own in state.items()}


def check_parity(kind: str, ranks: int, caption: bool, on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(world: World) -> Any:
        ours = engine(ENGINES[kind], world, caption)
        found = train(ours, range(50)), ours.scale(), ours.applied, ours.skipped, ours.parameters
        ours.close()
        return found

    plain = engine(EngineConfig(), ALONE, caption)
    expected, scale = train(plain, range(50)), plain.scale()
    for found, its_scale, *counts in on_ranks(ranks, one_rank, limit=100):
        for (loss, norm), (true_loss, true_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(true_loss, abs=1e-5)
            assert norm == pytest.approx(true_norm, rel=1e-3)
        assert its_scale == pytest.approx(scale, rel=1e-5)
        assert counts == [50, 0, plain.parameters]
    assert expected[-1][0] < 0.8 * expected[0][0]




@pytest.mark.parametrize("caption", [False, True], ids=["clip", "clip+caption"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ENGINES)
def test_fifty_steps_equal_one_process(
    kind: str, ranks: int, caption: bool, on_ranks: Callable[..., list[Any]]
) -> None:
    check_parity(kind, ranks, caption, on_ranks)
