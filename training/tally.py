"""What the steps of a run measured, kept on the device until it is asked for: one synchronisation for many steps.

Shape suffixes: r ranks, s steps, f figures of a step.

Each step counts by itself, in order, and its figures are sums over ranks in rank order. So what is decided from them (a
plateau, a divergence, a search) is the same at any world size, however often somebody looks, and after any resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, isfinite

import numpy as np
import torch

from ..models.flops import training_flops
from .engines.base import StepResult
from .run_plan import RunPlan
from .stages import steady_from
from .state import RunState
from .world import World


@dataclass(frozen=True)
class Step:
    """One step over the whole global batch."""

    losses: dict[str, float]
    """each objective, before weighting"""
    weights: dict[str, float]
    tokens: int
    """of all captions"""
    finite: bool
    """whether the gradient was finite, so that the step was applied"""

    @property
    def loss(self) -> float:
        """The weighted sum."""
        return fsum(weight * self.losses[name] for name, weight in self.weights.items())


class Tally:
    """The steps since the last `take`, which synchronises with the device and all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps: list[tuple[StepResult, dict[str, float], int]] = []

    def __len__(self) -> int:
        """Number of steps since the last `take`."""
        return len(self._steps)

    def add(self, result: StepResult, weights: Mapping[str, float], tokens: int) -> None:
        """Record this rank's part of a step: its losses, their weights, and the number of tokens of its captions."""
        self._steps.append((result, dict(weights), tokens))

    def take(self) -> list[Step]:
        """The steps since the last call, the same on all ranks, which call it together."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        figures = [
            torch.stack([*result.losses.values(), result.grad_norm.to(_device(result))]) for result, _, _ in steps
        ]
        own_sf = torch.stack(figures).double()
        tokens_s = torch.tensor([tokens for _, _, tokens in steps], dtype=torch.float64, device=own_sf.device)
        ranks_rsf = self._world.gather(torch.cat([own_sf, tokens_s[:, None]], 1)[None]).cpu().numpy()
        # One rank after the other, so that every processor gets the same sums.
        sums_sf = np.cumsum(ranks_rsf, axis=0)[-1]
        finite_s = np.isfinite(ranks_rsf[..., -2]).all(0) & np.isfinite(sums_sf).all(1)
        taken = []
        for (result, weights, _), (*losses, _, tokens), finite in zip(
            steps, sums_sf.tolist(), finite_s.tolist(), strict=True
        ):
            taken.append(Step(dict(zip(result.losses, losses, strict=True)), weights, int(tokens), finite))
        return taken


def fold(steps: list[Step], state: RunState, plan: RunPlan, patches: int | None, reads_tokens: bool) -> RunState:
    """The state with what its latest steps gave: their FLOPs, losses for the window of a plateau rule, and health.

    `patches` of each picture were read (None: all); `reads_tokens`: whether an objective reads token features.
    """
    size, spec, stage = plan.recipe.data.batch, plan.specs[state.stage], plan.stages[state.stage]
    flops, window, health = state.flops, list(state.window), state.health
    steady = steady_from(plan.stages, state.stage, size, plan.recipe.schedule.warmup)
    for back, step in zip(range(len(steps) - 1, -1, -1), steps, strict=True):
        flops += size * training_flops(spec, step.tokens / size, patches, reads_tokens)
        before = state.samples - (back + 1) * size
        if stage.plateau and before >= steady and isfinite(step.loss):
            window.append((step.loss, step.tokens / size))
        health = health.after_step(plan.recipe.recovery, state.step - back, step.losses, step.weights, step.finite)
    return state.model_copy(update={"flops": flops, "window": tuple(window), "health": health})


def _device(result: StepResult) -> torch.device:
    return next(iter(result.losses.values())).device
