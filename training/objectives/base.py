"""The interface of an objective, and the inputs it receives. How to write one: docs/objectives.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...models.output import Extras, ModelOutput, Need
from ..world import World


@dataclass(frozen=True)
class Inputs:
    """One rank's part of a global batch, on the device; b pairs, t packed tokens."""

    images: Tensor
    """uint8 [b, 3, resolution, resolution]"""
    tokens: Tensor
    """int64 [t]"""
    lengths: Tensor
    """int64 [b]"""
    caption_ids: Tensor
    """int64 [b]: captions with the same text have the same id"""
    image_ids: Tensor
    """int64 [b]: pairs with the same picture have the same id"""
    numbers: Tensor | None = None
    """int64 [b]: index of each sample in the run, the key of its random numbers (`sample_rng`); None: no random
    numbers"""
    patches: Tensor | None = None
    """int64 [b, k]: indices of the patches of each picture that the model reads; None: all"""
    host_lengths: Tensor | None = None
    """a CPU copy of `lengths`, to avoid a device-to-host synchronisation; None: read `lengths` from the device"""
    columns: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    """float32 [b, d] or [b, frames, d] by name: the data columns that the recipe asks for"""

    @property
    def known_lengths(self) -> Tensor:
        """The CPU copy of the lengths if there is one, else the lengths on the device (reading them synchronises)."""
        return self.lengths if self.host_lengths is None else self.host_lengths


@dataclass
class Objective(ABC):
    """A named term of the loss."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    """the model outputs that it reads; the temperature and the token table are always available"""

    weight: float
    """factor of the term in the loss at this step"""

    @property
    @abstractmethod
    def name(self) -> str:
        """Its key in the recipe and the logs; a class sets `name = "..."`."""

    @property
    def modalities(self) -> frozenset[str]:
        """The modality towers whose embeddings it reads; a tower runs only if an objective names it."""
        return frozenset()

    @abstractmethod
    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """This rank's part of the term's mean over the global batch, a scalar; the parts of all ranks sum to the term.

        `table` is the token table [v, d]. All ranks call it together, once a step, each with its full part of the
        batch.
        """

    @abstractmethod
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The term for each of this rank's samples, [b], without gradient; the mean over all ranks is the term."""

    def extras(self, inputs: Inputs) -> Extras:
        """Additional outputs to request from the forward pass; those named in `needs` are requested already."""
        return Extras()

    def state(self) -> dict[str, Any]:
        """What it has learned or counted, as plain JSON data, equal on all ranks; it is saved in commits."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a `state()`."""
        assert not state, f"{self.name} has no state"


def extras_of(objectives: Sequence[Objective], inputs: Inputs) -> Extras:
    """The union of the outputs that the objectives request; at most one of them may mask captions."""
    requested = [objective.extras(inputs) for objective in objectives]
    parallel = [extras.parallel_b for extras in requested if extras.parallel_b is not None]
    assert len(parallel) <= 1
    return Extras(
        tokens=any("tokens" in objective.needs for objective in objectives),
        parallel_b=parallel[0] if parallel else None,
        patches_bk=inputs.patches,
        longest=int(inputs.known_lengths.max()),
        modalities={name: inputs.columns[name] for objective in objectives for name in sorted(objective.modalities)},
    )


def scheduled(schedule: Sequence[tuple[float, float]], progress: float) -> float:
    """The factor on a weight after a fraction `progress` of the run: linear between the schedule's points, 1 if
    empty."""
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
    """The states of the objectives that have one, by name."""
    return {objective.name: state for objective in objectives if (state := objective.state())}


def load_states(objectives: Iterable[Objective], states: dict[str, dict[str, Any]]) -> None:
    """The inverse of `states`; an objective without a saved state keeps its initial one."""
    for objective in objectives:
        if objective.name in states:
            objective.load(states[objective.name])
