"""Whole engine steps on the fake device: models and recipes, and the figures of one step of each.

The step is the engine's own: forward, objectives, backward, clipping and the optimizer, in bf16 under autocast, in a
world of one. Captions have the lengths of human ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from treering.launch.recipe.load import read_recipe
from treering.models import mlp, varlen
from treering.models.flops import training_flops
from treering.models.interchange.architectures import config_named, spec_of
from treering.models.model import Model, empty
from treering.models.output import ModelOutput, TowerOutput
from treering.models.spec import ModelSpec
from treering.models.transformer import DenseLayout
from treering.training.engines import ddp, kernels
from treering.training.engines.config import DdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.registry import registered
from treering.training.objectives.terms import build_objectives
from treering.training.world import World

from .counting import Count
from .device import DEVICE, fake_device, fake_ranks

BF16, FP32, MEMORY_SPEED, PEAK = 700e12, 48e12, 4.0e12, 989e12
"""an H200: matrix products that kernels reach, bytes a second, and its dense bf16 peak; FLOP/s"""
LAUNCH = 6e-6
"""seconds of the host for one call of an eager step on a server's core"""


@dataclass(frozen=True)
class Case:
    """A step: of which model, with which losses, on how many pairs."""

    title: str
    spec: ModelSpec
    objectives: list[Objective]
    pairs: int
    tokens: float = 14.3
    engine: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = False
    """captions attend in a padded grid, as where there is no kernel for packed ones"""


@dataclass(frozen=True)
class Figures:
    """What one step asks of the device, and what that takes at best."""

    launches: int
    bf16_flops: float
    fp32_flops: float
    other_bytes: float
    """of all calls but matrix products and attention"""
    useful_flops: float

    @property
    def products_ms(self) -> float:
        return 1e3 * (self.bf16_flops / BF16 + self.fp32_flops / FP32)

    @property
    def gpu_ms(self) -> float:
        """Products, and the bytes of everything else; nothing overlaps."""
        return self.products_ms + 1e3 * self.other_bytes / MEMORY_SPEED

    @property
    def host_ms(self) -> float:
        return 1e3 * self.launches * LAUNCH

    @property
    def mfu(self) -> float:
        return self.useful_flops / PEAK / (1e-3 * max(self.gpu_ms, self.host_ms))


def lengths(pairs: int, mean: float, most: int) -> Tensor:
    """Of captions with `mean` tokens."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(pairs, generator=generator) * 4.4 + mean).round().clamp(min(7, most), most).long()


def _on_device(spec: ModelSpec, seed: int) -> Model:
    """A model whose tensors are the fake device's."""
    model = empty(spec)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=DEVICE))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device=DEVICE)
    model.to = lambda *a, **k: model  # type: ignore[method-assign,assignment]
    return model


@contextmanager
def _engine(case: Case) -> Iterator[ddp.DdpEngine]:
    """Its engine; kernels that a GPU would be asked for are taken to work."""
    refusal = "off" if case.padded else None
    with fake_device(), ExitStack() as stack:
        stack.enter_context(mock.patch.object(varlen, "kernel_refusal", return_value=refusal))
        stack.enter_context(mock.patch.object(mlp, "grouped_refusal", return_value=None))
        stack.enter_context(mock.patch.object(kernels, "kernel", return_value="flash"))
        stack.enter_context(mock.patch.object(ddp, "build", _on_device))
        config = DdpConfig.model_validate({"precision": "bf16", **case.engine})
        optimizer = OptimizerConfig.model_validate(case.optimizer)
        engine = ddp.DdpEngine(case.spec, case.objectives, config, optimizer, World(0, 1, DEVICE), 0)
        # As after the first step: moments exist, and the count of skipped steps is where the norm is.
        engine.load_logical_state(engine.logical_state(), 0, 0, {})
        engine.optimizer._skipped = engine.optimizer._skipped.to(DEVICE)
        yield engine


def _inputs(case: Case) -> Inputs:
    spec, host = case.spec, lengths(case.pairs, case.tokens, case.spec.text.context)
    side = spec.image.resolution
    images = torch.empty(case.pairs, 3, side, side, dtype=torch.uint8, device=DEVICE)
    ids = [torch.empty(case.pairs, dtype=torch.int64, device=DEVICE) for _ in range(4)]  # and lengths, and numbers
    tokens = torch.empty(int(host.sum()), dtype=torch.int64, device=DEVICE)
    columns = {
        name: torch.empty(case.pairs, one.frames, one.features, device=DEVICE) for name, one in spec.modalities.items()
    }
    return Inputs(images.to(memory_format=torch.channels_last), tokens, *ids, host_lengths=host, columns=columns)


