"""Commits of three small tensors, whose every element is another number."""

from __future__ import annotations

from typing import Any

import torch

from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.checkpoint import writer
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.state import RunState
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1),
)
SHAPES = {"a.weight": (5, 3), "b": (1,), "c.bias": (7,)}


def truth(kind: str = "model") -> dict[str, torch.Tensor]:
    """By name, every element another number."""
    offset = {"model": 0.0, "exp_avg": 1000.0}[kind]
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + offset + 100 * i
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def begin(commits: Commits, tensors: dict[str, torch.Tensor], world: World = ALONE, **more: Any) -> writer.CommitUpload:
    step = more.pop("step", 1)
    state, policy = RunState(step=step, samples=10 * step, attempt=1), more.pop("policy", None)
    return commits.begin(Snapshot(SPEC, state, {}, tensors, **more), world, policy)
