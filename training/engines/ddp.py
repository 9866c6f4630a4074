"""The DDP engine: torch's DistributedDataParallel over whole replicas, or the bare module in a world of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...models.compiling import as_written
from ...models.model import Model, build
from ...models.output import ModelOutput
from ...models.spec import ModelSpec
from ..objectives.base import Inputs, extras_of, load_states, states
from . import micro_batches
from .base import Forward, assembled
from .kernels import prepare_kernels
from .optimizer import Optimizer
from .torch_engine import TorchEngine

_NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers": False}
if not _NO_BUFFERS.keys() <= signature(DistributedDataParallel).parameters.keys():  # its name before torch 2.13
    _NO_BUFFERS = {"broadcast_buffers": False}


class DdpEngine(TorchEngine):
    """Replicated data parallelism."""

    def _build(self, spec: ModelSpec, seed: int) -> None:
        self.model = build(spec, seed).to(self.world.device)
        self.model.in_bf16 = self.config.precision == "bf16"
        self.attention = prepare_kernels(self.model, self.config, self.world.device)
        self.optimizer = Optimizer(self.model.named_parameters(), self.optimizer_config)
        forward = self._whole_forward()
        self._forward = (
            DistributedDataParallel(forward, gradient_as_bucket_view=True, **_NO_BUFFERS)
            if self.world.size > 1
            else forward
        )

    def _hold(self) -> contextlib.AbstractContextManager[object]:
        wrapped = self._forward
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def gradient_norms(self, inputs: Inputs) -> dict[str, float]:
        kept, parameters = states(self.objectives), list(self.model.parameters())
        whole = Forward(self.model, self.objectives, self.world, self.config.precision, self.recomputing)

        def forward(piece: Inputs) -> micro_batches.PieceOutput:
            return whole(piece, losses=False), self.model.output_table

        with as_written(self.model):  # compiled blocks go through one backward pass
            found = micro_batches.gradient_norms(forward, self.objectives, inputs, self.pieces, self.world, parameters)
        load_states(self.objectives, kept)  # looking at a batch must not count as training on it
        return found

    @torch.no_grad()
    def output(self, inputs: Inputs) -> ModelOutput:
        extras = extras_of(self.objectives, inputs)
        with as_written(self.model):
            output: ModelOutput = self.model(inputs.images, inputs.tokens, inputs.lengths, extras)
        return output

    def scale(self) -> float:
        return self.model.scale().item()

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Model]:
        with as_written(self.model):
            yield assembled(self) if self.optimizer_config.ema else self.model

    def whole(self, name: str, own: Tensor) -> Tensor:
        return own

    def cut(self, name: str, whole: Tensor) -> Tensor:
        return whole
