"""AdamW, or Muon with AdamW for the parameters that Muon does not handle, addressed by logical names.

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

from ...models.parts import is_table, is_temperature
from ...models.towers import keep_in_range
from ..world import World
from .layout import Layout
from .muon import Muon, hidden

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), and Muon if asked for."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices inside blocks, AdamW for the rest, at one learning rate"
    )
    lr: float = Field(1.0e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices, multiplied by the learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), strict=False, description="decay of the two moments")
    eps: float = Field(1.0e-6, gt=0, description="added to the root of the second moment")
    grad_clip: float = Field(1.0, gt=0, description="the gradient is scaled down to this global norm")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, such as 0.999; the average is then evaluated",
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        """State kept for parameters in addition to their weights."""
        return (*MOMENTS, "ema") if self.ema else MOMENTS

    def muon(self, name: str) -> bool:
        """Whether Muon updates the parameter of this name."""
        return self.kind == "muon" and hidden(name)

    def keeps(self, kind: str, name: str) -> bool:
        """Whether this kind of state is kept for the parameter of this name; Muon has no second moment."""
        return kind == "model" or (kind in self.kinds and not (kind == "exp_avg_sq" and self.muon(name)))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, except tables that are looked up row by row."""
    return parameter.ndim >= 2 and not is_table(name)


def pace(adam: torch.optim.Optimizer, lr: float, fade: float) -> None:
    """Set the learning rate and weight decay of the coming step, scaled by each group's multiplier ** `fade` (1: as
    they are; 0: no multipliers)."""
    for group in adam.param_groups:
        factor = group["multiplier"] ** fade
        group["lr"], group["weight_decay"] = lr * factor, group["decay"] / factor


def adamw(
    parameters: Mapping[str, nn.Parameter],
    decayed: Collection[str],
    config: OptimizerConfig,
    multipliers: Mapping[str, float],
) -> torch.optim.AdamW:
    """A new AdamW with one parameter group for each multiplier, with and without weight decay."""
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
    """torch's fused AdamW over a module's named parameters, except those that Muon updates."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        sharding: tuple[World, Layout] | None = None,
    ) -> None:
        """`sharding`: the processes that each hold a range of every parameter, and the ranges of this one; None if each
        holds all of them."""
        self.config = config
        self._sharding = sharding
        self.parameters = dict(parameters)
        self._temperatures = [p for name, p in self.parameters.items() if is_temperature(name)]
        self.multipliers: dict[str, float] = {}
        """factor on the learning rate, by parameter name, where it is not 1; weight decay is divided by it"""
        self._adam = self._group()
        matrices = {name: p for name, p in self.parameters.items() if config.muon(name)}
        self._muon = Muon(matrices, config.weight_decay, sharding)
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

        A norm that is not finite marks the coming step to be skipped; the mark stays on the device, without a host
        synchronisation.
        """
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._sharding is not None:
            norm = self._sharding[0].sum(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.grad_clip, norm)
        broken = (~norm.isfinite()).float()
        # The fused kernel reads this to leave weights, moments and step counts untouched, as for AMP's GradScaler.
        self._adam.found_inf = broken  # type: ignore[attr-defined]
        self._skipped = self._skipped.to(broken.device) + broken
        self._applies = 1 - broken
        return norm

    def step(self, lr: float, fade: float = 1.0) -> None:
        """Apply the gradients at learning rate `lr`, times each parameter's multiplier, and drop them."""
        pace(self._adam, lr, fade)
        self._adam.step()
        self._muon.step(lr, {name: factor**fade for name, factor in self.multipliers.items()}, self._applies)
        self.keep_temperatures_in_range()
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.config.ema:
            moves = (1 - self.config.ema) * self._applies
            for name, average in self._ema.items():
                average.lerp_(self.parameters[name].detach(), moves)

    def keep_temperatures_in_range(self) -> None:
        """Put temperatures that a step, or loaded weights, took out of their range back into it."""
        for log_scale in self._temperatures:
            keep_in_range(log_scale)

    @property
    def skipped(self) -> int:
        """Steps skipped because the gradient was not finite; reading it synchronises with the device."""
        return int(self._skipped)

    @property
    def steps(self) -> int:
        """Steps applied; reading it synchronises with the device."""
        first = self._adam.param_groups[0]["params"][0]
        return int(self._adam.state[first]["step"]) if first in self._adam.state else 0

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The live moments and averages, by kind and parameter name; moments are zero at first."""
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
        """Copy in moments and averages; set the counts of applied and skipped steps, and the multipliers."""
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
