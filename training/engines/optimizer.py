"""AdamW, or Muon with AdamW for what Muon is not for, addressed by logical names.

Matrices decay; biases, norms, embeddings and learned scalars do not. The state is read and written as
`{kind: {parameter name: tensor}}`, which is what commits store and growth maps. Growth leaves multipliers: a parameter
that became k times smaller steps 1/k as far and decays k times as fast, so that lr x decay stays what it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from ...models.parts import is_table
from ..world import World
from .layout import Layout
from .muon import Muon, hidden

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), and Muon if asked for."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: the matrices inside of blocks by Muon, the rest by AdamW, at one learning rate"
    )
    lr: float = Field(1.0e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices, multiplied by the learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), strict=False, description="decay of the two moments")
    eps: float = Field(1.0e-6, gt=0)
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of a running average of the weights that a step keeps; it is then evaluated",
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of parameters beside their weights."""
        return (*MOMENTS, "ema") if self.ema else MOMENTS

    def muon(self, name: str) -> bool:
        """Whether Muon steps the parameter of this name."""
        return self.kind == "muon" and hidden(name)

    def keeps(self, kind: str, name: str) -> bool:
        """Whether this kind of state is kept of the parameter of this name; Muon has no second moment."""
        return kind == "model" or (kind in self.kinds and not (kind == "exp_avg_sq" and self.muon(name)))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, except tables that are looked up row by row."""
    return parameter.ndim >= 2 and not is_table(name)


def pace(adam: torch.optim.Optimizer, lr: float, fade: float) -> None:
    """Set the coming step's rates: `lr` and the decay by each group's multiplier raised to the power `fade`, which
    leaves multipliers at 1 and makes them 1 at 0."""
    for group in adam.param_groups:
        factor = group["multiplier"] ** fade
        group["lr"], group["weight_decay"] = lr * factor, group["decay"] / factor


def adamw(
    parameters: Mapping[str, nn.Parameter],
    decayed: Collection[str],
    config: OptimizerConfig,
    multipliers: Mapping[str, float],
) -> torch.optim.AdamW:
    """A new AdamW with one group for each multiplier, of those `decayed` and of the others."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((name in decayed, multipliers.get(name, 1.0)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "multiplier": factor, "decay": decays * config.weight_decay}
            for (decays, factor), members in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


class Optimizer:
    """torch's fused AdamW over a module's named parameters, but for those that Muon steps."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        spread: tuple[World, Layout] | None = None,
    ) -> None:
        """`spread`: the processes that each hold a part of every parameter, and this one's; left out where each holds
        all of it."""
        self.config = config
        self._spread = spread
        self.parameters = dict(parameters)
        self.multipliers: dict[str, float] = {}
        """factor on the learning rate, by parameter name, where it is not 1; weight decay is divided by it"""
        self._adam = self._group()
        matrices = {name: p for name, p in self.parameters.items() if config.muon(name)}
        self._muon = Muon(matrices, config.weight_decay, spread)
        self._skipped = torch.zeros(())
        self._applies = torch.ones(())
        """1 if the coming step will be applied, else 0"""
        self._ema = {name: p.detach().clone() for name, p in self.parameters.items()} if config.ema else {}

    def _group(self) -> torch.optim.AdamW:
        adams = {name: p for name, p in self.parameters.items() if not self.config.muon(name)}
        decayed = {name for name, parameter in adams.items() if decays(name, parameter)}
        return adamw(adams, decayed, self.config, self.multipliers)

    def clip(self) -> Tensor:
        """Scale the gradients down to the configured norm; returns their norm before, as a tensor.

        A norm that is not finite marks the coming step to be skipped; the mark stays on the device, nobody waits.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._spread is not None:
            norm = self._spread[0].sum(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.grad_clip, norm)
        broken = (~norm.isfinite()).float()
        # The fused kernel reads this to leave weights, moments and step counts untouched: the door AMP's scaler uses.
        self._adam.found_inf = broken  # type: ignore[attr-defined]
        self._skipped = self._skipped.to(broken.device) + broken
        self._applies = 1 - broken
        return norm

    def step(self, lr: float, fade: float = 1.0) -> None:
        """Apply the gradients at learning rate `lr`, times each parameter's multiplier, and drop them."""
        pace(self._adam, lr, fade)
        self._adam.step()
        self._muon.step(lr, {name: factor**fade for name, factor in self.multipliers.items()}, self._applies)
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.config.ema:
            moves = (1 - self.config.ema) * self._applies
            for name, average in self._ema.items():
                average.lerp_(self.parameters[name].detach(), moves)

    @property
    def skipped(self) -> int:
        """Steps left out because the gradient was not finite; reading it waits for the device."""
        return int(self._skipped)

    @property
    def steps(self) -> int:
        """Steps applied; reading it waits for the device."""
        first = self._adam.param_groups[0]["params"][0]
        return int(self._adam.state[first]["step"]) if first in self._adam.state else 0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments, and averages if there are any, by kind and parameter name, alive; moments are zero at first."""
        keeps = self.config.keeps
        return {
            kind: {name: self._held(kind, name) for name in self.parameters if keeps(kind, name)}
            for kind in self.config.kinds
        }

    def _held(self, kind: str, name: str) -> Tensor:
        if kind == "ema":
            return self._ema[name]
        if self.config.muon(name):
            return self._muon.momenta[name]
        parameter = self.parameters[name]
        state: dict[str, Tensor] = self._adam.state.get(parameter, {})
        return state[kind] if state else torch.zeros_like(parameter)

    def load(
        self,
        moments: Mapping[str, Mapping[str, Tensor]],
        steps: int,
        skipped: int,
        multipliers: Mapping[str, float],
    ) -> None:
        """Set moments and averages (copied), the steps they have seen, those skipped, and the multipliers."""
        self.multipliers = dict(multipliers)
        self._adam = self._group()
        self._skipped = torch.tensor(float(skipped))
        for name, average in self._ema.items():
            average.copy_(moments["ema"][name])
        for name, parameter in self.parameters.items():
            if self.config.muon(name):
                self._muon.momenta[name].copy_(moments["exp_avg"][name])
                continue
            state = {kind: moments[kind][name].detach().to(parameter, copy=True) for kind in MOMENTS}
            self._adam.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **state}
