"""A part that the model did not have: shared blocks, or the tower of another modality. Nothing else changes by a bit.

The part is drawn as a fresh model's, from the streams of its tensors' names. It is neutral where it starts: shared
blocks stand behind gates at zero, and no other tower reads that of a modality. The optimizer has seen nothing of it, so
both moments start at zero. A first Adam step that comes late in the step count is shorter than the learning rate with
betas[1] = 0.98, and three times as long with 0.999; `rewarm` shortens the first steps where that matters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import empty, initialise
from ..parts import part_of, parts
from ..spec import ModelSpec
from .operator import Rule, fresh


@dataclass(frozen=True)
class NewPart:
    """Add the part called `part` to a model that is otherwise of `spec`."""

    spec: ModelSpec
    part: str
    seed: int
    preserves: ClassVar[bool] = True

    def rule(self, name: str) -> Rule:
        """Tensors outside the part are kept."""
        shape = self._shapes.get(name)
        if shape is None:
            return Rule(name)

        def draw() -> Tensor:
            made = torch.empty(shape)
            initialise(self.spec, [(name, made)], self.seed)
            return made

        # Any tensor of the old model will do as a source.
        return Rule("logit_scale", fresh(shape, draw, second_moment="zero"), fresh=True)

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in empty(self.spec).named_parameters() if part_of(name) == self.part}

    def describe(self) -> dict[str, Any]:
        """For the lineage."""
        row = next(row for row in parts(self.spec) if row.name == self.part)
        numbers = {"from": 0, "to": row.depth, "seed": self.seed}
        # GrowCLIP's way of sharing blocks is not public.
        reconstruction = {"reconstruction": True} if self.part == "shared" else {}
        return {"operator": "new_part", "field": f"{self.part}.depth", **numbers, **reconstruction}
