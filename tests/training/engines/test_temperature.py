"""Temperatures at both ends of their range, in every engine: they stay inside, and come back when the loss asks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from treering.models.model import Model
from treering.models.output import ModelOutput
from treering.models.spec import ImageSpec, ModalitySpec, ModelSpec, TextSpec
from treering.models.towers import temperature
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, DeepSpeedConfig, EngineConfig, FsdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.engines.zero_state import require
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.contrastive import Between, Contrastive
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
TOP = math.log(100.0)
SPEC = ModelSpec(
    embed_dim=4,
    image=ImageSpec(width=4, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=4, depth=1, heads=1, context=5, vocabulary=11),
    modalities={"audio": ModalitySpec(width=4, depth=1, heads=1, features=3)},
)
NAMES = ("logit_scale", "modalities.audio.logit_scale")
PAIRS = 4
ENGINES: dict[str, tuple[EngineConfig, int]] = {
    "alone": (DdpConfig(), 1),
    "ddp": (DdpConfig(), 2),
    "fsdp": (FsdpConfig(), 2),
    **{f"zero{stage}": (DeepSpeedConfig(zero_stage=stage), 2) for stage in (1, 2, 3)},
}


@dataclass
class Push(Objective):
    """Its gradient takes every temperature down (1) or up (-1), whatever the data."""

    sign: float = 1.0
    name = "push"
    modalities = frozenset({"audio"})

    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        scale = output.modalities["audio"].scale
        assert scale is not None
        return self.sign * (output.scale.sum() + scale.sum()) / world.size

    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        raise NotImplementedError


def batch(world: World) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    mine = slice(world.rank * PAIRS // world.size, (world.rank + 1) * PAIRS // world.size)
    ids, lengths = torch.arange(PAIRS), torch.full((PAIRS,), 3)
    tokens = torch.randint(0, 11, (PAIRS, 3), generator=generator)
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    columns = {"audio": torch.randn(PAIRS, 3, generator=generator)[mine]}
    return Inputs(images[mine], tokens[mine].flatten(), lengths[mine], ids[mine], ids[mine], columns=columns)


def steps(kind: str, world: World, start: float, sign: float, count: int) -> list[list[float]]:
    """Both temperatures' logarithms after being loaded at `start`, and after each of `count` steps of 0.01; after a
    third of them the loss asks for the other direction."""
    push = Push(1.0, sign)
    objectives = [Contrastive(1e-6), Between(1e-6, towers=("audio", "text")), push]
    ours = build_engine(SPEC, objectives, ENGINES[kind][0], OptimizerConfig(ema=0.5), world, 1)

    def held() -> list[float]:
        state = ours.logical_state()
        return [ours.whole(name, state[f"model/{name}"]).item() for name in NAMES]

    state = {path: tensor.clone() for path, tensor in ours.logical_state().items()}
    for name in NAMES:
        state[f"model/{name}"].fill_(start)
    ours.load_logical_state(state, 0, 0, {})
    found = [held()]
    for number in range(count):
        push.sign = sign if number < count // 3 else -sign
        ours.step(batch(world), 1e-2)
        found.append(held())
        assert ours.scale() == pytest.approx(math.exp(found[-1][0]), rel=1e-6)
    ours.close()
    return found


CASES = {"half": (4.60547, TOP, -1.0), "far": (30.0, TOP, -1.0), "low": (-9.0, 0.0, 1.0), "near": (4.59, TOP, -1.0)}
QUICK = ("alone", "fsdp")


def cases(world: World, kind: str) -> dict[str, list[list[float]]]:
    require(world)
    return {name: steps(kind, world, start, sign, 12) for name, (start, _, sign) in CASES.items()}


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in ENGINES]
)
def test_both_ends_in_every_engine(kind: str, on_ranks: Callable[..., list[Any]]) -> None:
    """Loaded beyond an end and pushed outward it stays at the end; pushed the other way it comes back inside. From
    just inside an end, over it and back: the same numbers from all."""
    ranks, plain = ENGINES[kind][1], cases(ALONE, "alone")
    for found in [plain] if ranks == 1 else on_ranks(ranks, cases, kind):
        for name, (start, end, sign) in CASES.items():
            assert found[name] == [pytest.approx(each, abs=1e-6) for each in plain[name]]
            for temperatures in found[name][int(name == "near") * 3 : 5]:
                assert temperatures == pytest.approx([end, end], abs=1e-6), start
            for after in found[name][-1]:
                assert (end - after) * -sign > 1e-4


@pytest.mark.parametrize("value", [-3.0, 0.0, 1.0, 4.2, TOP, 4.60547, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient(value: float, dtype: torch.dtype) -> None:
    """Inside, exactly exp and its gradient; outside, the value of the end with the gradient that it has there."""
    log = torch.tensor([value], dtype=dtype, requires_grad=True)
    expected = log.detach().clamp(0.0, TOP).exp()
    scale = temperature(log)
    scale.backward()
    assert torch.equal(scale.detach(), expected)
    assert log.grad is not None
    assert torch.equal(log.grad, expected)


def test_a_model_says_it_without_an_engine() -> None:
    """A model that was loaded with a logarithm beyond the end scores with the end."""
    model = Model(SPEC)
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    assert model.scale().item() == pytest.approx(100.0, rel=1e-6)
