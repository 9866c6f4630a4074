"""A model larger than its device: blocks that do not fit are in host memory or on disk.

What computes stays one device. Everything but the blocks of the transformers lies there; each map of a block that does
not is fetched before its forward pass and dropped after it. accelerate builds the model without memory, decides where
blocks lie and moves their maps.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_max_memory, offload_weight, save_offload_index, set_module_tensor_to_device
from torch import Tensor, nn

from ..data.units import size_in_bytes
from ..models.mlp import Experts
from ..models.model import Model
from ..models.spec import ModelSpec
from ..models.transformer import TransformerBlock

Memory = Mapping[str, int | str]
"""what each place may hold: bytes, or a size such as 20GB, by `cpu` or the device that computes, as in `cuda:0`"""


def spread(
    spec: ModelSpec, tensors: Mapping[str, Tensor], device: torch.device, memory: Memory | None, folder: Path | None
) -> tuple[Model, tempfile.TemporaryDirectory[str]]:
    """A model of these weights that computes on `device`; its blocks lie there, on the host and on the disk.

    The second value is the folder of what lies on the disk, below `folder` or where temporary files go: it is removed
    when it is no longer referred to. Raises ValueError where the device has no room for what must lie there.
    """
    with init_empty_weights():
        model = Model(spec)
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, TransformerBlock)}
    # Of a block its children: a decoder that writes token by token calls them, and not the block.
    children = {f"{name}.{child}": name for name, block in blocks.items() for child, _ in block.named_children()}
    own = {name: next((c for c in children if name.startswith(f"{c}.")), "") for name, _ in model.named_parameters()}
    outside = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not own[name])
    by_block = _places(blocks, outside, device, memory)
    places = {child: by_block[block] for child, block in children.items()}
    left = tempfile.TemporaryDirectory(prefix="treering-blocks-", dir=folder)
    index: dict[str, dict[str, object]] = {}
    for name, child in own.items():
        place = places[child] if child else device
        if place == "disk":
            offload_weight(tensors[name], name, left.name, index)
        else:
            set_module_tensor_to_device(model, name, place, value=tensors[name])
    save_offload_index(index, left.name)
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, value=buffer)
    whole = {name: device for name, child in own.items() if not child}
    with warnings.catch_warnings():  # that some keys are parameters and not modules
        warnings.simplefilter("ignore")
        dispatch_model(
            model.eval().requires_grad_(False),
            {**whole, **places},
            main_device=device,
            offload_dir=left.name,
            preload_module_classes=[Experts.__name__],  # it reads the weights of its maps, and does not call them
        )
    return model, left


def _places(
    blocks: Mapping[str, nn.Module], outside: int, device: torch.device, memory: Memory | None
) -> dict[str, torch.device | str]:
    """Where each block lies: on the device, `cpu` or `disk`."""
    main: int | str = "cpu" if device.type == "cpu" else device.index or 0
    names = {"cpu": "cpu", str(device): main, device.type: main}
    rooms: dict[int | str, int] = {place: room for place, room in get_max_memory().items() if place in (main, "cpu")}
    for name, given in (memory or {}).items():
        room = size_in_bytes(given) if isinstance(given, str) else given
        if name not in names or room is None:
            raise ValueError(
                f"max_memory: {{{name}: {given!r}}} must be bytes or a size such as 20GB, for cpu or {device}"
            )
        rooms[names[name]] = room
    rooms[main] -= outside
    if rooms[main] < 0:
        raise ValueError(
            f"{outside:,} bytes of the model lie outside of its blocks and have to be on {device}, which may hold "
            f"{rooms[main] + outside:,}; raise max_memory"
        )
    found = infer_auto_device_map(
        nn.ModuleList(blocks.values()), rooms, no_split_module_classes=[TransformerBlock.__name__], clean_result=False
    )
    where = (found[str(number)] for number in range(len(blocks)))
    return {name: device if place == main else str(place) for name, place in zip(blocks, where, strict=True)}
