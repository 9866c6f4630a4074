"""Cores and memory as control groups allow, in folders laid out as Linux does in both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from treering.data.machine import usable_cores, usable_memory

ALL = len(os.sched_getaffinity(0))


def laid_out(root: Path, group: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in {"proc/self/cgroup": group, "proc/meminfo": "MemAvailable:   1024 kB\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        (root / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "groups" / name).write_text(text)
    return root / "proc", root / "groups"


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),  # a tenth of a core
        ("0::/\n", {"cpu.max": "150000 100000\n"}, min(ALL, 2)),
        ("0::/job/step\n", {"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000"}, 1),
        ("0::/elsewhere\n", {"cpu.max": "100000 100000"}, 1),  # a container sees its own group as the root
        ("4:cpu,cpuacct:/a\n0::/\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000",
                                      "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "1"}, ALL),
        ("0::/\n", {"cpu.max": "nonsense"}, ALL),
        ("0::/\n", {"cpu.max": "5 0"}, ALL),
        ("", {}, ALL),
    ],
)  # fmt: skip
def test_cores(group: str, files: dict[str, str], cores: int, tmp_path: Path) -> None:
    assert usable_cores(*laid_out(tmp_path, group, files)) == cores


@pytest.mark.parametrize(
    ("group", "files", "memory"),
    [
        ("0::/\n", {"memory.max": "max\n"}, 1 << 20),
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": "8192"}, 8192),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": str(1 << 60)}, 1 << 20),
        ("", {}, 1 << 20),
    ],
)
def test_memory(group: str, files: dict[str, str], memory: int, tmp_path: Path) -> None:
    assert usable_memory(*laid_out(tmp_path, group, files)) == memory


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path) == ALL
    assert usable_memory(tmp_path, tmp_path) is None
