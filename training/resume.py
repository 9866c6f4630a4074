"""Where a run begins: at the newest intact commit of its store, or at the first step.

A damaged commit is named and the one before it is taken. A commit of another experiment is refused: a resume continues
the very run, or says what differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from .commits import Commit, Commits, DamagedCommit
from .recipe import Recipe
from .store import StoreError

CONTINUES = ("seed", "data", "model", "objectives", "stages", "optimizer", "schedule")
"""blocks of the recipe that decide what is computed; the others may change at a resume"""
_FREE = {"data.workers", "data.bad_samples", "data.cache.limit"}


def newest_intact(commits: Commits, warn: Callable[[str], None]) -> tuple[Commit, dict[str, Tensor]] | None:
    """The newest commit that verifies, and its tensors; None if there never was one.

    Damaged ones are told to `warn`. Raises StoreError if all are damaged.
    """
    names = commits.names()
    for name in reversed(names):
        try:
            commit = commits.open(name)
            return commit, commit.tensors()
        except DamagedCommit as damage:
            warn(str(damage))
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
