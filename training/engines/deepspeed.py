"""The DeepSpeed engine: ZeRO stages 1 to 3 through `deepspeed.initialize`, and nothing else of DeepSpeed's.

Its weights are fp32 masters and fp32 copies to compute with, so bf16 is the same autocast as under DDP. State is read
and written in place, as views of ZeRO's partitions, and goes into the same commits as every engine's: DeepSpeed's own
checkpoints, which load at the same world only, are never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...models.model import built_by_module, empty
from ...models.spec import ModelSpec
from ...models.towers import temperature
from ..world import World, backend
from .base import Engine
from .config import DeepSpeedConfig
from .kernels import prepare_kernels
from .layout import gathered
from .optimizer import OptimizerConfig, adamw, decays, pace
from .zero_state import Partitions, cutter, require


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO over all processes of the run."""

    _engine: Any

    config: DeepSpeedConfig

    def _build(self, spec: ModelSpec, seed: int) -> None:
        self._seed = seed
        if not dist.is_initialized():  # a world of one: DeepSpeed wants a group all the same
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend(self.world.device), store=store, rank=0, world_size=1)
        self._initialise(spec, {})

    def _initialise(self, spec: ModelSpec, multipliers: Mapping[str, float]) -> None:
        """Make the model and DeepSpeed's engine around it: the parameter groups it starts with are for good."""
        deepspeed, stage, device = require(self.world), self.config.zero_stage, self.world.device
        settings = _settings(self.config, self.optimizer_config)
        self.model = empty(spec)
        plan = dict(self.model.named_parameters())  # parameters forget their shapes when they are cut
        cut = cutter(deepspeed, settings) if stage == 3 else None
        for module in built_by_module(self.model, self._seed, device):
            if cut:
                cut(module)
        self.attention = prepare_kernels(self.model, self.config, device)
        self._multipliers = dict(multipliers)
        self._steps = self._skips = 0
        named = dict(self.model.named_parameters())
        forward = self._whole_forward()
        decayed = {name for name, parameter in plan.items() if decays(name, parameter)}
        self._adam = adamw(named, decayed, self.optimizer_config, multipliers)
        self._engine, zero, _, _ = deepspeed.initialize(model=forward, optimizer=self._adam, config=settings)
        if stage == 3:  # the captioner's loss reads the token table outside of the module that owns it
            deepspeed.zero.register_external_parameter(forward, self.model.output_table)
        self._forward = self._engine
        shapes = {name: tuple(parameter.shape) for name, parameter in plan.items()}
        self._partitions = Partitions(zero, stage, named, shapes, self.world)
        if self.optimizer_config.ema:
            self._partitions.average(0.0)
        self.layout = self._partitions.layout
        self.copies = World(0, 1, self.world.device)

    def expect(self, multipliers: Mapping[str, float]) -> None:
        if dict(multipliers) != self._multipliers:
            spec = self.model.spec
            self.close()
            self._initialise(spec, multipliers)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _update(self, lr: float, fade: float) -> Tensor:
        pace(self._adam, lr, fade)
        self._engine.step()
        overflowed = (
            not self._engine.was_step_applied()
        )  # it skips a step that is not finite without a word: issue 8415
        self._steps, self._skips = self._steps + (not overflowed), self._skips + overflowed
        self._partitions.keep_temperatures_in_range()
        if self.optimizer_config.ema and not overflowed:
            self._partitions.average(self.optimizer_config.ema)
        norm = float("nan") if overflowed else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32)

    @property
    def applied(self) -> int:
        return self._steps

    @property
    def skipped(self) -> int:
        return self._skips

    @property
    def multipliers(self) -> dict[str, float]:
        return self._multipliers

    @property
    def parameters(self) -> int:
        return sum(torch.Size(flat.shape).numel() for flat in self._partitions.layout.values())

    def scale(self) -> float:
        held = self._partitions.view("model", "logit_scale")
        return temperature(self.whole("logit_scale", held)).item()

    def whole(self, name: str, own: Tensor) -> Tensor:
        return gathered(own, self._partitions.layout[name], self.world)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        return self._partitions.layout[name].cut(whole)

    def logical_state(self) -> dict[str, Tensor]:
        names = self._partitions.layout
        return {
            f"{kind}/{name}": self._partitions.view(kind, name)
            for kind in ("model", *self.optimizer_config.kinds)
            for name in names
        }

    @torch.no_grad()
    def load_logical_state(
        self, state: Mapping[str, Tensor], steps: int, skipped: int, multipliers: Mapping[str, float]
    ) -> None:
        assert dict(multipliers) == self._multipliers, "expect() comes first"
        self._partitions.reset_moments(steps)
        for path, part in state.items():
            kind, _, name = path.partition("/")
            self._partitions.view(kind, name).copy_(part.reshape(-1))
        self._partitions.keep_temperatures_in_range()
        self._partitions.publish()
        self._steps, self._skips = steps, skipped

    def close(self) -> None:
        self._engine.destroy()
        self._partitions.release()
        del self._engine, self._forward, self._partitions, self._adam


def _settings(config: DeepSpeedConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration: plain ZeRO in fp32 around torch's AdamW."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # counted by our loader, not here
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
