"""Sweeps: `--sweep lr=1e-3,5e-4 --sweep data.batch=256,512` as overrides, a list for each run of the grid."""

from __future__ import annotations

import itertools
import re

from .errors import RecipeError, show
from .schema import all_paths

MOST = 1000


def expand(sweeps: list[str]) -> list[tuple[str, list[str]]]:
    """The name of each run's folder, and its overrides; one run without a name if there is no sweep."""
    axes = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        choices = [value.strip() for value in values.split(",")]
        if not equals or not key or not all(choices):
            raise RecipeError(f"--sweep {show(text)}: write a key and its values, as in lr=1e-3,5e-4")
        if len(set(choices)) < len(choices):
            raise RecipeError(f"--sweep {show(text)} names a value twice")
        path = _path(key)
        axes.append([(f"{key.rpartition('.')[2]}={value}", f"{path}={value}") for value in choices])
    grid = list(itertools.product(*axes))
    if len(grid) > MOST:
        raise RecipeError(f"the sweep has {len(grid):,} runs; at most {MOST:,} fit into one job array")
    names = ["_".join(re.sub(r"[^A-Za-z0-9.=+-]", "-", name) for name, _ in point) for point in grid]
    if len(set(names)) < len(names):
        raise RecipeError("two runs of the sweep would share a folder; write values that differ in letters and digits")
    return [(name, [override for _, override in point]) for name, point in zip(names, grid, strict=True)]


def _path(key: str) -> str:
    """The whole path of a key that is given by its last part, as lr for optimizer.lr."""
    if "." in key:
        return key
    found = [path for path in all_paths() if path.rpartition(".")[2] == key]
    if len(found) != 1:
        known = f"it could be {' or '.join(found[:4])}" if found else "there is none; see treering explain"
        raise RecipeError(f"--sweep {show(key)}: write the whole path of the key; {known}")
    return found[0]
