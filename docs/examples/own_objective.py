"""A custom objective: `python docs/examples/own_objective.py [KEY=VALUE ...]`.

It keeps picture embeddings from all pointing in the same direction, by the square of their projection on their running
mean. It shows most of what an objective can have, such as state; most objectives need less. Run as a script it
registers the objective and trains with it for some seconds, in this process. A package declares its module as an entry
point instead, so that every process of a run finds it (docs/objectives.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import treering
from treering.models.output import ModelOutput
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.config import ObjectiveConfig
from treering.training.objectives.registry import register
from treering.training.world import World


class CentredConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    momentum: float = 0.9


@dataclass
class Centred(Objective):
    name = "centred"
    needs = frozenset({"embeddings"})  # of the model's output it reads image.pooled and text.pooled
    momentum: float = 0.9
    mean: list[float] = field(default_factory=list)

    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        image_be = F.normalize(output.image.pooled.float(), dim=-1)
        total_e = world.sum(image_be.sum(0)).double() / (len(image_be) * world.size)
        before_e = torch.tensor(self.mean).to(total_e) if self.mean else total_e
        self.mean = (self.momentum * before_e + (1 - self.momentum) * total_e).tolist()
        return self._projections(image_be).sum() / (len(image_be) * world.size)

    @torch.no_grad()
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        return self._projections(F.normalize(output.image.pooled.float(), dim=-1))

    def _projections(self, image_be: Tensor) -> Tensor:
        return (image_be @ torch.tensor(self.mean).to(image_be)).square()

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


@register("centred", CentredConfig)
def build(config: CentredConfig, seed: int) -> Objective:
    return Centred(config.weight, config.momentum)


def main(overrides: list[str]) -> None:
    """Train with this objective; `overrides` are recipe values such as `seed=1`."""
    shorter = ["data.batch=64", "stages=[{samples: 640}]", "schedule.warmup=128", "eval.every=null"]
    term = "objectives.centred={weight: 0.1, momentum: 0.8}"
    treering.train("emoji", [term, *shorter, *overrides], out="runs/own_objective", processes=1)


if __name__ == "__main__":
    main(sys.argv[1:])
