"""What the engines built on torch's own wrappers share: our optimizer on plain tensors, and its state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Engine
from .optimizer import Optimizer


class TorchEngine(Engine):
    """An engine whose `optimizer` steps the tensors that this rank holds."""

    optimizer: Optimizer

    def _update(self, lr: float, fade: float) -> Tensor:
        norm = self.optimizer.clip()
        self.optimizer.step(lr, fade)
        return norm

    @property
    def applied(self) -> int:
        return self.optimizer.steps

    @property
    def skipped(self) -> int:
        return self.optimizer.skipped

    @property
    def multipliers(self) -> dict[str, float]:
        return self.optimizer.multipliers

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def logical_state(self) -> dict[str, Tensor]:
        state = {f"model/{name}": p.detach() for name, p in self.optimizer.parameters.items()}
        for kind, tensors in self.optimizer.state().items():
            state |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
        return state

    @torch.no_grad()
    def load_logical_state(
        self, state: Mapping[str, Tensor], steps: int, skipped: int, multipliers: Mapping[str, float]
    ) -> None:
        names, config = self.optimizer.parameters, self.optimizer.config
        shaped = {path: part.view(names[path.partition("/")[2]].shape) for path, part in state.items()}
        for name, parameter in names.items():
            parameter.copy_(shaped[f"model/{name}"])
        self.optimizer.keep_temperatures_in_range()
        moments = {k: {n: shaped[f"{k}/{n}"] for n in names if config.keeps(k, n)} for k in config.kinds}
        self.optimizer.load(moments, steps, skipped, multipliers)
