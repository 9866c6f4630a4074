"""The name of a device, its peak speed, its memory, and how much of it the run has used."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import NamedTuple

import torch


class DeviceModel(NamedTuple):
    """One accelerator, from its maker's data sheet."""

    peak: float
    """dense bf16 matrix products, FLOP/s"""
    memory: float
    """bytes"""


DEVICES = {
    "a100": DeviceModel(312e12, 80e9),
    "b200": DeviceModel(2250e12, 180e9),
    "gh200": DeviceModel(989e12, 96e9),
    "h100": DeviceModel(989e12, 80e9),
    "h200": DeviceModel(989e12, 141e9),
    "l40s": DeviceModel(362e12, 48e9),
}
"""by the name for `treering plan --device`, which is part of the driver's name for it"""


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
    name = torch.cuda.get_device_name(device).lower()
    longest_first = sorted(DEVICES, key=len, reverse=True)  # a GH200 is not an H200
    return next((key for key in longest_first if key in name), None)


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
