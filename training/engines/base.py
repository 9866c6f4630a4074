"""The engine: how one optimizer step is distributed over processes, behind a small interface.

Build, step, logical state in and out, close. State is *logical*: tensors by the model's own names and shapes, whatever
holds them, so commits, growth and resumes never depend on an engine. What an engine cannot do is declared by its config
(`config`); each engine is in a file of its own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models.model import Model, empty, materialise
from ...models.output import ModelOutput
from ...models.spec import ModelSpec
from ..objectives.base import Inputs, Objective, extras_of, states
from ..world import World
from . import micro_batches
from .activation_checkpointing import Recomputing
from .config import EngineConfig
from .layout import Layout
from .optimizer import OptimizerConfig


@dataclass(frozen=True)
class StepResult:
    """What a step measured, as tensors on the device: reading them synchronises with it."""

    losses: dict[str, Tensor]
    """this rank's part of each objective, before weighting"""
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
        """This rank's part of each objective; or, without `losses`, the model's output."""
        extras = extras_of(self.objectives, inputs)
        if torch.is_grad_enabled():
            self.recomputing.decide(inputs, extras)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            output: ModelOutput = self.model(inputs.images, inputs.tokens, inputs.lengths, extras)
        if not losses:
            return output
        table = self.model.output_table
        return {o.name: o.partial_loss(output, inputs, table, self.world) for o in self.objectives}


