"""The first engine and state of a process: from the newest intact commit, from another run, or fresh."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...models.spec import ModelSpec
from ..checkpoint.commits import Commits
from ..checkpoint.manifest import Commit
from ..engines.base import Engine
from ..engines.layout import Layout
from ..logging.counting import Counting, no_counting
from ..objectives.base import load_states
from ..recipe import Recipe
from ..run_plan import RunPlan
from ..state import RolledBack, RunState
from ..world import World
from .init_from import begin_with, open_origin
from .resume import check_same_run, newest_intact, state_for


@dataclass(frozen=True)
class Begun:
    """The engine and state that a process starts with."""

    engine: Engine
    state: RunState
    commit: Commit | None
    """the commit of this run that is continued; None at its first step"""
    changes: list[str]
    """what the recipe changes of the run's future"""
    seconds: dict[str, float]
    """seconds spent on finding, reading and building"""


@dataclass(frozen=True)
class Beginning:
    """Why this process started (fresh, resumed or rolled back); logged once."""

    imports: float = 0.0
    """seconds spent before the run"""
    before: str | None = None
    """how the previous attempt ended"""
    back: RolledBack | None = None
    """the rollback that started this attempt"""

    def event(self, begun: Begun) -> tuple[str, dict[str, Any]]:
        """The name of the event that records the start of an attempt, and what it says beside its number and place."""
        detail: dict[str, Any] = {"commit": begun.commit.name if begun.commit else None}
        if self.before:
            detail["before"] = self.before
        if back := self.back:
            batches = back.cursor - begun.state.cursor
            return "rollback", {**detail, "batches": batches, "times": back.times, "reason": back.reason}
        return "resume" if begun.commit else "start", detail


class _Builder:
    """Builds the engine for a commit of this run; `engine` is the last one built."""

    def __init__(self, recipe: Recipe, build: Callable[[ModelSpec], Engine]) -> None:
        self._recipe, self._build = recipe, build
        self.engine: Engine | None = None
        self.changes: list[str] = []
        self.seconds = 0.0

    def __call__(self, commit: Commit) -> Layout | None:
        """Build the engine for a commit; returns its layout. Raises StoreError for another run's commit."""
        begun = time.monotonic()
        self.changes = check_same_run(self._recipe, commit)
        state = commit.manifest.state
        if self.engine is not None:  # a newer commit was damaged
            self.engine.close()
        self.engine = self._build(RunPlan.of(self._recipe, state.decisions).specs[state.stage])
        self.engine.expect(state.multipliers)
        self.seconds += time.monotonic() - begun
        return self.engine.layout


def begin(
    recipe: Recipe,
    commits: Commits,
    world: World,
    build: Callable[[ModelSpec], Engine],
    warn: Callable[[str], None],
    counting: Counting = no_counting,
) -> Begun:
    """Load the newest intact commit of the run; if there is none, initialise, or load what `init_from` names.

    All ranks call it together. `build` makes an engine for a spec, `warn` is called for damaged commits, `counting`
    shows the progress. Raises StoreError.
    """
    clock = [time.monotonic()]
    names = world.first(commits.names() if world.is_first else [])
    clock.append(time.monotonic())
    builder = _Builder(recipe, build)
    with counting("parts of the commit read") as progress:
        found = newest_intact(commits, names, builder, warn, world, progress)
    clock.append(time.monotonic())
    if found and builder.engine:
        commit, engine, state = found[0], builder.engine, state_for(recipe, found[0])
        engine.load_logical_state(found[1], state.applied, state.skipped, state.multipliers)
        load_states(engine.objectives, state.objectives)
    else:
        commit = None
        origin = open_origin(recipe, warn) if recipe.init_from else None
        engine = build(origin.manifest.spec if origin else recipe.specs()[0])
        with counting("parts of the commit read") as progress:
            state = begin_with(recipe, origin, engine, progress) if origin else RunState()
    seconds = {
        "find": clock[1] - clock[0],
        "read": clock[2] - clock[1] - builder.seconds,
        "build": time.monotonic() - clock[2] + builder.seconds,
    }
    return Begun(engine, state, commit, builder.changes, seconds)
