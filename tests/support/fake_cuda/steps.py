"""Steps on the fake device, in a process of their own: one JSON object of figures by case, or of what went wrong.

python -m treering.tests.support.fake_cuda.steps CASE ...
"""

from __future__ import annotations

from treering.tests.support.fake_cuda import loading

loading.load()  # before anything imports torch

# ruff: noqa: E402
import json
import sys
from typing import Any

import torch
from torch import Tensor

from treering.models.output import ModelOutput
from treering.tests.support.fake_cuda.cases import SETTINGS, TABLE, Case, loss_measured, measured, objective
from treering.tests.training.objectives import test_objective_contract as contract
from treering.training.objectives.base import Inputs
from treering.training.objectives.contrastive import Contrastive
from treering.training.objectives.scores import Relations
from treering.training.world import World


def figures(name: str) -> dict[str, Any]:
    """Of a case: of the table, a setting, `objective:` and the name of a variant, `loss:` and ranks, pairs, or a step
    that must fail."""
    kind, _, what = name.partition(":")
    if kind == "loss":
        size, pairs = map(int, what.split(","))
        alone = loss_measured(size, pairs, objective("contrastive"))
        return {"launches": alone.launches, "collectives": sum(alone.collectives.values())}
    if kind == "objective":
        term, fields = contract.CASES[contract.IDS.index(what)]
        case = Case(what, contract.SPEC, [contract.made(term, fields)], 64)
    elif name in WRONG:
        case = Case(name, contract.SPEC, [WRONG[name](1.0)], 64)
    else:
        case = (TABLE | SETTINGS)[name]()
    found, _ = measured(case)
    return {"launches": found.launches, "gigabytes": found.other_bytes / 1e9, "fp32": found.fp32_flops / 1e12}


class _Waits(Contrastive):
    """Reads a number of the device."""

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        factor = float(output.scale)
        return super().losses(output, inputs, relations, world) * factor


class _Mixes(Contrastive):
    """Multiplies with what is on the host."""

    def losses(self, output: ModelOutput, inputs: Inputs, relations: Relations, world: World) -> Tensor:
        losses_b = super().losses(output, inputs, relations, world)
        return losses_b * torch.ones(len(losses_b))


WRONG = {"waits": _Waits, "mixes": _Mixes}


def main(names: list[str]) -> None:
    answers = {}
    for name in names:
        try:
            answers[name] = figures(name)
        except Exception as error:  # the others are still measured
            answers[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
