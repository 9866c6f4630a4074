"""The engine: how one optimizer step is spread over processes, behind a small interface.

build, step, logical state in and out, close. State is *logical*: tensors by the model's own names and shapes, whatever
holds them, so commits, growth and resumes never see an engine. `Engine` itself holds whole replicas (DDP); the engines
that spread the state, each in a module of its own, change how it is held and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...models.model import Model, ModelOutput, build, empty, materialise
from ...models.spec import ModelSpec
from ..objectives.base import Inputs, Objective, extras_of, gradient_norms, load_states, states
from ..world import World
from . import micro_batches
from .activation_checkpointing import Recomputing
from .config import EngineConfig
from .kernels import prepare
from .layout import Layout
from .optimizer import Optimizer, OptimizerConfig


@dataclass(frozen=True)
class StepResult:
    """What a step measured, as tensors on the device: reading them waits for it."""

    losses: dict[str, Tensor]
    """this rank's share of each objective, before weighting"""
    grad_norm: Tensor
    """norm of the whole gradient before clipping"""


class Forward(nn.Module):
    """Model and objectives in one forward, so that what wraps it sees the whole graph."""

    def __init__(
        self, model: Model, objectives: list[Objective], world: World, precision: str, recomputing: Recomputing
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.world = world
        self.autocast = precision == "bf16"
        self.recomputing = recomputing

    def forward(self, inputs: Inputs, losses: bool = True) -> dict[str, Tensor] | ModelOutput:
        """This rank's share of each objective; or, without `losses`, the model's output."""
        extras = extras_of(self.objectives, inputs)
        if torch.is_grad_enabled():
            self.recomputing.decide(inputs, extras)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            output: ModelOutput = self.model(inputs.images, inputs.tokens, inputs.lengths, extras)
        if not losses:
            return output
        table = self.model.output_table
        return {o.name: o.share(output, inputs, table, self.world) for o in self.objectives}


class Engine:
    """Replicated data parallelism: torch's DDP, or the bare module in a world of one."""

    model: Model
    """the model by its names; under an engine that spreads it only `spec` and the names are of use"""
    layout: Layout | None = None
    """what this rank holds of each tensor; None where every rank holds all of them"""
    attention: dict[str, str]
    """by which kernels pictures and captions attend, as `prepare` found it"""
    copies: World
    """the ranks that hold the same as this one"""
    recomputing: Recomputing
    """which blocks are made again in the backward pass"""

    def __init__(
        self,
        spec: ModelSpec,
        objectives: list[Objective],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        world: World,
        seed: int,
    ) -> None:
        self.world = self.copies = world
        self.objectives = objectives
        self.precision, self.micro_batches = config.precision, config.pieces
        self.optimizer_config = optimizer
        self._build(spec, config, optimizer, seed)

    def _build(self, spec: ModelSpec, config: EngineConfig, optimizer: OptimizerConfig, seed: int) -> None:
        """Make the model, the optimizer and the wrapper of both."""
        self.model = build(spec, seed).to(self.world.device)
        self.attention = prepare(self.model, config, self.world.device)
        self.optimizer = Optimizer(self.model.named_parameters(), optimizer)
        forward = self._whole_forward(config)
        self._forward: nn.Module = (
            DistributedDataParallel(forward, forward_sync_buffers=False, gradient_as_bucket_view=True)
            if self.world.size > 1
            else forward
        )

    def _whole_forward(self, config: EngineConfig) -> Forward:
        """Model and objectives, before anything is wrapped around them."""
        padded = self.attention["captions"] != "varlen"
        self.recomputing = Recomputing(self.model, config, self.optimizer_config, self.world, padded)
        return Forward(self.model, self.objectives, self.world, config.precision, self.recomputing)

    def take_pieces(self, pieces: int) -> None:
        """Take batches through the model in `pieces` pieces from now on."""
        self.micro_batches = self.recomputing.pieces = pieces

    def step(self, inputs: Inputs, lr: float, fade: float = 1.0) -> StepResult:
        """One optimizer step on this rank's part of a global batch, at learning rate `lr`; `fade` is the power that
        growth's multipliers are raised to.

        A gradient that is not finite leaves weights and moments as they are; `skipped` counts it.
        """
        if self.micro_batches > 1:
            shares = micro_batches.backward(
                self._output, self.objectives, inputs, self.micro_batches, self.world, self._hold
            )
        else:
            shares = self._forward(inputs)
            loss = torch.stack([o.weight * shares[o.name] for o in self.objectives]).sum()
            # Shares sum to the global loss, but engines average gradients: undo their division.
            self._backward(loss * self.world.size)
        norm = self._update(lr, fade)
        return StepResult({name: share.detach() for name, share in shares.items()}, norm)

    def _backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the step."""
        loss.backward()

    def _update(self, lr: float, fade: float) -> Tensor:
        """Apply the gradient of the step; its norm."""
        norm = self.optimizer.clip()
        self.optimizer.step(lr, fade)
        return norm

    def _output(self, inputs: Inputs) -> tuple[ModelOutput, Tensor]:
        """The wrapped model's output and its token table."""
        return self._forward(inputs, losses=False), self.model.output_table

    def _hold(self) -> contextlib.AbstractContextManager[object]:
        """As long as it lasts no gradients are exchanged."""
        wrapped = self._forward
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def gradient_norms(self, inputs: Inputs) -> dict[str, float]:
        """The norm of each objective's gradient on this batch, unweighted; all ranks call it, and the device is waited
        for. Only where every process holds the whole model."""
        kept = states(self.objectives)
        shares = Forward(self.model, self.objectives, self.world, self.precision, self.recomputing)(inputs)
        load_states(self.objectives, kept)  # looking at a batch is not learning from it
        return gradient_norms(self.objectives, shares, list(self.model.parameters()), self.world)

    @property
    def applied(self) -> int:
        """Optimizer steps applied; reading it waits for the device."""
        return self.optimizer.steps

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite; reading it waits for the device."""
        return self.optimizer.skipped

    @property
    def multipliers(self) -> dict[str, float]:
        """Factors on the learning rate, by parameter name, that are not 1."""
        return self.optimizer.multipliers

    @property
    def parameters(self) -> int:
        """Trained numbers of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def output(self, inputs: Inputs) -> ModelOutput:
        """The model's output on this rank's pairs, without a graph; all ranks call it together."""
        extras = extras_of(self.objectives, inputs)
        output: ModelOutput = self.model(inputs.images, inputs.tokens, inputs.lengths, extras)
        return output

    def scale(self) -> float:
        """The factor on cosine similarities; all ranks call it together."""
        return self.model.scale().item()

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Model]:
        """What evaluation runs, for as long as the context lasts: whole weights, or their average if one is kept."""
        yield assembled(self) if self.optimizer.config.ema else self.model

    def whole(self, name: str, own: Tensor) -> Tensor:
        """The whole of a tensor of the logical state, given what this rank has of it; all ranks call it together."""
        return own

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor."""
        return whole

    def expect(self, multipliers: Mapping[str, float]) -> None:
        """Get ready to be loaded with these multipliers: `layout` depends on them in some engines."""

    def logical_state(self) -> dict[str, Tensor]:
        """What this rank holds of weights and moments, by `kind/name`, as the live tensors."""
        state = {f"model/{name}": p.detach() for name, p in self.optimizer.parameters.items()}
        for kind, tensors in self.optimizer.state().items():
            state |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return state

    @torch.no_grad()
    def load_logical_state(
        self, state: Mapping[str, Tensor], steps: int, skipped: int, multipliers: Mapping[str, float]
    ) -> None:
        """Copy weights and moments in, of which `state` has this rank's part.

        `steps` optimizer steps have been applied and `skipped` were not. `multipliers` are the factors on the learning
        rate, by parameter name, that are not 1.
        """
        shaped = {
            path: part.view(self.optimizer.parameters[path.partition("/")[2]].shape) for path, part in state.items()
        }
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(shaped[f"model/{name}"])
        names, config = self.optimizer.parameters, self.optimizer.config
        moments = {k: {n: shaped[f"{k}/{n}"] for n in names if config.keeps(k, n)} for k in config.kinds}
        self.optimizer.load(moments, steps, skipped, multipliers)

    def close(self) -> None:
        """Release the wrapper; the model's tensors live on as long as somebody holds them."""
        del self._forward


def assembled(engine: Engine) -> Model:
    """A plain model with an engine's weights, or their average if it keeps one, gathered one by one on every rank."""
    model = empty(engine.model.spec)
    materialise(model, engine.world.device)
    state = engine.logical_state()
    kind = "ema" if any(path.startswith("ema/") for path in state) else "model"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(engine.whole(name, state[f"{kind}/{name}"]))
    return model
