"""The plan against what runs measure: parameters, operations, commits, memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from treering.launch.commands.plan import DEVICES, _stages, as_table, plan
from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.launch.run import check_memory
from treering.models.flops import parameters
from treering.models.model import empty
from treering.training import device
from treering.training.engines import activation_checkpointing
from treering.training.report.readable import bytes_text, compact

SMALL = ["data.batch=32", "stages=[{samples: 96}, {grow: {image.depth: 6}, samples: 96}]", "schedule.warmup=32"]
REST = ["eval.suites=[]", "log.every=1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict], Path]:
    """A plan for the CPU and the log of the run."""
    import os
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("planned") / "run"

    def treering(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "treering.launch", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
        return done.stdout

    planned = json.loads(treering("plan", "emoji", "--device", "cpu", "--json", *SMALL, *REST))
    treering("train", "emoji", "--out", str(out), *SMALL, *REST)
    return planned, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], out


def test_parameters_are_exact(measured: tuple[dict, list[dict], Path]) -> None:
    planned, rows, _ = measured
    found = [row["parameters"] for row in rows if row["event"] == "step"]
    assert [stage["parameters"] for stage in planned["stages"]] == [found[0], found[-1]]


def test_operations_and_commits_are_within_one_percent(measured: tuple[dict, list[dict], Path]) -> None:
    planned, rows, out = measured
    assert planned["flops"] == pytest.approx([r for r in rows if r["event"] == "step"][-1]["flops"], rel=0.01)
    newest = max((out / "commits").glob("step-*"))
    assert planned["commit_bytes"] == pytest.approx(sum(f.stat().st_size for f in newest.iterdir()), rel=0.01)


def test_memory_is_within_fifteen_percent(measured: tuple[dict, list[dict], Path]) -> None:
    planned, rows, _ = measured
    peak = max(row["peak_memory"] for row in rows if row["event"] == "step")
    print(f"planned {planned['memory_per_device'] / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert planned["memory_per_device"] == pytest.approx(peak, rel=0.15)


def test_more_devices_share_the_work_and_the_cost_stays() -> None:
    recipe = read_recipe("emoji", SMALL).recipe
    one, eight = plan(recipe, 1, 1, "h100", 0.4, 2.0), plan(recipe, 2, 4, "h100", 0.4, 2.0)
    assert eight["seconds"] == pytest.approx(one["seconds"] / 8)
    assert eight["cost"] == pytest.approx(one["cost"])
    assert one["seconds"] == pytest.approx(one["flops"] / (0.4 * DEVICES["h100"].peak))
    assert one["gradient_bytes_per_step_and_device"] == 0
    assert any("precision" in said for said in one["warnings"])
    assert any("pairs of a batch" in said for said in eight["warnings"])


@pytest.mark.parametrize(
    ("words", "each"),
    [([], 12), (["optimizer.ema=0.99"], 16), (["optimizer.kind=muon"], None), (["engine.kind=fsdp"], 12)],
)
def test_a_commit_holds_what_the_optimizer_keeps(words: list[str], each: int | None) -> None:
    recipe = read_recipe("emoji", [*SMALL, *words]).recipe
    spec = recipe.specs()[0]
    found = activation_checkpointing.commit_bytes(spec, recipe.optimizer)
    if each is None:
        from treering.models.model import build

        named = dict(build(spec, 0).named_parameters())
        blocks = sum(p.numel() for name, p in named.items() if ".blocks." in name and p.ndim == 2)
        assert found == 12 * sum(p.numel() for p in named.values()) - 4 * blocks
    else:
        assert found == each * parameters(spec)


@pytest.mark.parametrize(
    ("engine", "shares"),
    [
        ("{kind: ddp}", (4, 4, 8)),
        ("{kind: fsdp}", (1, 1, 2)),
        ("{kind: fsdp, shard_group: 2}", (2, 2, 4)),
        ("{kind: deepspeed, zero_stage: 1}", (4, 4, 3)),
        ("{kind: deepspeed, zero_stage: 2}", (4, 1, 3)),
        ("{kind: deepspeed, zero_stage: 3}", (1, 1, 3)),
        ("{kind: deepspeed, zero_stage: 3, offload_optimizer: true}", (1, 1, 0)),
    ],
)
def test_engines_spread_what_they_spread(engine: str, shares: tuple[int, ...]) -> None:
    """Bytes a parameter, on each of four processes."""
    recipe = read_recipe("emoji", [*SMALL, f"engine={engine}"]).recipe
    spec = recipe.specs()[0]
    parts = activation_checkpointing.memory_parts(spec, recipe.engine, recipe.optimizer, 4, 8)
    found = [parts[name] / parameters(spec) for name in ("weights", "gradients", "optimizer")]
    assert found == pytest.approx(shares)


def test_what_does_not_fit_is_a_warning(refused: Callable[..., str]) -> None:
    recipe = read_recipe("emoji", [*SMALL, "data.batch=8192", "model.image.width=4096", "model.image.heads=128"]).recipe
    found = plan(recipe, 1, 1, "l40s", 0.4, None)
    assert any("a device needs about" in said for said in found["warnings"])
    assert "is not known; known are cpu, a10, a100, " in refused("plan", "emoji", "--device", "abacus")
    assert "cannot share data.batch = 128" in refused("plan", "emoji", "--nodes", "3")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_moments_are_those_of_accelerates_estimate(open_clip: ModuleType, precision: str) -> None:
    """`accelerate estimate-memory` counts them from a model without memory, its own way."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    recipe = read_recipe("photos", [f"engine={{precision: {precision}}}"]).recipe
    spec = recipe.specs()[0]
    model = empty(spec)
    total, _ = calculate_maximum_sizes(model)
    total -= sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    theirs = estimate_training_usage(int(total), {"fp32": "float32", "bf16": "bfloat16"}[precision])
    ours = activation_checkpointing.memory_parts(spec, recipe.engine, recipe.optimizer, 1, 1)
    assert ours["optimizer"] == theirs["optimizer"]
    # In bf16 they count autocast's copies with the gradients, and we with the weights.
    assert ours["weights"] + ours["gradients"] == theirs["model"] + theirs["gradients"]
    assert (ours["weights"] == theirs["model"]) is (precision == "fp32")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_its_terminal_and_cuts_nothing(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Every quantity of every stage in full, for nine stages: no ellipsis, no line that is broken within a number."""
    stages = "{samples: 96}" + "".join(f", {{grow: {{image.depth: {depth}}}, samples: 96}}" for depth in range(4, 12))
    found = plan(read_recipe("emoji", [SMALL[0], f"stages=[{stages}]", SMALL[2]]).recipe, 1, 1, None, 0.4, None)
    assert found["device"] == "cpu"
    console = Console(width=width)
    console.print(as_table(found, width))
    said = capsys.readouterr().out
    assert "…" not in said
    assert all(len(line.rstrip()) <= width for line in said.splitlines())
    for stage in found["stages"]:
        assert compact(stage["parameters"]) in said
        assert bytes_text(stage["memory"]["activations"]) in said
    assert "1 node," in said


def test_a_short_run_needs_no_advice_about_its_loader() -> None:
    quick, long = (
        plan(
            read_recipe("emoji", [*SMALL[:1], f"stages=[{{samples: {n}}}]", *SMALL[2:]]).recipe, 1, 1, "h100", 0.4, None
        )
        for n in (96, 100_000_000_000)
    )
    assert not any("data.workers" in said for said in quick["warnings"])
    assert any("set data.workers=" in said for said in long["warnings"])


def test_a_run_that_decoding_holds_up_says_so() -> None:
    """A core decodes a few thousand emoji a second, and a GPU takes far more; a large model takes few."""
    few, many = ("model.image.depth=3", "model.image={width: 1024, depth: 48, heads: 16, patch: 4, resolution: 72}")
    small, large = (
        plan(
            read_recipe("emoji", [*SMALL[:1], "stages=[{samples: 100_000_000_000}]", *SMALL[2:], model]).recipe, 1, 8,
            "h100", 0.4, None,
        )
        for model in (few, many)
    )  # fmt: skip
    [bound] = [said for said in small["warnings"] if "bound by decoding" in said]
    assert "set data.workers=16" in bound
    assert not any("bound by decoding" in said for said in large["warnings"])


def test_a_stage_that_does_not_fit_is_found_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second stage that needs too much, or leaves too little, at the very numbers of the plan."""
    recipe = read_recipe("emoji", SMALL).recipe
    needs = [stage["memory"]["total"] for stage in plan(recipe, 1, 1, "h100", 0.4, None)["stages"]]
    assert needs[1] > needs[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has = 0.0
    monkeypatch.setattr(device, "memory", lambda of: has)
    has = (needs[0] + needs[1]) / 2
    with pytest.raises(RecipeError, match=r"^stages\.1 needs about .*; set engine\.activation_budget=auto"):
        check_memory(recipe, 1)
    has = needs[1] / 0.95
    check_memory(recipe, 1)
    assert "warning: stages." in capsys.readouterr().err
    has = 2 * needs[1]
    check_memory(recipe, 1)
    assert not capsys.readouterr().err
    check_memory(recipe, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    has = 1.0
    check_memory(recipe, 1)


def test_the_recipe_for_photos_fits_the_device_it_names() -> None:
    recipe = read_recipe("photos").recipe
    for has in (24e9, 40e9, 80e9, 141e9):
        for stage in _stages(recipe, 1, [14] * 256, True, has, activation_checkpointing.CUDA_BYTES):
            assert stage["memory"]["total"] < activation_checkpointing.USABLE * has
