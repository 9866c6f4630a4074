"""A step on a GPU, without one: no device is mixed up, nothing waits, and no more is asked of the device than these
numbers. A change that raises them has to say why, here. Launches are exact, and those of torch 2.13.

The steps run in a process of their own, on `tests/support/fake_cuda`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from treering.tests.support.fake_cuda.loading import compiler
from treering.tests.support.needs import missing
from treering.tests.training.objectives.test_objective_contract import IDS


class Most(NamedTuple):
    """What one step may ask for."""

    launches: int
    gigabytes: float
    """read and written by all but matrix products and attention"""
    fp32: float = 0.001
    """TFLOP of matrix products off the tensor cores"""


ROOM = 1.01
"""of bytes and FLOPs, which are rounded here"""
pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="other versions of torch launch other kernels")
STEPS = {
    "b32_128": Most(1930, 18.6),
    "l14": Most(2746, 325.2),
    "coca_b32": Most(4027, 79.9),
    "photos2_128": Most(2426, 59.7),
    "emoji1": Most(561, 2.60, 0.06),  # its precision is fp32
    "emoji2": Most(1101, 2.95),
    "plain": Most(689, 1.67),
    "fp32": Most(523, 1.62, 0.02),
    "padded": Most(719, 1.68),
    "pieces": Most(3172, 1.97),
    "recomputed": Most(828, 1.69),
    "ema": Most(794, 1.71),
    "muon": Most(1845, 1.70),
    "experts": Most(818, 1.71),
}
SLOW = {  # in fp32 are the scores of 1,024 pairs
    "b32": Most(1930, 112, 0.0044),
    "b16": Most(1930, 187, 0.0044),
    "coca_b32_1024": Most(4079, 292, 0.0044),
    "photos1": Most(1939, 304, 0.0044),
    "photos2": Most(2491, 429, 0.0044),
    "photos2_60": Most(2712, 588, 0.0044),
}
OBJECTIVES = [f"objective:{name}" for name in IDS if not name.startswith("centred")]
"""of every registered objective; the one of the docs has a state, and says that it waits"""
WORLDS = {
    "loss:1,1024": (154, 0),
    "loss:1,8192": (154, 0),
    "loss:8,128": (157, 8),
    "loss:64,512": (157, 8),
    "loss:64,1024": (157, 8),
    "loss:512,64": (157, 8),
    "loss:512,512": (289, 14),
}
"""launches and collectives of the contrastive loss, by ranks and pairs of each: flat up to 64 ranks"""


def measured(names: list[str]) -> dict[str, Any]:
    """What the steps ask for, or why they failed."""
    if compiler() is None:
        missing("no C++ compiler, with which the fake device is built")
    command = [sys.executable, "-m", "treering.tests.support.fake_cuda.steps", *names]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).anchor)
    assert found.returncode == 0, found.stderr[-3000:]
    answers: dict[str, Any] = json.loads(found.stdout)
    return answers


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    return measured([*STEPS, *OBJECTIVES, *WORLDS, "waits", "mixes"])


def assert_within(figures: dict[str, Any], most: Most) -> None:
    assert "error" not in figures, figures["error"]
    for name, limit in most._asdict().items():
        allowed = limit if name == "launches" else ROOM * limit
        assert figures[name] <= allowed, f"{name}: {figures[name]:,}, and {limit:,} at most were expected"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_asks_for_no_more(name: str, found: dict[str, Any]) -> None:
    assert_within(found[name], STEPS[name])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_waits(name: str, found: dict[str, Any]) -> None:
    assert "error" not in found[name], found[name]["error"]


@pytest.mark.parametrize("name", WORLDS)
def test_the_loss_over_ranks(name: str, found: dict[str, Any]) -> None:
    launches, collectives = WORLDS[name]
    assert found[name]["launches"] <= launches
    assert found[name]["collectives"] <= collectives


def test_a_wait_and_a_wrong_device_are_seen(found: dict[str, Any]) -> None:
    """Power: an objective that reads a number, and one whose mask is on the host."""
    assert found["waits"]["error"].startswith("HostWaits: a number of the device is read at tests/support/fake_cuda")
    assert "device" in found["mixes"]["error"]


@pytest.mark.slow
def test_the_whole_table() -> None:
    answers = measured([*SLOW])
    for name, most in SLOW.items():
        assert_within(answers[name], most)
