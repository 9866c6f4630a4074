"""Compares models task by task on the same queries; also one model before and after a growth.

The first model is the baseline that the others are compared with. If a score is a mean over queries, its difference has
a paired bootstrap interval. If each query is right or wrong, flips are counted, and tested with McNemar's exact test if
the queries are independent; else the p-value is the bootstrap's, which draws captions of one picture together. With
many tasks some differences appear by chance, so p-values are adjusted with Holm's method over all tasks of a pair.

A run also compares its model with the one before its last growth. A model that is better on average can still get
queries wrong that it had right (negative flips: Yan et al., arXiv 2011.09161), so the records of a run store one bit
for each query of an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.errors import DataError, shown
from ...data.order import stable_hash
from ..report.readable import counts_first, lower_is_better
from .outcome import Evaluation
from .reliability import compare, difference, holm

_SHOWN = 8  # flips listed per task
_LONGEST = 1_000  # characters of each


@dataclass(frozen=True)
class Change:
    """The change of one score from the first model to another."""

    value: float
    """its score minus the first model's"""
    low: float | None = None
    high: float | None = None
    """the 95% interval of the difference; None: the score is not a mean over queries"""
    lost: int | None = None
    """negative flips: queries that the first model has right and this one wrong; None: queries are not right or
    wrong"""
    won: int | None = None
    """positive flips"""
    p_value: float | None = None
    adjusted: float | None = None
    """the p-value adjusted with Holm's method"""
    flips: tuple[str, ...] = ()
    """the first few lost queries"""

    def json(self) -> dict[str, Any]:
        """As a plain object."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in self.__dict__.items()}


@dataclass(frozen=True)
class Task:
    """One score of all models."""

    key: str
    queries: int | None
    values: tuple[float, ...]
    intervals: tuple[tuple[float, float] | None, ...]
    chance: float | None
    changes: tuple[Change, ...]
    """one for each model but the first"""

    def json(self) -> dict[str, Any]:
        """As a plain object."""
        fields = {name: list(v) if isinstance(v, tuple) else v for name, v in self.__dict__.items()}
        lower = lower_is_better(self.key)
        return fields | {"changes": [each.json() for each in self.changes], "lower_is_better": lower}


def tasks(names: Sequence[str], found: Sequence[Evaluation]) -> list[Task]:
    """Compare the scores that all models have; `names` are the models' names for messages.

    Raises DataError if the models have no score in common or were not evaluated on the same queries.
    """
    first, *others = found
    keys = [key for key in first.scores if all(key in other.scores for other in others)]
    if not keys:
        raise DataError(f"{names[0]} and {names[1]} have no score in common; name suites that both can be evaluated on")
    columns = [[_change(key, first, other, (names[0], name)) for key in keys] for name, other in _pairs(names, others)]
    adjusted = [_adjusted(column) for column in columns]
    return [
        Task(
            key,
            len(first.queries[key]) if key in first.queries else None,
            tuple(each.scores[key] for each in found),
            tuple(each.intervals.get(key) for each in found),
            first.chance.get(key),
            tuple(column[row] for column in adjusted),
        )
        for row, key in enumerate(keys)
    ]


def _pairs(names: Sequence[str], others: Sequence[Evaluation]) -> list[tuple[str, Evaluation]]:
    return list(zip(names[1:], others, strict=True))


def _change(key: str, first: Evaluation, other: Evaluation, names: tuple[str, str]) -> Change:
    value = other.scores[key] - first.scores[key]
    if key not in first.queries or key not in other.queries:
        return Change(value)
    if list(first.names[key]) != list(other.names[key]):
        raise DataError(
            f"{names[0]} and {names[1]} were not evaluated on the same queries of {shown(key)}: some samples can "
            "be used by only one of them; see the ledger of the evaluation set"
        )
    before, after = first.queries[key], other.queries[key]
    groups = first.groups.get(key)
    drawn = difference(before, after, group_n=groups)
    change = Change(value, drawn.low, drawn.high, p_value=drawn.p_value)
    if not _right_or_wrong(before, after):
        return change
    lost = before & ~after
    flips = tuple(first.names[key][i][:_LONGEST] for i in lost.nonzero()[:_SHOWN, 0].tolist())
    won, p_value = int((~before & after).sum()), drawn.p_value if groups is not None else compare(before, after).p_value
    return replace(change, lost=int(lost.sum()), won=won, p_value=p_value, flips=flips)


def _right_or_wrong(*values: Tensor) -> bool:
    return all(each.dtype == torch.bool for each in values)


def _adjusted(column: Sequence[Change]) -> list[Change]:
    tested = [i for i, change in enumerate(column) if change.p_value is not None]
    values = dict(zip(tested, holm([column[i].p_value or 0.0 for i in tested]), strict=True))
    return [replace(change, adjusted=values.get(i)) for i, change in enumerate(column)]


def comparison(models: Sequence[Mapping[str, Any]], compared: Sequence[Task]) -> dict[str, Any]:
    """The comparison as one plain object; `models` describes each model, the first (baseline) one first."""
    return {"models": [dict(model) for model in models], "tasks": [task.json() for task in compared]}


def bits(found: Evaluation) -> dict[str, dict[str, Any]]:
    """For each score with right-or-wrong queries (rank one only): a bit mask of the right ones and a hash of the
    queries."""
    return {
        key: {
            "right": np.packbits(right.numpy()).tobytes().hex(),
            "queries": len(right),
            "query_hash": stable_hash(*found.names[key]),
            "independent": key not in found.groups,
        }
        for key, right in found.queries.items()
        if right.dtype == torch.bool and counts_first(key)
    }


def flips(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By score: `lost`, `won`, the number of `queries`, and McNemar's `p_value` (None for queries that are not
    independent); `before` and `after` are from `bits`.

    Scores whose queries differ are skipped.
    """
    found = {}
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if (old["queries"], old["query_hash"]) == (new["queries"], new["query_hash"]):
            compared = compare(_right(old), _right(new))
            count = old["queries"]
            lost, won = round(compared.negative_flips * count), round(compared.positive_flips * count)
            p_value = compared.p_value if new["independent"] else None
            found[key] = {"lost": lost, "won": won, "queries": count, "p_value": p_value}
    return dict(sorted(found.items()))


def _right(saved: Mapping[str, Any]) -> Tensor:
    packed = np.frombuffer(bytes.fromhex(saved["right"]), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=saved["queries"]).astype(bool))
