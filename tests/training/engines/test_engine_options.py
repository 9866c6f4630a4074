"""Micro-batches, bounded activations and compiled blocks under every engine: the steps are those of one process
without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from treering.models.model import build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, SharedSpec, TextSpec
from treering.models.transformer import TransformerBlock
from treering.training.engines import micro_batches
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, DeepSpeedConfig, EngineConfig, FsdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.engines.zero_state import require
from treering.training.objectives.balance import Balance
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
PAIRS, STEPS = 8, 3
SPEC = ModelSpec(
    embed_dim=10,
    image=ImageSpec(width=14, depth=2, heads=2, patch=4, resolution=8, experts=3, experts_per_token=1),
    text=TextSpec(width=18, depth=2, heads=3, context=9).model_copy(update={"vocabulary": 101}),
    captioner=CaptionerSpec(depth=1),
    shared=SharedSpec(width=8, depth=1, heads=2),
)
PLAIN = SPEC.model_copy(update={"captioner": None, "shared": None})
SWITCHES = {
    "ddp micro": DdpConfig(micro_batches=2),
    "ddp activations": DdpConfig(activation_budget=0.3),
    "ddp compile": DdpConfig(compile=True),
    "ddp fused": DdpConfig(fuse_projections=True),
    "fsdp fused": FsdpConfig(fuse_projections=True),
    "ddp all": DdpConfig(micro_batches=2, activation_budget=0.3, compile=True),
    "fsdp micro": FsdpConfig(micro_batches=2),
    "fsdp activations": FsdpConfig(activation_budget=0.3),
    "fsdp compile": FsdpConfig(compile=True),
    "fsdp all": FsdpConfig(micro_batches=3, activation_budget=0.3, compile=True),
    "zero1 activations": DeepSpeedConfig(zero_stage=1, activation_budget=0.3),
    "zero2 activations": DeepSpeedConfig(zero_stage=2, activation_budget=0.3),
    "zero3 activations": DeepSpeedConfig(zero_stage=3, activation_budget=0.3),
}

QUICK = ("ddp micro", "fsdp micro", "fsdp activations", "zero3 activations")


@pytest.fixture(autouse=True)
def imported_once() -> None:
    """Ranks are forked: what is imported here they need not import again."""
    require(ALONE)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tracer of torch.compile; the code generator behind it is torch's affair."""
    monkeypatch.setattr(
        TransformerBlock, "compile", lambda self, **options: nn.Module.compile(self, backend="eager", **options)
    )


def batch(step: int, world: World) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 9, (PAIRS,), generator=generator)
    tokens = torch.randint(0, 101, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    ids = torch.arange(PAIRS)
    return micro_batches.cut(Inputs(images, tokens, lengths, ids, ids, ids + PAIRS * step), world.size)[world.rank]


def trained(config: EngineConfig, spec: ModelSpec, world: World) -> list[tuple[float, ...]]:
    """Loss, balance and gradient norm of each step."""
    objectives: list[Objective] = [Contrastive(1.0), Balance(0.5)]
    objectives += [CaptionLoss(0.5, parallel_fraction=0.5, seed=3)] if spec.captioner else []
    engine = build_engine(spec, objectives, config, OptimizerConfig(grad_clip=0.5), world, seed=1)
    found = []
    for step in range(STEPS):
        result = engine.step(batch(step, world), 1e-3)
        shares = world.sum(torch.stack(list(result.losses.values()))).tolist()
        found.append((*shares, result.grad_norm.item()))
    engine.close()
    return found


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SWITCHES])
def test_a_switch_changes_nothing(name: str, on_ranks: Callable[..., list[Any]]) -> None:
    """With experts, blocks that both towers share and parallel captions; and where the last text block is pruned."""
    specs = [SPEC, PLAIN]

    def one_rank(world: World) -> list[list[tuple[float, ...]]]:
        return [trained(SWITCHES[name], spec, world) for spec in specs]

    expected = [trained(DdpConfig(), spec, ALONE) for spec in specs]
    for found in on_ranks(2, one_rank, limit=250):
        for spec, (ours, plain) in enumerate(zip(found, expected, strict=True)):
            for step, (mine, truth) in enumerate(zip(ours, plain, strict=True)):
                assert mine == pytest.approx(truth, rel=2e-4), (spec, step)


def test_gates_of_experts_learn_the_same_from_pieces() -> None:
    """The balance of the batch reaches the routers through every piece."""
    gradients = []
    for parts in (1, 3):
        net, objectives = build(PLAIN, 3).double(), [Balance(1.0)]

        def forward(piece: Inputs, net: Any = net) -> Any:
            return net(piece.images, piece.tokens, piece.lengths), net.text.token_embedding.weight

        micro_batches.backward(forward, objectives, batch(0, ALONE), parts, ALONE)
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None and p.grad.any()})
    assert gradients[0].keys() == gradients[1].keys()
    assert "image.transformer.blocks.0.mlp.router.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-9)
