"""Starts a run from a commit of another run: from its weights alone, or from its whole state."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...data.shards.parallel import Progress, silent
from ..checkpoint.commits import find_commit, print_warning
from ..checkpoint.manifest import Commit
from ..checkpoint.store import StoreError
from ..checkpoint.validation import recipe_of
from ..engines.base import Engine
from ..recipe import Recipe
from ..state import Event, RunState
from .resume import differences


def open_origin(recipe: Recipe, warn: Callable[[str], None] = print_warning) -> Commit:
    """The commit that the recipe's `init_from` names; `warn` is called for newer ones that are damaged. Raises
    StoreError if the run cannot begin with it."""
    assert recipe.init_from
    commit, load = find_commit(recipe.init_from.commit, warn), recipe.init_from.load
    state = commit.manifest.state
    if load == "all":
        _check_all(recipe, commit)
    spec = recipe.specs()[state.stage if load == "all" else 0]
    ours, theirs = spec.model_dump(mode="json"), commit.manifest.spec.model_dump(mode="json")
    if different := differences(ours, theirs):
        shape = f", by {' '.join(_overrides('model', theirs, ours))}" if spec == recipe.model else ""
        raise StoreError(
            f"{commit.url} has a model of another shape ({'; '.join(different[:4])}); give the recipe that "
            f"shape{shape}, or bring the commit to the recipe's by `treering grow`"
        )
    return commit


def _overrides(path: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """What to write behind a command so that the values `ours` at `path` of the recipe become `theirs`."""
    for key, value in theirs.items():
        mine = ours.get(key)
        if value == mine:
            continue
        if isinstance(value, dict) and isinstance(mine, dict) and value.keys() == mine.keys():
            yield from _overrides(f"{path}.{key}", value, mine)
        else:
            yield shlex.quote(f"{path}.{key}={json.dumps(value)}")


def _check_all(recipe: Recipe, commit: Commit) -> None:
    """Raise StoreError if the recipe cannot continue with the whole state of a commit."""
    state, batch = commit.manifest.state, recipe.data.batch
    remedy = "change the recipe, or load only the weights"
    if state.samples != state.step * batch:
        raise StoreError(f"{commit.url} was trained in batches other than data.batch = {batch}; {remedy}")
    ends = [0]
    for stage in recipe.stages:
        ends.append(ends[-1] + stage.steps(batch))
    if state.stage >= len(recipe.stages) or not ends[state.stage] <= state.step <= ends[state.stage + 1]:
        raise StoreError(
            f"{commit.url} is at step {state.step} of stage {state.stage}, which is not in the recipe; {remedy}"
        )
    kinds = {part.kind for part in commit.manifest.parts}
    lacking = sorted(set(recipe.optimizer.kinds) - kinds)
    if lacking:
        raise StoreError(f"{commit.url} has no {lacking[0]}, which the recipe's optimizer needs; {remedy}")
    theirs = recipe_of(commit).optimizer.kind
    if theirs == "muon" != recipe.optimizer.kind:
        raise StoreError(
            f"{commit.url} was trained with optimizer.kind = muon, which leaves AdamW no second moment of the matrices "
            f"inside of blocks; set optimizer.kind: muon, or load only the weights"
        )


def begin_with(recipe: Recipe, commit: Commit, engine: Engine, progress: Progress = silent) -> RunState:
    """Load what the recipe takes from `commit` into a fresh engine of the same shape; returns the initial state.

    The lineage says where it came from: what came before stands in it (all), or in its first event (weights). All ranks
    call this. `progress(done, total)` counts parts. Raises DamagedCommit.
    """
    assert recipe.init_from
    load, theirs = recipe.init_from.load, commit.manifest.state
    detail: dict[str, Any] = {"commit": commit.url, "load": load}
    if load == "all":
        engine.expect(theirs.multipliers)
        tensors = commit.tensors(layout=engine.layout, progress=progress)
        tensors = {path: tensor for path, tensor in tensors.items() if recipe.optimizer.keeps(*path.split("/", 1))}
        engine.load_logical_state(tensors, theirs.applied, theirs.skipped, theirs.multipliers)
        event = Event(event="from", step=theirs.step, samples=theirs.samples, detail=detail)
        return theirs.model_copy(
            update={
                "lineage": (*theirs.lineage, event),
                "attempt": 0,
                "seconds": 0.0,  # this run's own
                "data": (),
                "tokenizer": "",
                "best": None,
                "trials": (),
            }
        )
    weights = commit.tensors("model", engine.layout, progress)
    state = dict(weights)
    for kind in recipe.optimizer.kinds:
        for path, tensor in weights.items():
            name = path.partition("/")[2]
            if recipe.optimizer.keeps(kind, name):
                state[f"{kind}/{name}"] = tensor.clone() if kind == "ema" else torch.zeros_like(tensor)
    engine.load_logical_state(state, 0, 0, {})
    before = [event.model_dump() for event in theirs.lineage]
    detail |= {"step": theirs.step, "samples": theirs.samples, "lineage": before}
    return RunState(lineage=(Event(event="from", step=0, samples=0, detail=detail),))
