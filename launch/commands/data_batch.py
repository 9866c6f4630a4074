"""`treering data batch`: the samples of one step, where each lies, what it replaces, and the rank that reads it.

Steps are numbered as in logs and ledgers: step 1 trains on the first batch. In a run folder the step's batch is the one
that the run reads there, which follows rollbacks and stages that ended early.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.storage.files import shown_url
from ...training.recipe import Recipe
from ...training.run_plan import RunPlan
from ...training.state import Event, RunState
from ..errors import RecipeError
from ..recipe.load import read_recipe
from ..run_folder import RECIPE_FILE


@dataclass(frozen=True)
class BatchSample:
    """One sample of a batch."""

    rank: int
    number: int
    """of the sample in the run, from 0"""
    source: str
    shard: str
    key: str
    caption: str
    replaces: tuple[str, ...]
    """keys of the bad samples before it, with the reasons"""


@dataclass(frozen=True)
class StepBatch:
    """The batch of a step."""

    step: int
    batch: int
    """its number in the order of the data, from 0"""
    stage: int
    samples: tuple[BatchSample, ...]

    def json(self, world: int) -> dict[str, Any]:
        """As a plain object; `ranks` has the keys that each rank reads."""
        ranks: list[list[str]] = [[] for _ in range(world)]
        for sample in self.samples:
            ranks[sample.rank].append(sample.key)
        samples = [vars(sample) | {"replaces": list(sample.replaces)} for sample in self.samples]
        return {"step": self.step, "batch": self.batch, "stage": self.stage, "world": world, "ranks": ranks} | {
            "samples": samples
        }


def batch_of(name: str, overrides: list[str], step: int, world: int) -> StepBatch:
    """The batch of `step` in a run of `world` processes; `name` is a recipe or a run folder.

    Reads and decodes its samples. Raises RecipeError, DataError or StoreError.
    """
    recipe, state = _run(name, overrides)
    try:
        recipe.check_world(world)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    plan, size = RunPlan.of(recipe, state.decisions), recipe.data.batch
    if not 1 <= step <= plan.ends[-1]:
        raise RecipeError(f"--step {step} is not a step of the run; its steps are 1 to {plan.ends[-1]}")
    from ...data.loading.loader import Loader
    from ...training.logging.counting import counting

    stage = next(number for number, end in enumerate(plan.ends) if step <= end)
    batch = step - 1 + state.skipped_batches(before=step)
    with counting("shards read") as progress:
        sees, mixtures = plan.sees(stage), plan.mixtures(state)
        loader = Loader(recipe.data, *sees, recipe.seed, mixtures=mixtures, progress=progress)
    with counting("samples read") as progress:
        records = loader.records(batch, progress)
    found: list[BatchSample] = []
    for place, (record, caption, bad) in zip(loader.order.places(batch), records, strict=True):
        found.append(
            BatchSample(
                rank=len(found) * world // size,
                number=place.position,
                source=shown_url(recipe.data.train[place.source].label),
                shard=shown_url(record.shard),
                key=record.key,
                caption=caption,
                replaces=tuple(f"{entry.key}: {entry.reason}" for entry in bad),
            )
        )
    return StepBatch(step, batch, stage, tuple(found))


def _run(name: str, overrides: list[str]) -> tuple[Recipe, RunState]:
    """The recipe, and how far a run of it is known to have come; a recipe alone has no run."""
    folder = Path(name)
    if not (folder / RECIPE_FILE).is_file():
        return read_recipe(name, overrides).recipe, RunState()
    from ...training.checkpoint.commits import Commits
    from ...training.checkpoint.store import Store

    recipe = read_recipe(str(folder / RECIPE_FILE), overrides).recipe
    commits = Commits(Store(recipe.commits_url(folder)))
    state = commits.open(names[-1]).manifest.state if (names := commits.names()) else RunState()
    lineage = _lineage(folder / "lineage.json")  # a rollback stands there before the next commit knows of it
    return recipe, state.model_copy(update={"lineage": lineage}) if len(lineage) > len(state.lineage) else state


def _lineage(path: Path) -> tuple[Event, ...]:
    try:
        return tuple(Event.model_validate(row, strict=False) for row in json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return ()
