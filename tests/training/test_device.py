"""The figures of a device are found by its driver's name, and never another's; a run repeats every bit if asked."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES, measured
from treering.training import loop
from treering.training.device import DEVICES, model_name, peak_flops, repeating
from treering.training.state import TrainingError
from treering.training.world import World

NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H800": "h800",
    "NVIDIA H800 PCIe": "h800-pcie",
    "NVIDIA H20": "h20",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "AMD Instinct MI300X": "mi300x",
    "NVIDIA RTX A4000": None,
    "NVIDIA A1000": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "Tesla V100-SXM2-16GB": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_device_is_known_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device, key = torch.device("cuda", 0), NAMES[name]
    assert model_name(device) == key
    assert peak_flops(device) == (DEVICES[key].peak if key else None)
    assert model_name(torch.device("cpu")) is None


def switches() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_a_run_repeats_every_bit_if_asked_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches of torch and cuBLAS are set before the first tensor is on a device, for all of the run."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    join, step = World.join, loop.Run.step
    monkeypatch.setattr(World, "join", lambda *given: seen.append(switches()) or join(*given))
    monkeypatch.setattr(loop.Run, "step", lambda *given: seen.append(switches()) or step(*given))
    before, settings = switches(), [*SIZES, "schedule.warmup=12", "stages=[{samples: 24}]", "eval={suites: []}"]
    loop.train(read_recipe("emoji", [*settings, "engine.deterministic=true"]).recipe, tmp_path / "one")
    assert seen == [(True, False, False)] * 3
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert switches() == before
    loop.train(read_recipe("emoji", settings).recipe, tmp_path / "other")
    assert seen[3:] == [before] * 3
    assert measured(tmp_path / "one", "loss") == measured(tmp_path / "other", "loss"), "a CPU does so anyway"


@pytest.mark.parametrize(("given", "works"), [(":16:8", True), (":0:0", False), ("", False)])
def test_a_setting_of_cublas_that_repeats_nothing_is_refused(
    given: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    with nullcontext() if works else pytest.raises(TrainingError, match=r"CUBLAS_WORKSPACE_CONFIG = .*; unset it"):  # noqa: SIM117
        with repeating(True):
            assert switches() == (True, False, False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == given
