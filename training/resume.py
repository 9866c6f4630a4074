"""Where a run begins: at the newest intact commit of its store, or at the first step.

A damaged commit is named and the one before it is taken. A commit of another experiment is refused: a resume continues
the very run, or says what differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor

from .commits import Commit, Commits, DamagedCommit
from .recipe import Recipe
from .shards import Layout
from .store import StoreError
from .world import World

_T = TypeVar("_T")

CONTINUES = ("seed", "data", "model", "objectives", "stages", "optimizer", "schedule")
"""blocks of the recipe that decide what is computed; the others may change at a resume"""
_FREE = {"data.workers", "data.bad_samples", "data.cache.limit"}


def newest_intact(
    commits: Commits,
    names: Sequence[str],
    prepare: Callable[[Commit], Layout | None],
    warn: Callable[[str], None],
    world: World,
) -> tuple[Commit, dict[str, Tensor]] | None:
    """The newest of the commits `names` whose every byte verifies, and this rank's part of its tensors; None of none.

    `prepare` makes what the tensors will go into, and says which part of them that is. Damaged commits are told to
    `warn`; all ranks agree on the one that is taken. Raises StoreError if all are damaged.
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
        commit = attempt(partial(commits.open, name))
        if commit is not None:
            layout = prepare(commit)
            tensors = attempt(partial(commit.tensors, layout=layout))
            if tensors is not None:
                return commit, tensors
    if names:
        raise StoreError(
            f"every commit in {commits.store.url} is damaged; move them away to start over, or restore one"
        )
    return None


def check_same_run(recipe: Recipe, commit: Commit) -> None:
    """Raise StoreError if the commit belongs to a run that computes something else."""
    written = commit.manifest.recipe
    with contextlib.suppress(ValidationError):  # a field that is newer than the commit has its default there
        written = Recipe.model_validate(written).model_dump(mode="json")
    ours, theirs = _flat(recipe.model_dump(mode="json")), _flat(written)
    different = [
        f"{path}: {theirs.get(path)!r} there, {ours.get(path)!r} here"
        for path in sorted(ours.keys() | theirs.keys())
        if path.split(".")[0] in CONTINUES and path not in _FREE and ours.get(path) != theirs.get(path)
    ]
    if different:
        raise StoreError(
            f"{commit.url} is of a run with another recipe ({'; '.join(different[:4])}); "
            f"use the same recipe to continue it, or another --out to start a new run"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = list(enumerate(tree))
    else:
        return {prefix[:-1]: tree}
    return {path: leaf for key, value in items for path, leaf in _flat(value, f"{prefix}{key}.").items()}