class Engine(ABC):
    """One model, its objectives and its optimizer, distributed over the processes of a run."""

    model: Model
    """the model by its names; where the weights are sharded only `spec` and the names are of use"""
    layout: Layout | None = None
    """what this rank holds of each tensor; None where every rank holds all of them"""
    attention: dict[str, str]
    """the kernels by which pictures and captions attend, as `prepare` found them"""
    copies: World
    """the ranks that hold the same as this one"""
    recomputing: Recomputing
    """which blocks are recomputed in the backward pass"""

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
        self.config, self.optimizer_config = config, optimizer
        self.pieces = config.pieces or 1
        self._build(spec, seed)

    @abstractmethod
    def _build(self, spec: ModelSpec, seed: int) -> None:
        """Make the model, the optimizer and the wrapper of both."""

    def _whole_forward(self) -> Forward:
        """Model and objectives, before anything is wrapped around them."""
        padded = self.attention["captions"] != "varlen"
        self.recomputing = Recomputing(self.model, self.config, self.optimizer_config, self.world, padded)
        return Forward(self.model, self.objectives, self.world, self.config.precision, self.recomputing)

    def step(self, inputs: Inputs, lr: float, fade: float = 1.0) -> StepResult:
        """One optimizer step on this rank's part of a global batch, at learning rate `lr`; `fade` is the power that
        growth's multipliers are raised to.

        A gradient that is not finite leaves weights, moments and the objectives' states as they are; `skipped` counts
        it.
        """
        before = [objective.state() for objective in self.objectives]
        if self.pieces > 1:
            partial_losses = micro_batches.backward(
                self._output, self.objectives, inputs, self.pieces, self.world, self._hold
            )
        else:
            partial_losses = self._forward(inputs)
            loss = torch.stack([o.weight * partial_losses[o.name] for o in self.objectives]).sum()
            # The parts of all ranks sum to the global loss, but engines average gradients: undo their division.
            self._backward(loss * self.world.size)
        norm = self._update(lr, fade)
        changed = [(o, state) for o, state in zip(self.objectives, before, strict=True) if o.state() != state]
        if changed and not norm.isfinite():  # only where an objective has a state does this wait for the device
            for objective, state in changed:
                objective.load(state)
        return StepResult({name: loss.detach() for name, loss in partial_losses.items()}, norm)

    def take_pieces(self, pieces: int) -> None:
        """Run batches through the model in `pieces` pieces from now on."""
        self.pieces = self.recomputing.pieces = pieces

    _forward: nn.Module
    """what wraps `Forward`"""

    def _backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to that of the step."""
        loss.backward()

    @abstractmethod
    def _update(self, lr: float, fade: float) -> Tensor:
        """Apply the gradient of the step; returns its norm before clipping."""

    def _output(self, inputs: Inputs) -> tuple[ModelOutput, Tensor]:
        """The wrapped model's output and its token table."""
        return self._forward(inputs, losses=False), self.model.output_table

    def _hold(self) -> contextlib.AbstractContextManager[object]:
        """A context in which no gradients are exchanged."""
        return contextlib.nullcontext()

    def gradient_norms(self, inputs: Inputs) -> dict[str, float]:
        """The norm of each objective's gradient on this batch, before weighting; all ranks call it, and it synchronises
        with the device. Only where `config.measures_objectives`."""
        raise AssertionError("the recipe refuses log.gradient_norms under this engine")

    @property
    @abstractmethod
    def applied(self) -> int:
        """Optimizer steps applied; reading it synchronises with the device."""

    @property
    @abstractmethod
    def skipped(self) -> int:
        """Steps whose gradient was not finite; reading it synchronises with the device."""

    @property
    @abstractmethod
    def multipliers(self) -> dict[str, float]:
        """Factors on the learning rate, by parameter name, that are not 1."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Trained numbers of the model."""

    def figures(self, result: StepResult) -> dict[str, Any]:
        """What a log line says of a step; all ranks call it together, and it synchronises with the device."""
        shares = self.world.sum(torch.stack(list(result.losses.values()))).tolist()
        losses = dict(zip(result.losses, shares, strict=True))
        return {
            "loss": sum(o.weight * losses[o.name] for o in self.objectives),
            "losses": losses,
            "logit_scale": self.scale(),
            "grad_norm": result.grad_norm.item(),
            "skipped": self.skipped,
            "parameters": self.parameters,
            **self.recomputing.figures(),
        }

    def counters(self) -> dict[str, Any]:
        """What the state of a run holds of the engine; it synchronises with the device."""
        return {
            "applied": self.applied,
            "skipped": self.skipped,
            "multipliers": self.multipliers,
            "objectives": states(self.objectives),
        }

    @torch.no_grad()
    def output(self, inputs: Inputs) -> ModelOutput:
        """The model's output on this rank's pairs, without a graph; all ranks call it together."""
        output: ModelOutput = self._forward(inputs, losses=False)
        return output

    @abstractmethod
    def scale(self) -> float:
        """The factor on cosine similarities; all ranks call it together."""

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Model]:
        """What evaluation runs, for as long as the context lasts: whole weights, or their average if one is kept."""
        yield assembled(self)

    @abstractmethod
    def whole(self, name: str, own: Tensor) -> Tensor:
        """The whole of a tensor of the logical state, given what this rank has of it; all ranks call it together."""

    @abstractmethod
    def cut(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a whole tensor."""

    def expect(self, multipliers: Mapping[str, float]) -> None:
        """Get ready to be loaded with these multipliers: `layout` depends on them in some engines."""
        return

    @abstractmethod
    def logical_state(self) -> dict[str, Tensor]:
        """What this rank holds of weights and moments, by `kind/name`, as the live tensors."""

    @abstractmethod
    def load_logical_state(
        self, state: Mapping[str, Tensor], steps: int, skipped: int, multipliers: Mapping[str, float]
    ) -> None:
        """Copy weights and moments in, of which `state` has this rank's part.

        `steps` optimizer steps have been applied and `skipped` were not. `multipliers` are the factors on the learning
        rate, by parameter name, that are not 1.
        """

    def close(self) -> None:
        """Release the wrapper; the model's tensors live on as long as somebody holds them."""
        del self._forward


def assembled(engine: Engine) -> Model:
    """A plain model with an engine's weights, or their average if it keeps one, gathered one by one on every rank."""
    model = empty(engine.model.spec)
    materialise(model, engine.world.device)
    model.in_bf16 = engine.config.precision == "bf16"
    state = engine.logical_state()
    kind = "ema" if any(path.startswith("ema/") for path in state) else "model"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(engine.whole(name, state[f"{kind}/{name}"]))
    return model
