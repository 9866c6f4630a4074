"""The recipe as a run has decided it so far: what its stages are, what model each has, where each ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..data.order import Mixture
from ..models.spec import ModelSpec
from .recipe import Recipe
from .stages import StageConfig, faded, rewarmed
from .state import Decision, RunState


@dataclass(frozen=True)
class RunPlan:
    """Stages, model specs and ends of a run, all by the number of the stage."""

    recipe: Recipe
    """as decided: its stages have the sizes and the samples that were decided"""
    specs: tuple[ModelSpec, ...]
    ends: tuple[int, ...]
    """the step after which each stage is over"""

    @classmethod
    def of(cls, recipe: Recipe, decisions: Sequence[Decision]) -> RunPlan:
        """The plan of a run after these decisions."""
        settled = recipe.settled(decisions)
        ends = accumulate(stage.steps(settled.data.batch) for stage in settled.stages)
        return cls(settled, tuple(settled.specs()), tuple(ends))

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The stages as decided."""
        return self.recipe.stages

    def is_over(self, state: RunState) -> bool:
        """Whether the whole budget of the run is used."""
        return state.step == self.ends[-1]

    def crossed(self, every: int | None, state: RunState) -> bool:
        """Whether the latest step crossed a multiple of `every` samples; never if that is None."""
        return every is not None and state.samples // every > (state.samples - self.recipe.data.batch) // every

    def fade(self, state: RunState) -> float:
        """The exponent of growth's multipliers in the next step."""
        return faded(self.stages, state.stage, state.samples, self.recipe.data.batch)

    def learning_rate(self, state: RunState) -> float:
        """The learning rate of the next step: the schedule's, and that of a warm-up after a growth."""
        recipe, size = self.recipe, self.recipe.data.batch
        lr = recipe.optimizer.lr * recipe.schedule.factor(state.samples, size, recipe.total_samples)
        return lr * rewarmed(self.stages, state.stage, state.samples, size)

    def sees(self, stage: int) -> tuple[int, int]:
        """Resolution of the pictures and most tokens of a caption in a stage."""
        spec = self.specs[stage]
        return spec.image.resolution, self.stages[stage].longest(spec)

    def mixtures(self, state: RunState) -> list[Mixture]:
        """The mixtures by the number of the global batch from which they hold: the step, and what was skipped."""
        return [Mixture(m.step + state.skipped_batches(before=m.step), m.weights) for m in self.recipe.mixtures()]
