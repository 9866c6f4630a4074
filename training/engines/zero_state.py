"""What DeepSpeed's ZeRO optimizers hold, as views of their own flat buffers: the one place that knows their insides.

Stages 1 and 2 lay the parameters of a group end to end and give every rank an equal cut of that line; stage 3 cuts
every parameter by itself. Either way a rank has one flat of a parameter, of its fp32 master and of its moments.

The state is read here because DeepSpeed offers no other way to it. Its checkpoints load at the world size that wrote
them (issues 2898, 3810; the universal format of 2921 is a conversion between two runs), and loading weights after
`deepspeed.initialize` was asked for and not answered (issue 6411). Its public accessors are for debugging:
`safe_get_full_*` and `safe_set_full_*` move whole tensors through all ranks, one by one (pull requests 2727, 4192), and
`safe_get_local_*` exists for stage 3 alone (pull request 4681). Numbers are those of github.com/deepspeedai/DeepSpeed.

What is used of its insides, each for one reason:

- `_hp_mapping` (stages 1, 2) with its `param_group_index`, `hp_fragment_address`, `lp_fragment_address`: where in the
  flat buffer, and where in the parameter, this rank's part begins. The public accessors read it too (2727).
- `grad_position`, `get_param_id`, `ds_tensor` (stage 3): the same there.
- `single_partition_of_fp32_groups`, `fp32_partitioned_groups_flat`, `optimizer.state`: the buffers themselves. Moments
  are set with the steps that they have seen, which stages 1 and 2 do not keep (pull requests 4396, 5104).
- `update_lp_params`, `_reassign_or_swap_out_partitioned_parameters`, `persistent_parameters`, `fp16_groups`: what was
  loaded into the masters would reach the weights that compute only at the end of the next step (issue 6411).
- `zero.Init._convert_to_deepspeed_param` and `partition`: `zero.Init` itself sends every parameter whole from the first
  rank to all (discussed in pull request 1453; 8103, to bound its memory, was closed), and ours are alike already.
- `fp16_partitioned_groups_flat`, `grad_partitions_flat_buffer`: freed by hand, as `destroy` leaves memory behind
  (issues 4856, 5143, 5674, 7204).
- `ops.__compatible_ops__`: leaves out an extension that it compiles at first use on a CPU (issue 7108).

Written against DeepSpeed 0.19; `require` refuses others.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...models.parts import is_temperature
from ...models.towers import keep_in_range
from ..state import TrainingError
from ..world import World
from .layout import FlatRange
from .optimizer import MOMENTS

_FIRST, _BELOW = (0, 19, 8), (0, 20)


def require(world: World) -> Any:
    """The deepspeed package, of a version whose insides are known here. Raises TrainingError."""
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise TrainingError(
            "engine.kind = deepspeed needs DeepSpeed; pip install 'treering[deepspeed]', or use engine.kind: fsdp"
        ) from None
    if not _FIRST <= tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _BELOW:
        first, below = (".".join(map(str, bound)) for bound in (_FIRST, _BELOW))
        raise TrainingError(
            f"engine.kind = deepspeed reads the insides of DeepSpeed from {first} to below {below}, and {version} is "
            f"installed; pip install 'deepspeed>={first},<{below}', or use engine.kind: fsdp"
        )
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it would look for other devices, and compile for them
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on one
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # An optional collective that it compiles at first use: one to three minutes on a machine that never did.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def cutter(deepspeed: Any, settings: dict[str, Any]) -> Callable[[nn.Module], None]:
    """What leaves of a module's own parameters, which every rank has filled alike, this rank's part, as stage 3 does.

    `deepspeed.zero.Init` would send them from the first rank to all, and until they have come hold what it frees.
    """
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=torch.float32)

    def cut(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

    return cut


class Partitions:
    """This rank's part of every parameter under one ZeRO optimizer."""

    def __init__(
        self, optimizer: Any, stage: int, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, tuple[int, ...]],
        world: World,
    ) -> None:  # fmt: skip
        self._zero, self._stage, self._parameters = optimizer, stage, parameters
        cut = self._cut_of_line if stage < 3 else self._cut_of_parameter
        self._averages: list[Tensor] = []
        """of the masters, in buffers like theirs"""
        self._places: dict[str, tuple[int, int]] = {}
        """by parameter, the number of its flat buffer here, and where in that it begins"""
        self.layout = {name: cut(name, shape, world.rank) for name, shape in shapes.items()}

    def _cut_of_line(self, name: str, shape: tuple[int, ...], rank: int) -> FlatRange:
        mapping = self._parameters[name]._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # it lies on other ranks
            self._places[name] = (0, 0)
            return FlatRange(shape, 0, 0)
        self._places[name] = (mapping.param_group_index, mapping.hp_fragment_address.start)
        return FlatRange(shape, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def _cut_of_parameter(self, name: str, shape: tuple[int, ...], rank: int) -> FlatRange:
        parameter, total = self._parameters[name], prod(shape)
        buffer, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        self._places[name] = (buffer, offset)
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = min(rank * length, total)  # the last parts are padded to equal lengths
        return FlatRange(shape, start, min(length, total - start))

    @property
    def _flats(self) -> list[Tensor]:
        """The buffers with the fp32 masters."""
        flats: list[Tensor] = (
            self._zero.single_partition_of_fp32_groups if self._stage < 3 else self._zero.fp32_partitioned_groups_flat
        )
        return flats

    def view(self, kind: str, name: str) -> Tensor:
        """This rank's part of a master (`model`) or a moment, flat and alive; zeros for moments not yet there."""
        number, start = self._places[name]
        flat, length = self._flats[number], self.layout[name].length
        if kind == "ema":
            return self._averages[number][start : start + length]
        if kind == "model":
            return flat.detach()[start : start + length]
        state = self._zero.optimizer.state.get(flat, {})
        return state[kind][start : start + length] if kind in state else flat.new_zeros(length)

    def reset_moments(self, steps: int) -> None:
        """Zero moments that have seen `steps` steps, where views can be written to."""
        for flat in self._flats:
            moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            self._zero.optimizer.state[flat] = {"step": torch.tensor(float(steps), device=flat.device), **moments}

    @torch.no_grad()
    def keep_temperatures_in_range(self) -> None:
        """Put temperatures back into their range, in the masters and in the weights that compute."""
        for name in filter(is_temperature, self._parameters):
            parameter = self._parameters[name]
            keep_in_range(self.view("model", name))
            keep_in_range(parameter.data)
            if self._stage == 3:
                keep_in_range(parameter.ds_tensor)  # type: ignore[attr-defined]

    @torch.no_grad()
    def average(self, keep: float) -> None:
        """Move the averages of the masters towards them, keeping this share of what they were."""
        if not self._averages:
            self._averages = [flat.detach().clone() for flat in self._flats]
        for average, flat in zip(self._averages, self._flats, strict=True):
            average.lerp_(flat, 1 - keep)

    def publish(self) -> None:
        """Bring the weights that the model computes with in line with the masters; all ranks call it together."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        kept = self._zero.persistent_parameters
        if kept:  # small ones that every rank keeps a whole copy of
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def release(self) -> None:
        """Free what stage 3 would keep: its hooks hold the whole optimizer after `destroy`."""
        empty = torch.empty(0)
        self._zero.optimizer.state.clear()
        self._averages = []
        for flat in self._flats:
            flat.data = empty
        if self._stage == 3:
            for parameter in self._parameters.values():
                parameter.data = empty
                parameter.ds_tensor.data = empty  # type: ignore[attr-defined]
            for flat in self._zero.fp16_partitioned_groups_flat:
                flat.data = empty
            self._zero.grad_partitions_flat_buffer = empty
