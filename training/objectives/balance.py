"""Load balancing: each expert of a mixture should get the same number of tokens (Switch, Fedus et al., arXiv
2101.03961).

Shape suffix: e experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ...models.output import ModelOutput
from ..world import World
from .base import Inputs, Objective
from .config import ObjectiveConfig
from .registry import register


class BalanceConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    """Load balancing over the experts of a mixture (Switch)."""

    weight: float = Field(0.01, ge=0, description="factor of the term in the loss")


@dataclass
class Balance(Objective):
    """L = mean over mixtures of E * sum_e f_e p_e; 1 if the load is uniform.

    f_e is the fraction of the global batch's routing choices that went to expert e, p_e the mean of its gate. Only p_e
    has a gradient.
    """

    name = "balance"
    needs = frozenset({"routing"})

    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The gates of this rank's tokens, weighted by the routing choices of all ranks."""
        total = output.scale.new_zeros(())
        for counts_e, gates_e in output.routing:
            choices_e = world.sum(counts_e.float())
            tokens = world.sum(gates_e.detach().float().sum())  # a token's gates sum to one
            total = total + len(choices_e) * torch.dot(choices_e / choices_e.sum(), gates_e.float()) / tokens
        return total / max(1, len(output.routing))

    @torch.no_grad()
    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        """The term, repeated for every sample: it is a property of the batch."""
        return world.sum(self.partial_loss(output, inputs, table, world)).expand(len(inputs.lengths))


@register("balance", BalanceConfig)
def _balance(config: BalanceConfig, seed: int) -> Objective:
    return Balance(config.weight)
