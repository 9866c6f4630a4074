"""Sweeps: `--sweep lr=1e-3,5e-4 --sweep data.batch=256,512` as runs, each with its folder and its overrides.

They are one sweep by the file sweep.json in the folder above them, which the report and `treering status` read.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...data.storage.atomic_write import atomic_write
from ...training.report.sweep_page import SWEEP_FILE, Member, read_sweep
from ..errors import RecipeError, safe_text, show
from ..recipe.schema import all_paths

MOST = 1000


@dataclass(frozen=True)
class GridPoint:
    """One run of a sweep: the name of its folder, and its values by keys of the recipe."""

    name: str
    values: Mapping[str, str]
    store: str | None

    @property
    def overrides(self) -> list[str]:
        """The overrides that turn the recipe into that of this run."""
        words = [f"{key}={value}" for key, value in self.values.items()]
        return words + ([f"checkpoint.to={json.dumps(self.store)}"] if self.store else [])


def grid_points(sweeps: list[str], store: str | None) -> list[GridPoint]:
    """The points of the grid; without a sweep a single one whose name is empty.

    `store` is the recipe's checkpoint.to, below which each run of a sweep gets a separate folder. Raises RecipeError.
    """
    if not sweeps:
        return [GridPoint("", {}, None)]
    axes: list[list[tuple[str, str, str]]] = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        choices = [value.strip() for value in values.split(",")]
        if not equals or not key or not all(choices):
            raise RecipeError(f"--sweep {show(text)}: write a key and its values, as in lr=1e-3,5e-4")
        if len(set(choices)) < len(choices):
            raise RecipeError(f"--sweep {show(text)} names a value twice; name each once")
        path = _path(key)
        if path == "checkpoint.to" or any(path == known for axis in axes for _, known, _ in axis[:1]):
            wrong = (
                "is given twice" if path != "checkpoint.to" else "is set by the sweep already, a folder for each run"
            )
            raise RecipeError(f"--sweep {show(text)}: {path} {wrong}; remove it")
        axes.append([(f"{key.rpartition('.')[2]}={value}", path, value) for value in choices])
    grid = list(itertools.product(*axes))
    if len(grid) > MOST:
        raise RecipeError(
            f"the sweep has {len(grid):,} runs; at most {MOST:,} are allowed in one job array; name fewer values"
        )
    names = ["_".join(re.sub(r"[^A-Za-z0-9.=+-]", "-", name) for name, _, _ in point) for point in grid]
    if len(set(names)) < len(names):
        raise RecipeError("two runs of the sweep would share a folder; write values that differ in letters and digits")
    return [
        GridPoint(name, {path: value for _, path, value in point}, store and f"{store.rstrip('/')}/{name}")
        for name, point in zip(names, grid, strict=True)
    ]


def write_sweep(folder: Path, points: list[GridPoint]) -> None:
    """Write sweep.json; runs of a sweep submitted to this folder earlier are kept. Raises RecipeError."""
    known = {member.name: member.values for member in _read(folder)} if is_sweep(folder) else {}
    folder.mkdir(parents=True, exist_ok=True)
    runs = known | {point.name: point.values for point in points}
    atomic_write(folder / SWEEP_FILE, json.dumps({"runs": runs}, indent=1), durable=True)


def is_sweep(folder: Path) -> bool:
    """Whether `folder` holds the runs of a sweep."""
    return (folder / SWEEP_FILE).is_file()


def members(folder: Path) -> list[Path]:
    """Folders of the runs of a sweep. Raises RecipeError."""
    return [folder / member.name for member in _read(folder)]


def _read(folder: Path) -> list[Member]:
    try:
        return read_sweep(folder)
    except ValueError as error:
        raise RecipeError(safe_text(str(error))) from None


def _path(key: str) -> str:
    """The full path of a key given by its last part, such as lr for optimizer.lr.

    Keys of training are preferred: batch is data.batch, not eval.batch.
    """
    paths = all_paths()
    if "." in key or key in paths:
        return key
    found = [path for path in paths if path.rpartition(".")[2] == key]
    training = [path for path in found if not path.startswith("eval.")]
    if len(training) == 1:
        return training[0]
    known = f"it could be {' or '.join(found[:4])}" if found else "no key has this name; see treering explain"
    raise RecipeError(f"--sweep {show(key)}: write the full path of the key; {known}")
