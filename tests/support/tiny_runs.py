"""Runs so small that a test makes several of them: their sizes, their logs, and an end at a chosen place.

Real kills are in tests/launch; here the exact place is chosen, and nothing after it runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.training import loop
from treering.training.checkpoint.commits import find_commit
from treering.training.recipe import Recipe

SIZES = [
    "data.batch=12",
    "model.embed_dim=16",
    "model.image={width: 16, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 8, depth: 1, heads: 2, context: 16}",
    "schedule.warmup=24",
    "log.every=1",
]
"""overrides of the bundled recipe: a model that makes a step in milliseconds"""


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of this kind in a run's log."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def measured(out: Path, *names: str) -> list[tuple[Any, ...]]:
    """The step and these figures of each step line of a run's log."""
    return [(row["step"], *(row[name] for name in names)) for row in lines(out, "step")]


class Died(Exception):
    """Stands in for a kill."""


@contextlib.contextmanager
def dies(method: str, step: int, last: Callable[[loop.Run], None] | None = None) -> Iterator[None]:
    """The run inside dies where it would call `Run.method` at this step; `last` is done just before."""
    real = getattr(loop.Run, method)

    def dying(run: loop.Run, *arguments: Any) -> Any:
        if run.state.step == step:
            if last is not None:
                last(run)
            raise Died
        return real(run, *arguments)

    setattr(loop.Run, method, dying)
    try:
        with pytest.raises(Died):
            yield
    finally:
        setattr(loop.Run, method, real)


def train_through(at: str, recipe: Recipe, out: Path) -> None:
    """Train to the end, with a death `at` a method of `Run` and a step, as in "enter 4", and a resume."""
    method, step = at.split()
    with dies(method, int(step)):
        loop.train(recipe, out)
    assert loop.train(recipe, out).finished


def train_until(step: int, recipe: Recipe, out: Path) -> None:
    """Train, and die when this step begins, with the commits before it complete."""
    with dies("step", step, lambda run: run.uploads.finish() and None):
        loop.train(recipe, out)


def same_end(one: Path, other: Path) -> None:
    """Two runs ended with the same multipliers and, bit for bit, the same tensors."""
    ours, theirs = find_commit(str(one)), find_commit(str(other))
    assert ours.manifest.state.multipliers == theirs.manifest.state.multipliers
    mine, its = ours.tensors(), theirs.tensors()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[path], its[path]) for path in mine)
