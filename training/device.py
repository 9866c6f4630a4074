"""The name of a device, its peak speed, its memory, how much of it the run has used, and whether it repeats every
bit."""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .state import TrainingError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""cuBLAS's settings of it with which streams do not share what products are summed in"""


class DeviceModel(NamedTuple):
    """One accelerator, from its maker's data sheet."""

    peak: float
    """dense bf16 matrix products, FLOP/s"""
    memory: float
    """bytes"""


DEVICES = {
    "a10": DeviceModel(125e12, 24e9),
    "a100": DeviceModel(312e12, 80e9),
    "a100-40gb": DeviceModel(312e12, 40e9),
    "a10g": DeviceModel(70e12, 24e9),
    "a40": DeviceModel(150e12, 48e9),
    "a800": DeviceModel(312e12, 80e9),
    "b200": DeviceModel(2250e12, 180e9),
    "b300": DeviceModel(2250e12, 270e9),
    "gb200": DeviceModel(2500e12, 186e9),
    "gb300": DeviceModel(2500e12, 279e9),
    "gh200": DeviceModel(989e12, 96e9),
    "h100": DeviceModel(989e12, 80e9),
    "h100-nvl": DeviceModel(835e12, 94e9),
    "h100-pcie": DeviceModel(756e12, 80e9),
    "h20": DeviceModel(148e12, 96e9),
    "h200": DeviceModel(989e12, 141e9),
    "h200-nvl": DeviceModel(835e12, 141e9),
    "h800": DeviceModel(989e12, 80e9),
    "h800-pcie": DeviceModel(756e12, 80e9),
    "l4": DeviceModel(121e12, 24e9),
    "l40": DeviceModel(181e12, 48e9),
    "l40s": DeviceModel(362e12, 48e9),
    "mi300x": DeviceModel(1307e12, 192e9),
}
"""by the name for `treering plan --device`: words of the driver's name for it, joined by hyphens"""


def device_name(device: torch.device) -> str:
    """The product name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
    except OSError:
        names = []
    return f"CPU {names[0]}" if names else f"CPU {platform.machine()}"


def model_name(device: torch.device) -> str | None:
    """The device's name in the table, or None if it is not there (no CPU is)."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[^a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    if "mig" in words:  # a slice of a device
        return None
    named = [key for key in DEVICES if words.issuperset(key.split("-"))]
    return max(named, key=len, default=None)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, or None if it is not in the table."""
    name = model_name(device)
    return DEVICES[name].peak if name else None


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the device so far; on a CPU the process's peak resident size."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory()


def memory(device: torch.device) -> int:
    """Bytes of memory of the device; for a CPU the memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_memory() -> int:
    """The largest resident size of this process so far, in bytes.

    Linux tells it of the program that runs; what `getrusage` says there counts the program that started it too.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def repeating(wanted: bool) -> Iterator[None]:
    """While the context lasts, and if `wanted`, the same inputs give the same bits on a device; to be entered before
    CUDA starts.

    Of operations with a repeatable version that is taken, FlashAttention's backward among them; others would raise.
    Raises TrainingError where the environment has a setting of cuBLAS that excludes it.
    """
    if not wanted:
        yield
        return
    if (given := os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])) not in _WORKSPACES:
        raise TrainingError(
            f"engine.deterministic = true does not go with {_WORKSPACE} = {given!r} in the environment; unset it, or "
            f"set it to {_WORKSPACES[0]}"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Filling is for finding mistakes, and costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