def measured(case: Case) -> tuple[Figures, Count]:
    """One step. Raises what the step raises, and HostWaits where the host would wait for the device."""
    with _engine(case) as engine:
        inputs = _inputs(case)
        with Count() as count:
            engine.step(inputs, 1e-3)
        host = inputs.host_lengths
        assert host is not None
        tokens = any("tokens" in objective.needs for objective in case.objectives)
        useful = case.pairs * training_flops(case.spec, float(host.sum()) / case.pairs, tokens=tokens)
    fp32 = count.fp32_flops
    return Figures(count.launches, sum(count.flops.values()) - fp32, fp32, count.other_bytes, useful), count


def loss_measured(size: int, pairs: int, objective: Objective, channels: int = 512) -> Count:
    """Forward and backward of a contrastive loss alone on one of `size` ranks, each with `pairs` pairs."""
    count = Count()
    with fake_device(), fake_ranks(size, count):
        one, other = (torch.empty(pairs, channels, device=DEVICE, requires_grad=True) for _ in range(2))
        scale, bias = (torch.empty(1, device=DEVICE, requires_grad=True) for _ in range(2))
        ids = [torch.empty(pairs, dtype=torch.int64, device=DEVICE) for _ in range(3)]
        layout = DenseLayout(pairs, 1)
        towers = (TowerOutput(embeddings, embeddings[:0], layout) for embeddings in (one, other))
        output = ModelOutput(*towers, scale, bias, None)
        inputs = Inputs(ids[0], ids[0], ids[0], ids[1], ids[2])
        with count:
            objective.partial_loss(output, inputs, one, World(0, size, DEVICE)).backward()
    return count


def objective(name: str, **fields: Any) -> Objective:
    """A registered objective by its name in the recipe."""
    entry = registered(name)
    return entry.build(entry.config.model_validate({"weight": 1.0, **fields}), 0)


def of_open_clip(name: str) -> ModelSpec:
    """By the name of open_clip's config."""
    return spec_of(config_named(name))


def of_recipe(name: str, stage: int, pairs: int, **more: Any) -> Case:
    """A stage of a bundled recipe."""
    recipe = read_recipe(name).recipe
    spec = recipe.specs()[stage - 1]
    objectives = build_objectives(recipe.objectives, spec, 0)
    return Case(f"{name} {stage}", spec, objectives, pairs, **more)


def clip(name: str, pairs: int, **more: Any) -> Case:
    """A model of open_clip's with the losses that it is trained with."""
    spec = of_open_clip(name)
    objectives = [objective("contrastive"), *([objective("caption", weight=2.0)] if spec.captioner else [])]
    return Case(name, spec, objectives, pairs, **more)


TABLE: dict[str, Callable[[], Case]] = {
    "b32": lambda: clip("ViT-B-32", 1024),
    "b32_128": lambda: clip("ViT-B-32", 128),
    "b16": lambda: clip("ViT-B-16", 512),
    "l14": lambda: clip("ViT-L-14", 256),
    "coca_b32": lambda: clip("coca_ViT-B-32", 256),
    "coca_b32_1024": lambda: clip("coca_ViT-B-32", 1024),
    "photos1": lambda: of_recipe("photos", 1, 1024),
    "photos2": lambda: of_recipe("photos", 2, 1024),
    "photos2_128": lambda: of_recipe("photos", 2, 128),
    "photos2_60": lambda: of_recipe("photos", 2, 1024, tokens=60.0),
    "emoji1": lambda: of_recipe("emoji", 1, 128, tokens=8.0, engine={"precision": "fp32"}),
    "emoji2": lambda: of_recipe("emoji", 2, 128, tokens=8.0),
}
"""the cases whose figures the benchmark prints"""


def _small(**spec: Any) -> ModelSpec:
    """Two blocks a tower, and one of a captioner."""
    parts = {
        "embed_dim": 64,
        "image": {"width": 64, "depth": 2, "heads": 2, "patch": 16, "resolution": 64},
        "text": {"width": 64, "depth": 2, "heads": 2, "context": 32},
        "captioner": {"depth": 1},
    }
    return ModelSpec.model_validate(parts | spec)


def _experts() -> Case:
    mixed = {"width": 64, "depth": 2, "heads": 2, "patch": 16, "resolution": 64, "experts": 4, "experts_per_token": 2}
    losses = [objective("contrastive"), objective("caption"), objective("balance")]
    return Case("experts", _small(image=mixed), losses, 64)


def _both(title: str, **more: Any) -> Case:
    return Case(title, _small(), [objective("contrastive"), objective("caption")], 64, **more)


SETTINGS: dict[str, Callable[[], Case]] = {
    "plain": lambda: _both("plain"),
    "fp32": lambda: _both("fp32", engine={"precision": "fp32"}),
    "padded": lambda: _both("padded captions", padded=True),
    "pieces": lambda: _both("4 micro-batches", engine={"micro_batches": 4}),
    "recomputed": lambda: _both("recomputed blocks", engine={"activation_budget": 0.3}),
    "ema": lambda: _both("average", optimizer={"ema": 0.999}),
    "muon": lambda: _both("Muon", optimizer={"kind": "muon"}),
    "experts": _experts,
}
"""the settings of a step, on a small model"""
