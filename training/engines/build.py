"""Makes the engine that a recipe asks for."""

from __future__ import annotations

from ...models.spec import ModelSpec
from ..objectives.base import Objective
from ..world import World
from .base import Engine
from .config import EngineConfig
from .ddp import DdpEngine
from .optimizer import OptimizerConfig


def build_engine(
    spec: ModelSpec,
    objectives: list[Objective],
    config: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
    seed: int,
) -> Engine:
    """The engine that `config` asks for, with a freshly initialised model."""
    kind: type[Engine] = DdpEngine
    if config.kind == "fsdp" and world.size > 1:  # one process has nothing to shard
        from .fsdp import FsdpEngine

        kind = FsdpEngine
    elif config.kind == "deepspeed":
        from .deepspeed import DeepSpeedEngine

        kind = DeepSpeedEngine
    return kind(spec, objectives, config, optimizer, world, seed)
