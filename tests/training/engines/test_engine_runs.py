"""Whole runs under the engines that spread the state: grown, killed, evaluated, and continued under another engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.training import loop
from treering.training.checkpoint.commits import find_commit
from treering.training.engines.zero_state import require
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.world import World

TINY = [
    "data.batch=12",
    "model.embed_dim=16",
    "model.image={width: 16, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 8, depth: 1, heads: 2, context: 16}",
    "model.captioner.depth=1",
    "schedule.warmup=24",
    "optimizer.ema=0.8",
    "stages=[{samples: 48}, {grow: {image.width: 32, text.width: 16, image.depth: 2, embed_dim: 24}, samples: 60}]",
    "checkpoint.every=36",
    "eval={suites: [retrieval, zero_shot], examples: 2, data: samples://emoji/held_out}",
    "log.every=1",
]
FSDP, ZERO2, ZERO3 = (
    "{kind: fsdp}",
    "{kind: deepspeed, zero_stage: 2}",
    "{kind: deepspeed, zero_stage: 3, offload_optimizer: true}",
)


def recipe(engine: str, *overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, f"engine={engine}", *overrides]).recipe


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one plain process."""
    torch.set_num_threads(1)
    require(World(0, 1, torch.device("cpu")))  # ranks are forked: imported here, they need not import it
    out = tmp_path_factory.mktemp("whole")
    assert train(recipe("{kind: ddp}"), out).finished
    return out


class Died(Exception):
    """Stands in for a kill: nothing after it runs."""


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (FSDP, ZERO2),
        pytest.param(ZERO3, FSDP, marks=pytest.mark.slow),
        pytest.param(ZERO2, ZERO3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.slow), 8], ids=["grown after", "grown before"])
def test_a_run_goes_on_under_another_engine(
    first: str, then: str, at: int, whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """Died in `step`, continued from the commit before it: the losses of one process, growth included."""

    def dies(group: World) -> None:
        real = loop.Run.step

        def step(run: loop.Run, batch: Any) -> None:
            if run.state.step == at:
                run.uploads.finish()
                raise Died
            real(run, batch)

        loop.Run.step = step  # type: ignore[method-assign]
        with pytest.raises(Died):
            train(recipe(first), tmp_path)

    def goes_on(group: World) -> dict[str, float]:
        summary = train(recipe(then), tmp_path)
        assert summary.finished
        return summary.scores

    on_ranks(2, dies)
    scores = on_ranks(3, goes_on)
    assert all(found.keys() == scores[0].keys() and found == scores[0] for found in scores)
    steps, expected = lines(tmp_path, "step"), lines(whole, "step")
    assert [row["step"] for row in steps] == list(range(1, 10))
    for row, true in zip(steps, expected, strict=True):
        assert row["loss"] == pytest.approx(true["loss"], abs=1e-5)
        assert row["logit_scale"] == pytest.approx(true["logit_scale"], rel=1e-5)
        assert row["parameters"] == true["parameters"]
    (grow,) = lines(tmp_path, "grow")
    assert grow["logit_difference"] < 1e-5
    assert grow["parameters_after"] == lines(whole, "grow")[0]["parameters_after"]
    ours, theirs = find_commit(str(tmp_path)), find_commit(str(whole))
    assert ours.manifest.state.multipliers == theirs.manifest.state.multipliers != {}
    mine, other = ours.tensors(), theirs.tensors()
    assert {path: t.shape for path, t in mine.items()} == {path: t.shape for path, t in other.items()}
    averages = [path for path in mine if path.startswith("ema/")]
    assert len(averages) == len(mine) / 4
    for path in averages:  # softmax is blind to the bias of keys: there Adam steps along rounding noise
        assert path.endswith("key.bias") or torch.allclose(mine[path], other[path], atol=1e-4), path


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (
            "{kind: fsdp, zero_stage: 2}",
            r"engine.zero_stage \(override\): only for engine.kind = deepspeed; set that",
        ),
        (
            "{kind: ddp, offload_optimizer: true}",
            r"offload_optimizer \(override\): only for engine.kind = deepspeed",
        ),
        (
            "{kind: deepspeed, reshard_after_forward: false}",
            r"engine.reshard_after_forward \(override\): only for engine.kind = fsdp",
        ),
        ("{kind: deepspeed, zero_stage: 4}", r"engine.zero_stage = 4"),
        (
            "{kind: deepspeed, micro_batches: 2}",
            r"micro_batches \(override\): only for engine.kind = ddp or fsdp",
        ),
        ("{kind: deepspeed, compile: true}", r"engine.compile \(override\): only for engine.kind = ddp or fsdp"),
        ("{kind: horovod}", r"engine.kind = 'horovod' \(override\): must be one of 'ddp', 'fsdp', 'deepspeed'"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(engine: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        recipe(engine)
