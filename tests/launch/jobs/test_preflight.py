"""What a node finds wrong with itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.launch.errors import RunError
from treering.launch.jobs import preflight
from treering.launch.jobs.attempts import BAD_NODE
from treering.launch.run_folder import STOPPED


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").touch()
    return tmp_path


def test_a_good_node_finds_nothing_and_leaves_nothing(run: Path) -> None:
    assert preflight.examine_node(run, 1) == []
    assert list((run / "job").iterdir()) == []


def test_a_node_without_the_folder(tmp_path: Path) -> None:
    (wrong,) = preflight.examine_node(tmp_path / "elsewhere", 1)
    assert "cannot see the run folder" in wrong


@pytest.mark.parametrize("skew", [-90, 90])
def test_a_clock_that_is_off(skew: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = time.time
    monkeypatch.setattr("treering.launch.jobs.preflight.time.time", lambda: true() + skew)
    (wrong,) = preflight.examine_node(run, 1)
    assert "its clock is 90 s off" in wrong


def test_too_little_memory(run: Path) -> None:
    (wrong,) = preflight.examine_node(run, 10**6)
    assert "of memory for 1,000,000 processes" in wrong


def test_gpus_that_are_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREERING_GPUS", "1")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    monkeypatch.setattr("treering.launch.jobs.preflight.MIN_MEMORY", 0)
    (wrong,) = preflight.examine_node(run, there + 1)
    assert f"{there} GPUs are usable and {there + 1} are needed" in wrong


@pytest.mark.parametrize("slow", ["n1", "n2", None])
def test_the_slow_one_of_three_nodes_is_named(slow: str | None, on_ranks: Callable[..., list[Any]]) -> None:
    """Every transfer of the slow node is delayed, and the site requires a bandwidth that only the others reach."""

    def look(world: Any, slow: str | None) -> tuple[int, str]:
        preflight.socket.gethostname = lambda: f"n{world.rank + 1}"  # type: ignore[attr-defined]
        os.environ[preflight.MIN_BANDWIDTH] = "0.02" if slow else "0.00001"
        preflight._HEAD_START = 0.1
        send = torch.distributed.send

        def slowly(*words: Any, **more: Any) -> Any:
            time.sleep(0.3 if slow in (f"n{world.rank + 1}", f"n{words[1] + 1}") else 0)
            return send(*words, **more)

        torch.distributed.send = slowly
        all_reduce = preflight._all_reduce

        def slow_all_reduce(*words: Any) -> None:
            time.sleep(0.3 if slow == f"n{world.rank + 1}" else 0)
            all_reduce(*words)

        preflight._all_reduce = slow_all_reduce
        try:
            preflight.check_network()
        except RunError as error:
            return error.code, str(error)
        return 0, ""

    answers = on_ranks(3, look, slow)
    if slow is None:
        assert answers == [(0, "")] * 3
        return
    place = int(slow[1]) - 1
    assert [code for code, _ in answers] == [BAD_NODE if rank == place else STOPPED for rank in range(3)]
    assert f"slow: {slow}" in answers[place][1]
