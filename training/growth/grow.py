"""Grows a run at a stage boundary: from one engine to the next.

State is mapped in its logical form (names and shapes without sharding), so growth does not depend on the engine, and
growing from a commit gives the same model as growing in the uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...models.growth.inherit import ResetMoments
from ...models.growth.operator import GrownState, Operator, Read, grown_rate, is_fresh, source_of
from ...models.growth.plan import changes, plan_growth
from ...models.model import empty
from ...models.spec import ModelSpec
from ..engines.base import Engine
from ..engines.optimizer import OptimizerConfig
from ..objectives.base import Inputs
from ..stages import GrowthConfig


class _LogicalState(Mapping[str, Tensor]):
    """An engine's state by `kind/name`; a tensor is gathered from its shards when all ranks read it together."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._state = engine, engine.logical_state()

    def __getitem__(self, path: str) -> Tensor:
        return self._engine.whole(path.partition("/")[2], self._state[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@dataclass(frozen=True)
class Growth:
    """The record of one growth."""

    before: dict[str, int | float]
    after: dict[str, int | float]
    operators: list[dict[str, Any]]
    parameters_before: int
    parameters_after: int
    logit_difference: float | None
    """largest change of a similarity, scaled by the temperature, on the probe pairs; None if the image size changes.
    Only rounding error unless an operator is lossy."""
    seconds: float

    def json(self) -> dict[str, Any]:
        """The record for metrics.jsonl and the lineage."""
        return {
            "from": self.before,
            "to": self.after,
            "operators": self.operators,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "logit_difference": self.logit_difference,
            "seconds": self.seconds,
        }


def grow(
    engine: Engine,
    build: Callable[[ModelSpec], Engine],
    spec: ModelSpec,
    probe: Inputs | None,
    seed: int,
    how: GrowthConfig,
    fade: float = 1.0,
) -> tuple[Engine, Growth]:
    """A new engine for `spec` that continues `engine`: weights and moments are mapped, and the old engine is closed.

    `probe` is a batch on which similarities before and after are compared. `seed` determines all random numbers. `fade`
    is the power that the old multipliers are raised to. Raises SpecError if the growth is not possible.
    """
    begun = time.monotonic()
    old = engine.model.spec
    if old.image.resolution != spec.image.resolution:
        probe = None  # the larger model reads pictures of another size
    before = None if probe is None else similarities(engine, probe, old)
    parameters = engine.parameters
    larger, operators = enlarged(engine, build, spec, seed, how, fade)
    engine.close()
    moved = None if before is None or probe is None else (similarities(larger, probe, old) - before).abs().max().item()
    changed = changes(old, spec)
    return larger, Growth(
        before={path: sizes[0] for path, sizes in changed.items()},
        after={path: sizes[1] for path, sizes in changed.items()},
        operators=described(operators),
        parameters_before=parameters,
        parameters_after=larger.parameters,
        logit_difference=moved,
        seconds=time.monotonic() - begun,
    )


def enlarged(
    engine: Engine, build: Callable[[ModelSpec], Engine], spec: ModelSpec, seed: int, how: GrowthConfig, fade: float
) -> tuple[Engine, list[Operator]]:
    """A new engine for `spec` that continues `engine`, and the growth operators. `engine` is not changed. See
    `grow`."""
    state = _LogicalState(engine)
    operators = planned(engine.model.spec, spec, seed, how, lambda kind, name: state[f"{kind}/{name}"])
    larger = build(spec)
    old, optimizer = engine.model.spec, engine.optimizer_config
    multipliers = grown_rates(operators, engine.multipliers, fade, old, spec, optimizer)
    larger.expect(multipliers)
    grown = GrownState(operators, state, larger.logical_state())
    larger.load_logical_state(
        {path: larger.cut(path.partition("/")[2], grown[path]) for path in grown},
        0 if how.moments == "reset" and operators else engine.applied,
        engine.skipped,
        multipliers,
    )
    return larger, operators


def planned(old: ModelSpec, new: ModelSpec, seed: int, how: GrowthConfig, read: Read) -> list[Operator]:
    """The operators from `old` to `new` with the options in `how`; `read` reads the old state."""
    operators = plan_growth(
        old, new, seed, how.width_init, how.depth_init, how.token_init, how.drop_blocks, how.inherit, read
    )
    zeroed = {"map": (), "keep_v": ("exp_avg",), "reset": ("exp_avg", "exp_avg_sq")}[how.moments]
    return [*operators, ResetMoments(zeroed)] if operators and zeroed else operators


def grown_rates(
    operators: Sequence[Operator],
    multipliers: Mapping[str, float],
    fade: float,
    old: ModelSpec,
    new: ModelSpec,
    optimizer: OptimizerConfig,
) -> dict[str, float]:
    """Learning-rate multipliers of the grown model's tensors, without those that are 1.

    The old multipliers are raised to the power `fade`. Under Muon, all singular values of an update are equal. A matrix
    widened by copies keeps its old rank, so the entries of its update shrink by sqrt(old / new shorter side); the
    multiplier compensates for that here.
    """
    now = {name: factor**fade for name, factor in multipliers.items()}
    before, after = tensor_shapes(old), tensor_shapes(new)
    rates = {name: grown_rate(operators, now, name) for name in after}
    for name, source in ((name, source_of(operators, name)) for name in after if optimizer.muon(name)):
        if optimizer.muon(source) and not is_fresh(operators, name):
            rates[name] *= (min(after[name]) / min(before[source])) ** 0.5
    return {name: rate for name, rate in rates.items() if rate != 1.0}


def tensor_shapes(spec: ModelSpec) -> dict[str, torch.Size]:
    """Names and shapes of a model's parameters, without allocating them."""
    return {name: p.shape for name, p in empty(spec).named_parameters()}


def described(operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """The operators as records for the lineage; a lossy one is marked `lossy`."""
    return [operator.describe() | ({} if operator.preserves else {"lossy": True}) for operator in operators]


@torch.no_grad()
def similarities(engine: Engine, inputs: Inputs, spec: ModelSpec) -> Tensor:
    """Scaled cosine similarities [m, b, b] of a batch's captions with its pictures and with the m - 1 modality towers
    of `spec`."""
    output = engine.output(inputs)
    text = F.normalize(output.text.pooled, dim=-1)
    towers = [output.image, *(output.modalities[name] for name in sorted(spec.modalities))]
    scales = [output.scale if tower.scale is None else tower.scale for tower in towers]
    each = zip(towers, scales, strict=True)
    return torch.stack([scale * F.normalize(tower.pooled, dim=-1) @ text.T for tower, scale in each])
