"""The device: what torch is told about it, where its tensors come from, and the kernels that it would pick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._subclasses.fake_tensor as fake
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.cuda.amp import common as amp
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from treering.training import world as world_module

from .counting import Count

DEVICE = torch.device("cuda", 0)
_FOREACH = [import_module(name) for name in ("torch.utils._foreach_utils", "torch.optim.optimizer")]
"""where torch lists the tensors that one kernel may update together"""
NAME, MEMORY = "NVIDIA H200", 141 << 30
_CUDA = {
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "get_device_capability": lambda *a: (9, 0),
    "get_device_name": lambda *a: NAME,
    "get_device_properties": lambda *a: SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=MEMORY,
        multi_processor_count=132,
        L2_cache_size=60 << 20,
        warp_size=32,
    ),
    "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
    "is_available": lambda: True,
    "is_bf16_supported": lambda *a, **k: True,
    "is_current_stream_capturing": lambda: False,
    "is_initialized": lambda: True,
    "max_memory_allocated": lambda *a: 0,
    "set_rng_state": lambda *a: None,
    "synchronize": lambda *a: None,
    "_lazy_init": lambda: None,
}


class _Mode(FakeTensorMode):
    avoid_device_init = True  # whatever torch.cuda says


@contextmanager
def fake_device() -> Iterator[FakeTensorMode]:
    """torch believes in an H200, and tensors made on it hold nothing; those of the host are real."""
    mode = _Mode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for name, function in _CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(amp, "amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch.object(fake, "init_gpu_context"))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", _pinned))
        for holder in _FOREACH:
            kinds = [*holder._foreach_supported_types, FakeTensor]
            stack.enter_context(mock.patch.object(holder, "_foreach_supported_types", kinds))
        stack.enter_context(mode)
        stack.enter_context(HostIsReal())
        yield mode


def _pinned(tensor: Tensor) -> Tensor:
    """A copy that copies to the device do not wait for."""
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


class HostIsReal(TorchDispatchMode):
    """Tensors of the host keep their numbers: only what is asked of the device is fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        elsewhere = [leaf for leaf in leaves if isinstance(leaf, torch.device) and leaf.type in ("cuda", "meta")]
        if not elsewhere and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        mode = detect_fake_mode(leaves)
        assert mode is not None

        def faked(leaf: Any) -> Any:
            if (
                not isinstance(leaf, Tensor)
                or isinstance(leaf, FakeTensor)
                or leaf.device.type != "cpu"
                or not len(leaf.shape)
            ):
                return leaf
            with unset_fake_temporarily():
                meta = torch.empty_like(leaf.detach(), device="meta")
            return FakeTensor(mode, meta, leaf.device)

        args, kwargs = tree_map(faked, (args, kwargs))
        return func(*args, **kwargs)


_plain_attention = F.scaled_dot_product_attention


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    """The kernels that CUDA would pick: flash in 16 bits without a mask, else the memory-efficient one."""
    if q.device.type != "cuda":
        return _plain_attention(q, k, v, attn_mask, dropout_p, is_causal, **more)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.bfloat16) if x.dtype == torch.float32 else x for x in (q, k, v))
    if attn_mask is None and q.dtype.itemsize == 2:
        flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
        return flash
    bias = attn_mask
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
        assert bias is not None
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    graph = torch.is_grad_enabled()
    efficient: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, graph, 0.0, is_causal)[0]
    return efficient


@contextmanager
def fake_ranks(size: int, count: Count) -> Iterator[None]:
    """A world of `size` whose collectives are counted and done at once; host tensors are gathered as copies."""

    class Done:
        def wait(self) -> None:
            return None

    def collective(name: str) -> Any:
        def call(*tensors: Any, async_op: bool = False, **more: Any) -> Any:
            count.collectives[name] += 1
            if name == "all_gather" and tensors[0].device.type == "cpu":
                tensors[0].copy_(tensors[1].repeat(size, *[1] * (tensors[1].ndim - 1)))
            return Done() if async_op else None

        return call

    names = {
        "all_reduce": "all_reduce",
        "broadcast": "broadcast",
        "reduce": "reduce",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_single": "reduce_scatter",
        "all_gather_into_tensor": "all_gather",
        "all_gather_single": "all_gather",
    }
    with ExitStack() as stack:
        for name, called in names.items():
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, collective(called)))
        for name in ("_all_gather", "_reduce_scatter"):
            if hasattr(world_module, name):
                stack.enter_context(mock.patch.object(world_module, name, collective(name.removeprefix("_"))))
        yield
