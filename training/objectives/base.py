"""What an objective is, and what it sees. How to write one: docs/objectives.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...models.output import Extras, ModelOutput, Need
from ..world import World


@dataclass(frozen=True)
class Inputs:
    """One rank's part of a global batch on the device; b pairs, t packed tokens."""

    images: Tensor
    """uint8 [b, 3, resolution, resolution]"""
    tokens: Tensor
    """int64 [t]"""
    lengths: Tensor
    """int64 [b]"""
    caption_ids: Tensor
    """int64 [b]: equal for equal captions"""
    image_ids: Tensor
    """int64 [b]: equal for equal pictures"""
    numbers: Tensor | None = None
    """int64 [b]: place of each sample in the run, what `draws` draws by; None where nothing is drawn"""
    patches: Tensor | None = None
    """int64 [b, k]: patches of each picture that are looked at; None: all"""
    host_lengths: Tensor | None = None
    """`lengths` once more, on the host: with it nobody waits for the device to tell; None: the device is asked"""
    columns: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    """float32 [b, d] or [b, frames, d] by name: the data columns that the recipe asks for"""

    @property
    def known_lengths(self) -> Tensor:
        """The lengths where they are read without waiting, if there are any."""
        return self.lengths if self.host_lengths is None else self.host_lengths


@dataclass
class Objective(ABC):
    """A named term of the loss."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """what it reads of a forward pass; the temperature and the token table are always there"""

    weight: float
    """factor of the term in the loss at this step"""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its key in the recipe and the logs; a class says `name = "..."`."""

    @property
    def modalities(self) -> frozenset[str]:
        """The modality towers whose embeddings it reads; they run only if an objective does."""
        return frozenset()

    @abstractmethod
    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """This rank's part of the term's mean over the global batch, a scalar; the parts of all ranks sum to the term.

        `table` is the token table [v, d]. All ranks call it together, once a step, each with its full part of the
        batch.
        """

    @abstractmethod
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The term of each of this rank's samples, [b], without a gradient; their mean over all ranks is the term."""

    def extras(self, inputs: Inputs) -> Extras:
        """What the forward pass is asked for beside its usual outputs; `needs` are seen to already."""
        return Extras()

    def state(self) -> dict[str, Any]:
        """What it has learned or counted, as plain JSON data that is the same on all ranks; commits keep it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a `state()`."""
        assert not state, f"{self.name} has no state"


def extras_of(objectives: Sequence[Objective], inputs: Inputs) -> Extras:
    """What all objectives together ask a forward pass for; at most one may mask captions."""
    asked = [objective.extras(inputs) for objective in objectives]
    parallel = [extras.parallel_b for extras in asked if extras.parallel_b is not None]
    assert len(parallel) <= 1
    return Extras(
        tokens=any("tokens" in objective.needs for objective in objectives),
        parallel_b=parallel[0] if parallel else None,
        patches_bk=inputs.patches,
        longest=int(inputs.known_lengths.max()),
        modalities={name: inputs.columns[name] for objective in objectives for name in sorted(objective.modalities)},
    )


def scheduled(schedule: Sequence[tuple[float, float]], progress: float) -> float:
    """The factor on a weight when a share `progress` of the run is done: linear between the points given, 1 without."""
    if not schedule:
        return 1.0
    (start, first), *rest = schedule
    if progress <= start:
        return first
    for end, factor in rest:
        if progress <= end:
            return first + (factor - first) * (progress - start) / (end - start)
        start, first = end, factor
    return first


def states(objectives: Iterable[Objective]) -> dict[str, dict[str, Any]]:
    """The states of those objectives that have one."""
    return {objective.name: state for objective in objectives if (state := objective.state())}


def load_states(objectives: Iterable[Objective], states: dict[str, dict[str, Any]]) -> None:
    """The inverse of `states`; objectives that were not there before start afresh."""
    for objective in objectives:
        if objective.name in states:
            objective.load(states[objective.name])


def gradient_norms(
    objectives: Sequence[Objective],
    partial_losses: dict[str, Tensor],
    parameters: Sequence[Tensor],
    world: World,
) -> dict[str, float]:
    """The norm of each objective's gradient over the global batch, before weighting; one backward pass each.

    `partial_losses` come from a forward pass of the bare model (not of an engine's wrapper), whose graph is kept. All
    ranks call it together.
    """
    norms = {}
    for objective in objectives:
        gradients = torch.autograd.grad(
            partial_losses[objective.name], parameters, retain_graph=True, allow_unused=True
        )
        squares = [
            world.sum(torch.zeros_like(p) if g is None else g).double().square().sum()
            for p, g in zip(parameters, gradients, strict=True)
        ]
        norms[objective.name] = torch.stack(squares).sum().sqrt().item()
    return norms
