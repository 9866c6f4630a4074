"""Engines: DDP, FSDP2 or DeepSpeed behind one interface, with the same gradients from each."""

from __future__ import annotations

from ..models.spec import ModelSpec
from .engine import Engine
from .engine_config import EngineConfig
from .objectives.base import Objective
from .optimizer import OptimizerConfig
from .world import World


def build_engine(
    spec: ModelSpec,
    objectives: list[Objective],
    config: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
    seed: int,
) -> Engine:
    """The engine that `config` asks for, with a freshly initialised model."""
    kind = Engine
    if config.kind == "fsdp" and world.size > 1:  # one process has nothing to spread
        from .fsdp import FsdpEngine as kind
    elif config.kind == "deepspeed":
        from .zero import ZeroEngine as kind
    return kind(spec, objectives, config, optimizer, world, seed)
