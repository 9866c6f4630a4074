"""Rollback: from a step where training has diverged to the last good commit.

The way back is an exception, so that whatever is in between (the loader, its processes, the engine) is closed on it.
"""

from __future__ import annotations

from typing import NoReturn

from ...data.units import counted
from ..checkpoint.commits import Commits
from ..recipe import Recipe
from ..state import RolledBack, RunState, TrainingError
from ..world import World


def roll_back(recipe: Recipe, state: RunState, commits: Commits, world: World) -> NoReturn:
    """Remove commits after the last good one and raise RolledBack. No commit may be in progress.

    Raises TrainingError if that is of no use: there is none, or it was tried as often as the recipe allows.
    """
    health = state.health
    spike = f"the loss rose above {recipe.recovery.spike_factor} times its median"
    what = spike if health.spiked else "no finite gradient"
    reason = f"{what} in the last {counted(health.bad_steps, 'step')} up to step {state.step}"
    times = next((event.detail["times"] for event in reversed(state.lineage) if event.event == "rollback"), 0)
    good = world.first(_last_good(state, commits) if world.is_first else None)
    if good is None or times >= recipe.recovery.max_rollbacks:
        why = f"again after {counted(times, 'rollback')}" if times else "there is no commit to go back to"
        raise TrainingError(
            f"{reason}, and {why}; "
            f"lower optimizer.lr = {recipe.optimizer.lr}, lengthen schedule.warmup, or look at their data"
        )
    if world.is_first:
        commits.remove_after(good)
    raise RolledBack(state.cursor, times + 1, reason)


def _last_good(state: RunState, commits: Commits) -> int | None:
    """The step of the newest commit before the bad steps; if steps were only skipped, a later one is good as well,
    since they leave the weights unchanged."""
    found = commits.newest_until(state.health.healthy_step)
    if found is None and not state.health.spiked:
        found = commits.newest_until(state.step)
    return found
