"""Going back: from a step where training has gone wrong to the last commit of when things were well.

The way back is an exception, so that whatever is in between (the loader, its processes, the engine) is closed on it.
"""

from __future__ import annotations

from typing import NoReturn

from ..checkpoint.commits import Commits
from ..recipe import Recipe
from ..state import RolledBack, RunState, TrainingError
from ..world import World


def roll_back(recipe: Recipe, state: RunState, commits: Commits, world: World) -> NoReturn:
    """Leave for the last good commit, by RolledBack; later ones are removed. No commit may be under way.

    Raises TrainingError if that is of no use: there is none, or it was tried as often as the recipe allows.
    """
    health = state.health
    what = (
        f"the loss leapt to {recipe.recovery.spike_factor} times what it was" if health.leapt else "no finite gradient"
    )
    reason = f"{what} in the last {health.ill} steps up to step {state.step}"
    last = next((e for e in reversed(state.lineage) if e.event == "rollback"), None)
    times = last.detail["times"] if last and health.well <= last.step else 0  # since then nothing was well
    good = world.objects(_last_good(state, commits) if world.is_first else None)[0]
    if good is None or times >= recipe.recovery.max_rollbacks:
        why = f"again after {times} rollbacks" if times else "there is no commit to go back to"
        raise TrainingError(
            f"{reason}, and {why}; "
            f"lower optimizer.lr = {recipe.optimizer.lr}, lengthen schedule.warmup, or look at their data"
        )
    if world.is_first:
        commits.remove_after(good)
    raise RolledBack(state.cursor, times + 1, reason)


def _last_good(state: RunState, commits: Commits) -> int | None:
    """The step of the newest commit from before the trouble; where only steps were skipped, one from within it will
    do: they leave the weights as they were."""
    found = commits.newest_until(state.health.well)
    if found is None and not state.health.leapt:
        found = commits.newest_until(state.step)
    return found
