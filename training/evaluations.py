"""When a run evaluates its model, its latest scores, and whether they are the best so far."""

from __future__ import annotations

import time

from .engines.base import Engine
from .evaluate.suites import evaluate
from .health.watchdog import Watchdog
from .held_out import Terms
from .logging.run_log import RunLog
from .objectives.base import states
from .recipe import Recipe
from .run_plan import RunPlan
from .starting.same_data import changed_sets
from .state import RunState
from .world import World


class Evaluations:
    """Evaluates the model of a run and keeps its latest scores; every rank makes the same calls."""

    def __init__(self, recipe: Recipe, world: World, display: RunLog, watch: Watchdog) -> None:
        self._recipe, self._world, self._display, self._watch = recipe, world, display, watch
        self.scores: dict[str, float] = {}
        self.chance: dict[str, float] = {}
        self.is_best = False
        """whether the latest scores are the best so far, and no commit has them yet"""
        self._known = False
        """whether the scores are those of an evaluation"""
        self._step = -1
        """the step of the latest evaluation of this attempt"""

    @property
    def lacking(self) -> bool:
        """Whether the recipe asks for evaluations, and the result of none is known."""
        return self._recipe.eval.is_asked_for and not self._known

    def due(self, plan: RunPlan, state: RunState) -> bool:
        """Whether the cadence or the end of the run asks for an evaluation after a step."""
        return self._recipe.eval.is_asked_for and (plan.crossed(self._recipe.eval.every, state) or plan.is_over(state))

    def of_step(self, step: int) -> dict[str, float] | None:
        """The scores of this step; None if it was not evaluated."""
        return self.scores if self._step == step else None

    def recall(self, state: RunState) -> None:
        """Take the scores that the records have for this step."""
        recorded = self._world.first(self._display.scores(state))
        self._known = recorded is not None
        self.scores, self.chance = recorded or ({}, {})

    def run(self, engine: Engine, state: RunState) -> RunState:
        """Evaluate and log it; returns the state with its best score and the samples it was evaluated on.

        Raises DataError.
        """
        begun, recipe = time.monotonic(), self._recipe
        data = recipe.data
        with engine.whole_model() as model, self._watch.through(model, "evaluate", state.step):
            found = evaluate(
                model,
                recipe.eval,
                recipe.evaluation_source,
                self._world,
                data.cache,
                data.tokenizer,
                counting=self._display.counting,
                terms=Terms.of(recipe, state, states(engine.objectives)),
            )
        self.scores, self.chance, self._step, self._known = found.scores, found.chance, state.step, True
        if why := changed_sets(state, found.contents):
            self._display.warn(why)
            state = state.model_copy(update={"best": None})
        state = state.model_copy(update={"evaluated": state.evaluated | found.contents})
        best = recipe.checkpoint.best_of(found.scores, found.undefined)
        if best is not None and (state.best is None or best > state.best):
            state, self.is_best = state.model_copy(update={"best": best}), True
        self._display.evaluation(state, found, time.monotonic() - begun)
        return state
