"""The FSDP2 engine: torch's `fully_shard` around every block, and the optimizer on this rank's rows.

A rank holds some rows of every parameter and of its moments; weights are gathered block by block while they are
needed, gradients are summed into the rows of their owners. The optimizer sees plain tensors that share the memory of
these rows, so it is the very one of every other engine: multipliers, skipped steps and the norm over all ranks too.
With `shard` groups of neighbouring ranks each hold a whole copy between them: weights are only gathered within a
group, a node say, and gradients alone cross between groups.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ...models.model import empty, initialise, materialise
from ...models.spec import ModelSpec
from ...models.towers import temperature
from ...models.transformer import TransformerBlock
from .config import FsdpConfig
from .kernels import prepare_kernels
from .layout import FlatRange, gathered, shard_rows
from .optimizer import Optimizer
from .torch_engine import TorchEngine


class FsdpEngine(TorchEngine):
    """Fully sharded data parallelism over all processes of the run; there are at least two."""

    layout: dict[str, FlatRange]

    config: FsdpConfig

    def _build(self, spec: ModelSpec, seed: int) -> None:
        """No process ever holds the whole model: memory is allocated after sharding, and values are set tensor by
        tensor."""
        world, config = self.world, self.config
        self.model = empty(spec)
        self.attention = prepare_kernels(self.model, config, world.device)
        self._forward = self._whole_forward()
        shard = config.shards(world.size).weights
        mesh = init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("copy", "shard"))
        self._holders = world.part(world.rank % shard, shard, mesh.get_group("shard"))
        self.copies = world.part(world.rank // shard, world.size // shard, mesh.get_group("copy"))
        if shard == world.size:
            mesh = mesh["shard"]
        if config.precision == "bf16":
            # The stream between blocks stays in fp32, as under DDP's autocast.
            blocks = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        else:
            blocks = MixedPrecisionPolicy()
        for module in self.model.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=blocks)
        # What is in no block stays in fp32: a temperature rounded to bf16 would move in steps of 1%.
        fully_shard(self._forward, mesh=mesh)
        materialise(self.model, world.device, self._forward)
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.layout = {name: shard_rows(shape, self._holders.rank, shard) for name, shape in shapes.items()}
        initialise(spec, self._one_by_one(), seed)
        self.optimizer = Optimizer(
            ((name, nn.Parameter(_local(p))) for name, p in self.model.named_parameters()),
            self.optimizer_config,
            (self._holders, self.layout),
        )

    def _one_by_one(self) -> Iterator[tuple[str, Tensor]]:
        """Yields a whole tensor for each parameter; the caller fills it, and this rank's rows are copied from it."""
        for name, parameter in self.model.named_parameters():
            whole = torch.empty(parameter.shape)
            yield name, whole
            mine = _local(parameter)
            assert mine.numel() == self.layout[name].length, f"{name} is not sharded by rows"
            mine.copy_(self.layout[name].cut(whole).view(mine.shape))

    def _update(self, lr: float, fade: float) -> Tensor:
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            self.optimizer.parameters[name].grad = _local(parameter.grad)
            parameter.grad = None
        return super()._update(lr, fade)

    def scale(self) -> float:
        with torch.no_grad():
            held = self.optimizer.parameters["logit_scale"]
            return temperature(self.whole("logit_scale", held)).item()

    def whole(self, name: str, own: Tensor) -> Tensor:
        return gathered(own, self.layout[name], self._holders)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        return self.layout[name].cut(whole)


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local.detach()
