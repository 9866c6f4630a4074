"""Growing a run: from one engine to the next at a stage boundary.

The state goes through its logical form, so growth neither knows nor cares which engine held it, and a commit taken
before leads to the same grown model as the run that went straight on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.growth.plan import Copies, changes, plan_growth
from ..models.growth.rules import grown, grown_rate
from ..models.spec import ModelSpec
from .engine import Engine
from .objectives.base import Inputs


@dataclass(frozen=True)
class Growth:
    """What one growth did."""

    before: dict[str, int | float]
    after: dict[str, int | float]
    operators: list[dict[str, Any]]
    parameters_before: int
    parameters_after: int
    logit_difference: float | None
    """largest change of a similarity on the probe pairs at its own temperature; None if pictures change size"""
    seconds: float

    def json(self) -> dict[str, Any]:
        """For metrics.jsonl and the lineage."""
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
    copies: Copies,
) -> tuple[Engine, Growth]:
    """A new engine for `spec` that continues `engine`, weights and moments mapped; the old one is closed.

    `probe` is a batch on which the similarities before and after are compared. New units are `copies` of old ones, told
    apart by draws of `seed`. Raises SpecError for what cannot grow.
    """
    begun = time.monotonic()
    old = engine.model.spec
    operators = plan_growth(old, spec, seed, copies)
    if old.image.resolution != spec.image.resolution:
        probe = None  # the larger model sees other pictures
    before = None if probe is None else similarities(engine, probe)
    state, applied, skipped = engine.logical_state(), engine.applied, engine.skipped
    parameters = engine.parameters
    larger = build(spec)
    read = grown(operators, lambda kind, name: engine.whole(name, state[f"{kind}/{name}"]))
    # An average of weights grows as weights do.
    read_average = grown(operators, lambda _, name: engine.whole(name, state[f"ema/{name}"]))
    names = [name for name, _ in larger.model.named_parameters()]
    rates = {name: grown_rate(operators, engine.multipliers, name) for name in names}
    multipliers = {name: rate for name, rate in rates.items() if rate != 1.0}
    larger.expect(multipliers)
    wanted = [path.partition("/")[::2] for path in larger.logical_state()]
    larger.load_logical_state(
        {
            f"{kind}/{name}": larger.cut(name, read_average("model", name) if kind == "ema" else read(kind, name))
            for kind, name in wanted
        },
        applied,
        skipped,
        multipliers,
    )
    engine.close()
    moved = None if before is None or probe is None else (similarities(larger, probe) - before).abs().max().item()
    changed = changes(old, spec)
    return larger, Growth(
        before={path: sizes[0] for path, sizes in changed.items()},
        after={path: sizes[1] for path, sizes in changed.items()},
        operators=[operator.describe() for operator in operators],
        parameters_before=parameters,
        parameters_after=larger.parameters,
        logit_difference=moved,
        seconds=time.monotonic() - begun,
    )


@torch.no_grad()
def similarities(engine: Engine, inputs: Inputs) -> Tensor:
    """Scaled cosine similarities [b, b] of a batch's pictures and captions."""
    output = engine.output(inputs)
    image = torch.nn.functional.normalize(output.image.pooled, dim=-1)
    text = torch.nn.functional.normalize(output.text.pooled, dim=-1)
    return output.scale * image @ text.T
