"""What a device is called, how fast it could be, and how much memory the run has taken of it."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path

import torch

# Dense bf16 peaks in FLOP/s, from the makers' data sheets.
_PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def describe(device: torch.device) -> str:
    """The name a person knows it by."""
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


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, or None if it is not in the table (no CPU is)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in sorted(_PEAKS.items(), key=lambda item: -len(item[0])) if key in name), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes the run has held on the device so far; on a CPU the process's largest resident size."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory()


def memory(device: torch.device) -> int:
    """Bytes of memory of the device; of a CPU that of the machine."""
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
