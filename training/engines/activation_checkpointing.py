"""Activation checkpointing within a budget: how many blocks are recomputed so that the activations fit.

`engine.activation_budget` bounds what the blocks of a model keep for the backward pass. Before each forward pass the
bytes are counted for the very batch (`models.activations`), and only as many blocks as needed are recomputed: so the
bound holds after a growth, in micro-batches, and for long captions, and a batch that fits costs nothing.
"""

from __future__ import annotations

import os
from typing import Any

from ...models.activations import BlockMemory, block_memory, blocks_to_recompute, peak
from ...models.flops import parameters
from ...models.model import Model, empty
from ...models.output import Extras
from ...models.parts import BatchShape
from ...models.parts import parts as model_parts
from ...models.spec import ModelSpec
from ..checkpoint.writer import PART_BYTES
from ..device import memory, process_memory
from ..objectives.base import Inputs
from ..objectives.caption import chunk_logits
from ..objectives.scores import GATHER_BUDGET, tile_bytes
from ..world import World
from .config import EngineConfig
from .optimizer import OptimizerConfig

CUDA_BYTES = 1 << 30
"""context, kernels and communication buffers of a GPU process"""
USABLE = 0.92
"""usable fraction of a device's memory; the rest is lost to fragmentation"""


def memory_parts(
    spec: ModelSpec,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    world: int,
    pairs: float,
    device_type: str = "cpu",
) -> dict[str, float]:
    """Peak bytes per process in addition to activations, by part, for one of `world` processes with `pairs` pairs of a
    batch."""
    count, caption, shards = parameters(spec), 0.0, engine.shards(world)
    state = commit_bytes(spec, optimizer) - (0 if engine.keeps_masters else 4 * count)
    copies = 2 * count if engine.precision == "bf16" and engine.casts_copies else 0
    if spec.captioner:
        chunk = min(chunk_logits(device_type), pairs * spec.text.context * spec.text.vocabulary)
        caption = spec.text.vocabulary * spec.text.width * 8 + 2 * 4 * chunk
    inputs = sum(part.input_bytes for part in model_parts(spec))
    texts, tile = 4 * spec.embed_dim * pairs * world, min(tile_bytes(device_type), 4 * pairs * pairs * world)
    gathered = 3 * min(texts, GATHER_BUDGET) if world > 1 else 0.0  # texts, their gradient, and one of both on its way
    return {
        "weights": 4 * count / shards.weights + copies,
        "gradients": 4 * count / shards.gradients,
        "optimizer": 0.0 if engine.steps_on_host else state / shards.optimizer,
        "loss": 4 * tile + gathered + 8 * pairs * spec.embed_dim * 4 + caption,
        "batches": pairs * inputs,
        "commit": 2 * min(4 * count / world, PART_BYTES),
    }


def commit_bytes(spec: ModelSpec, optimizer: OptimizerConfig) -> int:
    """Bytes of the tensors of a commit: weights, moments (Muon has one), and the weight average if there is one."""
    kinds, named = ("model", *optimizer.kinds), empty(spec).named_parameters()
    return sum(4 * p.numel() for name, p in named for kind in kinds if optimizer.keeps(kind, name))


def budget(engine: EngineConfig, found: dict[str, BlockMemory], room: float) -> float:
    """The bytes that blocks may keep, when `room` bytes are available for activations."""
    given = engine.activation_budget
    if given is None:
        return float("inf")
    if given == "auto":
        return room
    if isinstance(given, float):
        return given * peak(found, dict.fromkeys(found, 0))
    assert engine.activation_bytes is not None
    return float(engine.activation_bytes)


class Recomputing:
    """Decides before every forward pass which blocks are recomputed in its backward pass."""

    def __init__(
        self, model: Model, config: EngineConfig, optimizer: OptimizerConfig, world: World, padded: bool
    ) -> None:
        self._model, self._config, self._optimizer, self._world, self._padded = model, config, optimizer, world, padded
        self._room: float | None = None
        self._said = False
        self.pieces = config.pieces or 1
        """micro-batches that a batch is cut into"""
        self.checkpointed: dict[str, int] = {}
        """leading blocks recomputed for the latest forward pass, by part of the model"""
        self.bytes = 0.0
        """peak bytes kept by blocks in the latest forward pass"""
        self.allowed = float("inf")
        """the budget for it in bytes"""

    def decide(self, inputs: Inputs, extras: Extras) -> None:
        """Choose the blocks for a forward pass with a graph of these inputs; runs on the host alone."""
        if self._config.activation_budget is None:
            return
        assert extras.longest is not None
        patches = None if extras.patches_bk is None else extras.patches_bk.shape[1]
        pairs, total, longest = len(inputs.lengths), len(inputs.tokens), extras.longest
        spec = self._model.spec
        if self._config.recomputes_together:
            # Ranks fetch a recomputed block's weights together, so all must choose alike: count the worst case.
            longest, total = spec.text.context, pairs * spec.text.context
        places = pairs * longest if self._padded else total
        half = self._config.precision == "bf16"
        found = block_memory(spec, BatchShape(pairs, total, places, patches, half, extras.tokens))
        self.allowed = budget(self._config, found, self._left(pairs))
        self.checkpointed = blocks_to_recompute(found, self.allowed)
        self.bytes = peak(found, self.checkpointed)
        for name, transformer in self._model.transformers().items():
            transformer.checkpointed_blocks = self.checkpointed[name]

    def figures(self) -> dict[str, Any]:
        """For a log line: recomputed blocks by part of the model, and the bytes that blocks keep."""
        return {"recomputed": self.checkpointed, "activations": self.bytes} if self.checkpointed else {}

    def shortage(self) -> str | None:
        """A sentence with a remedy if the budget cannot be met; returned once."""
        if self._said or self.bytes <= self.allowed:
            return None
        self._said = True
        return (
            f"engine.activation_budget = {self._config.activation_budget} leaves {self.allowed / 1e6:,.2f} MB, and "
            f"blocks keep {self.bytes / 1e6:,.2f} MB although all of them are recomputed; set "
            "engine.micro_batches, or a smaller data.batch"
        )

    def _left(self, pairs: int) -> float:
        """The bytes that the device has for activations; computed once, and the same for all batches."""
        if self._room is None:
            device, world = self._world.device, self._world.size
            own, on_cpu = pairs * self.pieces, device.type == "cpu"
            others = memory_parts(self._model.spec, self._config, self._optimizer, world, own, device.type)
            has = memory(device) / (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_cpu else 1)
            self._room = USABLE * has - sum(others.values()) - (process_memory() if on_cpu else CUDA_BYTES)
        return max(0.0, self._room)
