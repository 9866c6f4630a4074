"""Resume: the newest intact commit of a run's store, checked against the recipe.

A damaged commit is reported and the one before it is used. A commit of another run is refused with the differences.
What the run has not reached yet may change: stages that have not begun, and sources that only they read, for data that
arrives during training. So may where data and tokenizer are: what is in them is compared (same_data.py), not
their URLs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor

from ...data.shards.parallel import Progress, silent
from ..checkpoint.commits import Commits
from ..checkpoint.manifest import Commit, DamagedCommit
from ..checkpoint.store import StoreError
from ..engines.layout import Layout
from ..recipe import Recipe
from ..state import RunState
from ..world import World

_T = TypeVar("_T")

CONTINUES = ("seed", "data", "model", "objectives", "stages", "optimizer", "schedule")
"""blocks of the recipe that decide what is computed; the others may change at a resume"""
_FREE = {"data.workers", "data.max_bad_fraction", "data.cache.limit"}


def newest_intact(
    commits: Commits,
    names: Sequence[str],
    prepare: Callable[[Commit], Layout | None],
    warn: Callable[[str], None],
    world: World,
    progress: Progress = silent,
) -> tuple[Commit, dict[str, Tensor]] | None:
    """The newest commit of `names` whose checksums all verify, and this rank's part of its tensors; None if there is
    none.

    `prepare` makes what the tensors will go into, and says which part of them that is. `warn` is called for
    damaged commits; all ranks agree on the one that is taken. `progress(done, total)` counts parts.
    Raises StoreError if all are damaged.
    """

    def attempt(read: Callable[[], _T]) -> _T | None:
        found, damage = None, None
        try:
            found = read()
        except DamagedCommit as error:
            damage = str(error)
        damages = [d for d in world.objects(damage) if d]
        if damages:
            warn(damages[0])
        return None if damages else found

    for name in reversed(names):
        commit = attempt(partial(commits.verified, name, stored=world.is_first))
        if commit is not None:
            layout = prepare(commit)
            tensors = attempt(partial(commit.tensors, layout=layout, progress=progress))
            if tensors is not None:
                return commit, tensors
    if names:
        raise StoreError(
            f"every commit in {commits.store.url} is damaged; move them away to start over, or restore one"
        )
    return None


def check_same_run(recipe: Recipe, commit: Commit) -> list[str]:
    """What the recipe changes of the run's future, as sentences for the lineage. Raise StoreError if it changes what
    the run has computed up to the commit."""
    state = commit.manifest.state
    if not state.step and {part.kind for part in commit.manifest.parts} == {"model"}:
        raise StoreError(
            f"{commit.url} holds weights alone, which a run begins with and does not continue; repeat the command with "
            f"another --out and 'init_from={{commit: {commit.url}}}'"
        )
    try:  # a field that is newer than the commit has its default there; the engine may be any
        before = Recipe.model_validate({key: value for key, value in commit.manifest.recipe.items() if key != "engine"})
    except ValidationError as error:
        raise StoreError(
            f"{commit.url} was written by another release, whose recipe has keys that this one does not know "
            f"({'.'.join(map(str, error.errors()[0]['loc']))}); continue it with that release"
        ) from None
    different = differences(_past(recipe, state), _past(before, state))
    if different:
        raise StoreError(
            f"{commit.url} is of a run with another recipe ({'; '.join(different[:4])}); "
            f"use the same recipe to continue it, or begin a new run with its weights: repeat the command with another "
            f"--out and 'init_from={{commit: {commit.url}}}'"
        )
    cooling = before.schedule.falls_from(before.total_samples)
    if recipe.total_samples != before.total_samples and state.samples > cooling:
        raise StoreError(
            f"{commit.url} is of a run whose learning rate has been falling since sample {cooling:,.0f}: its "
            f"stages can no longer change; leave them as they were, continue from an earlier commit, or start a new run"
        )
    return differences(*(each.model_dump(mode="json", include={"data", "stages"}) for each in (recipe, before)))


def state_for(recipe: Recipe, commit: Commit) -> RunState:
    """The state of a commit of this run, without what was found for a recipe that has changed since: the best value of
    another score than `checkpoint.keep_best` names now, and trials of a search for another future."""
    state = commit.manifest.state
    before = Recipe.model_validate({key: value for key, value in commit.manifest.recipe.items() if key != "engine"})
    if before.checkpoint.keep_best != recipe.checkpoint.keep_best:
        state = state.model_copy(update={"best": None})
    if state.trials and _future(before) != _future(recipe):
        state = state.model_copy(update={"trials": ()})
    return state


def _future(recipe: Recipe) -> dict[str, Any]:
    """What decides the result of a trial, wherever the data are."""
    future = recipe.model_dump(mode="json", include=set(CONTINUES))
    future["data"]["tokenizer"] = None
    for source in future["data"]["train"]:
        source["source"] = None
    return {path: leaf for path, leaf in _flat(future).items() if path not in _FREE}


def _past(recipe: Recipe, state: RunState) -> dict[str, Any]:
    """The part of a recipe that determined a state: stages that have begun, sources that were read."""
    past = recipe.model_dump(mode="json", include=set(CONTINUES))
    mixtures = [mixture for mixture in recipe.settled(state.decisions).mixtures() if mixture.step < max(state.step, 1)]
    for i, source in enumerate(past["data"]["train"]):
        source["weight"] = {str(mixture.step): mixture.weights[i] for mixture in mixtures}
        if i < len(state.data):  # its samples are compared (same_data.py): they may be anywhere
            source["source"] = None
    if state.tokenizer:
        past["data"]["tokenizer"] = None
    read = [source for source in past["data"]["train"] if any(source["weight"].values())]
    past["data"]["train"] = {str(past["data"]["train"].index(source)): source for source in read}
    past["stages"] = [{**stage, "mixture": None, "replay": None} for stage in past["stages"][: state.stage + 1]]
    return past


def differences(ours: Any, theirs: Any) -> list[str]:
    """Differences between two recipes, as sentences."""
    ours, theirs = _flat(ours), _flat(theirs)
    return [
        f"{path}: {theirs.get(path)!r} there, {ours.get(path)!r} here"
        for path in sorted(ours.keys() | theirs.keys())
        if path not in _FREE and ours.get(path) != theirs.get(path)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return {prefix[:-1]: tree}
    return {path: leaf for key, value in items for path, leaf in _flat(value, f"{prefix}{key}.").items()}
