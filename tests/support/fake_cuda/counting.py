"""What is asked of a device, call by call: kernels, bytes, FLOPs, and what makes the host wait for it."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NO_KERNEL = frozenset(
    """
    _local_scalar_dense _reshape_alias _unsafe_view alias as_strided chunk detach device diagonal empty empty_like
    empty_strided expand is_same_size lift lift_fresh movedim narrow new_empty new_empty_strided permute record_stream
    select set_ size slice split split_with_sizes squeeze squeeze_ stride sym_size t transpose unbind unfold
    unsafe_split unsqueeze unsqueeze_ view view_as
    """.split()  # noqa: SIM905
)
"""aten operators that launch nothing: views, and memory without content"""
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"})
_FUSED = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_varlen_attn")
ATTENTION = frozenset({*_FUSED, *(f"{name}_backward" for name in _FUSED)})
UNKNOWN_SIZE = frozenset({"nonzero", "_unique2", "unique_dim", "masked_select", "argwhere"})
"""results whose size only the device knows"""

_ROOT = Path(__file__).resolve().parents[3]
"""of the checkout"""


class HostWaits(AssertionError):
    """The host asked the device for a number, and would have waited for it."""


@dataclass
class Count(TorchDispatchMode):
    """Counts what operators inside ask of the device, and raises HostWaits at those that make the host wait."""

    calls: Counter[str] = field(default_factory=Counter)
    """calls that launch kernels, by operator and dtypes"""
    bytes: Counter[str] = field(default_factory=Counter)
    """bytes read and written, by the same"""
    flops: Counter[str] = field(default_factory=Counter)
    """of matrix products and attention, by dtype"""
    collectives: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def launches(self) -> int:
        return sum(self.calls.values())

    @property
    def fp32_flops(self) -> int:
        return self.flops["float32"] + self.flops["float64"]

    @property
    def other_bytes(self) -> int:
        """Bytes of all calls but matrix products and attention."""
        products = PRODUCTS | ATTENTION
        return sum(count for key, count in self.bytes.items() if key.split(":")[0].rstrip("_") not in products)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        base = name.rstrip("_")  # an operator in place is the same work
        if reason := _wait(name, args, kwargs):
            raise HostWaits(f"{reason} at {_place()}")
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        touched = [t for t in [*inputs, *outputs] if t.device.type == "cuda"]
        if not touched or name in NO_KERNEL:
            return out
        if reason := _copy_wait(name, inputs, outputs, kwargs):
            raise HostWaits(f"{reason} at {_place()}")
        key = _key(name, inputs, outputs)
        self.calls[key] += 1
        self.bytes[key] += sum(_held(t) for t in touched)
        if base in PRODUCTS or base in ATTENTION:
            dtype = next(t.dtype for t in inputs if t.is_floating_point())
            self.flops[str(dtype).removeprefix("torch.")] += _flops(base, args, kwargs, out)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _held(tensor: Tensor) -> int:
    """Bytes of its elements; one that is expanded is no larger than its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(base: str, args: Any, kwargs: Any, out: Any) -> int:
    if base.startswith("_varlen"):  # of captions: next to nothing, and lengths are on the device
        return 0
    if base == "_grouped_mm":
        # [r, i] by [e, i, o], or [i, r] by [r, o] for the weights' gradient: each row meets one matrix.
        return 2 * math.prod(args[0].shape) * args[1].shape[-1]
    found: int = flop_registry[getattr(torch.ops.aten, base)](*args, out_val=out)
    return found


def _key(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    """An operator with what tells its calls apart in a table."""
    if name in ("_to_copy", "copy_"):
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in inputs})
        return f"{name}:{'|'.join(dtypes)}->{str(outputs[0].dtype).removeprefix('torch.')}"
    return f"{name}:{str(inputs[-1].dtype).removeprefix('torch.')}" if name.rstrip("_") in PRODUCTS else name


def _wait(name: str, args: Any, kwargs: Any) -> str | None:
    """Why an operator makes the host wait, before it runs."""
    on_device = [t for t in _tensors((args, kwargs)) if isinstance(t, FakeTensor) and t.device.type == "cuda"]
    if not on_device:
        return None
    if name == "_local_scalar_dense":
        return "a number of the device is read"
    if name in UNKNOWN_SIZE or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        return f"{name} has a size that only the device knows"
    if name in ("index", "index_put_") and any(_is_mask(index) for index in args[1]):
        return "an index is a mask"
    return None


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _copy_wait(name: str, inputs: list[Tensor], outputs: list[Tensor], kwargs: Any) -> str | None:
    """Why a copy between host and device waits: whatever is not from pinned memory and asked not to block."""
    if name not in ("_to_copy", "copy_"):
        return None
    source, target = inputs[-1], outputs[0]
    if source.device.type == target.device.type:
        return None
    pinned = getattr(source if source.device.type == "cpu" else target, "pinned", False)
    if pinned and kwargs.get("non_blocking", False):
        return None
    return f"a blocking copy from {source.device.type} to {target.device.type}"


def _place() -> str:
    """The lines of ours that lead there, the innermost first."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).resolve().is_relative_to(_ROOT)]
    frames = [f for f in frames if "site-packages" not in f.filename]
    own = [f for f in frames if not f.filename.endswith(("fake_cuda/counting.py", "fake_cuda/device.py"))]
    return " <- ".join(f"{Path(f.filename).resolve().relative_to(_ROOT)}:{f.lineno}" for f in own[-4:][::-1])
