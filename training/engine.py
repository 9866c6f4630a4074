"""The engine: how one optimizer step is spread over processes, behind a small interface.

build, step, logical state in and out, close. State is *logical*: tensors by the model's own names and shapes, whatever
holds them, so commits, growth and resumes never see an engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.model import Model, ModelOutput, build
from ..models.spec import ModelSpec
from ..models.transformer import Block, Transformer
from . import micro
from .objectives.base import Inputs, Objective, extras_of, gradient_norms, load_states, states
from .optimizer import MOMENTS, Optimizer, OptimizerConfig
from .world import World


class EngineConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How the model is spread over processes and in what precision it computes."""

    kind: Literal["ddp"] = "ddp"
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: matrix work under autocast; weights, losses and gradients stay in fp32"
    )
    recompute: bool = Field(
        False, description="make the insides of blocks again in the backward pass instead of keeping them"
    )
    compile: bool = Field(False, description="compile each block with torch.compile; the first steps take minutes")
    micro_batches: int = Field(
        1,
        gt=0,
        description="pieces in which a process takes its part of a batch through the model: with more than one it "
        "needs less memory and a second forward pass, and the gradient is the same",
    )


@dataclass(frozen=True)
class StepResult:
    """What a step measured, as tensors on the device: reading them waits for it."""

    losses: dict[str, Tensor]
    """this rank's share of each objective, before weighting"""
    grad_norm: Tensor
    """norm of the whole gradient before clipping"""


class _Forward(nn.Module):
    """Model and objectives in one forward, so that DDP sees the whole graph."""

    def __init__(self, model: Model, objectives: list[Objective], world: World, precision: str) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.world = world
        self.autocast = precision == "bf16"

    def forward(self, inputs: Inputs, losses: bool = True) -> dict[str, Tensor] | ModelOutput:
        """This rank's share of each objective; or, without `losses`, the model's output."""
        extras = extras_of(self.objectives, inputs)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            output: ModelOutput = self.model(inputs.images, inputs.tokens, inputs.lengths, extras)
        if not losses:
            return output
        table = self.model.text.token_embedding.weight
        return {o.name: o.share(output, inputs, table, self.world) for o in self.objectives}


def prepare(model: Model, config: EngineConfig) -> None:
    """Switch a model's blocks to how the config wants them run; names and weights stay."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recompute = config.recompute
        if isinstance(module, Block) and config.compile:
            module.compile(dynamic=True)


class Engine:
    """Replicated data parallelism: torch's DDP, or the bare module in a world of one."""

    def __init__(
        self,
        spec: ModelSpec,
        objectives: list[Objective],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        world: World,
        seed: int,
    ) -> None:
        self.world = world
        self.objectives = objectives
        self.precision, self.micro_batches = config.precision, config.micro_batches
        self.model = build(spec, seed).to(world.device)
        prepare(self.model, config)
        self.optimizer = Optimizer(self.model.named_parameters(), optimizer)
        forward = _Forward(self.model, objectives, world, config.precision)
        self._forward: nn.Module = (
            DistributedDataParallel(forward, forward_sync_buffers=False, gradient_as_bucket_view=True)
            if world.size > 1
            else forward
        )

    def step(self, inputs: Inputs, lr: float) -> StepResult:
        """One optimizer step on this rank's part of a global batch, at learning rate `lr`.

        A gradient that is not finite leaves weights and moments as they are; `skipped` counts it.
        """
        if self.micro_batches > 1:
            shares = micro.backward(self._output, self.objectives, inputs, self.micro_batches, self.world, self._hold)
        else:
            shares = self._forward(inputs)
            loss = torch.stack([o.weight * shares[o.name] for o in self.objectives]).sum()
            # Shares sum to the global loss, but DDP averages gradients: undo its division.
            (loss * self.world.size).backward()
        norm = self.optimizer.clip()
        self.optimizer.step(lr)
        return StepResult({name: share.detach() for name, share in shares.items()}, norm)

    def gradient_norms(self, inputs: Inputs) -> dict[str, float]:
        """The norm of each objective's gradient on this batch, unweighted; all ranks call it, and the device is waited
        for."""
        kept = states(self.objectives)
        shares = _Forward(self.model, self.objectives, self.world, self.precision)(inputs)
        load_states(self.objectives, kept)  # looking at a batch is not learning from it
        return gradient_norms(self.objectives, shares, list(self.model.parameters()), self.world)

    def _output(self, inputs: Inputs) -> tuple[ModelOutput, Tensor]:
        """The wrapped model's output and its token table."""
        return self._forward(inputs, losses=False), self.model.text.token_embedding.weight

    def _hold(self) -> contextlib.AbstractContextManager[object]:
        """As long as it lasts no gradients are exchanged."""
        wrapped = self._forward
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite; reading it waits for the device."""
        return self.optimizer.skipped

    @property
    def parameters(self) -> int:
        """Trained numbers of the model."""
        return sum(p.numel() for p in self.model.parameters())

    def logical_state(self) -> dict[str, Tensor]:
        """Weights and moments by `kind/name`, as the live tensors."""
        state = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        for kind, tensors in self.optimizer.state().items():
            state |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return state

    @torch.no_grad()
    def load_logical_state(
        self, state: Mapping[str, Tensor], steps: int, skipped: int, multipliers: Mapping[str, float]
    ) -> None:
        """Copy weights and moments in; `steps` optimizer steps have been applied and `skipped` were not.

        `multipliers` are the factors on the learning rate, by parameter name, that are not 1.
        """
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[f"model/{name}"])
        moments = {kind: {name: state[f"{kind}/{name}"] for name in self.optimizer.parameters} for kind in MOMENTS}
        self.optimizer.load(moments, steps, skipped, multipliers)

    def close(self) -> None:
        """Release the wrapper; the model's tensors live on as long as somebody holds them."""
        del self._forward
