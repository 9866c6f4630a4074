"""What docs/checkpoints.md says can be typed, and what it says of it: beginning from another run, and export."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from treering.models.model import build
from treering.models.spec import ModelSpec
from treering.training.checkpoint.commits import find_commit

PAGE = Path(__file__).parents[3] / "docs/checkpoints.md"
Run = Callable[..., object]


@pytest.fixture
def page(treering: Run, tiny: Path, here: Path) -> Path:
    """The folder in which every command of the page has been given."""
    (here / "tiny.yaml").write_text(tiny.read_text())
    commands = re.findall(r"^\$ treering (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        done = treering(*shlex.split(command))
        assert done.returncode == 0, (command, done.stderr)
    return here


def test_the_commands_of_the_page(page: Path) -> None:
    first, second, longer = (find_commit(str(page / "runs" / name)) for name in ("tiny", "second", "longer"))
    where = f"runs/tiny/commits/{first.name}"
    assert first.manifest.state.step == 4
    assert [event.event for event in first.manifest.state.lineage] == ["start"]  # the second time changed nothing

    state = second.manifest.state
    assert (state.step, state.applied) == (4, 4)
    begun = state.lineage[0]
    assert (begun.event, begun.step, begun.detail["commit"], begun.detail["load"]) == ("from", 0, where, "weights")
    assert begun.detail["lineage"][0]["event"] == "start"
    rows = [json.loads(line) for line in (page / "runs/second/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [1, 2, 3, 4]

    state = longer.manifest.state
    assert (state.step, state.samples, state.applied) == (8, 64, 8)
    rows = [json.loads(line) for line in (page / "runs/longer/metrics.jsonl").read_text().splitlines()]
    assert state.seconds <= rows[-1]["time"] - rows[0]["time"] + 5  # of these four steps alone
    assert [event.event for event in state.lineage] == ["start", "from", "start"]
    assert state.lineage[1].detail == {"commit": where, "load": "all"}
    rows = [json.loads(line) for line in (page / "runs/longer/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == [5, 6, 7, 8]

    with safe_open(page / "tiny-weights/model.safetensors", "pt") as file:
        spec = ModelSpec.model_validate_json(file.metadata()["spec"])
        model = build(spec, seed=0)
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
        truth = first.tensors("model")
        assert all(torch.equal(file.get_tensor(name), truth[f"model/{name}"]) for name in file.keys())  # noqa: SIM118
    assert ModelSpec.model_validate_json((page / "tiny-weights/spec.json").read_text()) == spec == first.manifest.spec
    lineage = json.loads((page / "tiny-weights/lineage.json").read_text())
    assert (lineage["commit"], lineage["weights"], lineage["step"]) == (where, "model", 4)
    assert [event["event"] for event in lineage["events"]] == ["start"]


def test_all_that_is_carried_is_what_an_uninterrupted_run_has(treering: Run, tiny: Path, here: Path) -> None:
    """The same recipe to the middle and on in another run, with an average; weights alone give something else."""
    more = ("schedule.cooldown=0.0", "optimizer.ema=0.5", "eval.suites=[]")
    for command in (
        ("--out", "whole", "stages.0.samples=64"),
        ("--out", "half"),
        ("--out", "rest", "stages.0.samples=64", "--from", "half", "--load", "all"),
        ("--out", "weights", "stages.0.samples=64", "--from", "half"),
    ):
        done = treering("train", str(tiny), *command, *more)
        assert done.returncode == 0, done.stderr
    whole, rest, weights = (find_commit(str(here / name)).tensors() for name in ("whole", "rest", "weights"))
    assert whole.keys() == rest.keys()
    assert all(torch.equal(whole[path], rest[path]) for path in whole)
    assert not torch.equal(whole["model/logit_scale"], weights["model/logit_scale"])
    done = treering("export", "rest", "--to", "safetensors", "--out", "average", "--json")
    assert json.loads(done.stdout)["weights"] == "ema"
    with safe_open(here / "average/model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("logit_scale"), rest["ema/logit_scale"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.image.depth=2"], r"of another shape \(image.depth: 1 there, 2 here\); give the recipe that shape"),
        (
            ["--load", "all", "data.batch=4"],
            "trained in batches other than data.batch = 4; change the recipe, or load",
        ),
        (["--load", "all", "optimizer.ema=0.9"], "has no ema, which the recipe's optimizer needs"),
        (["--load", "all", "stages.0.samples=16"], "is at step 4 of stage 0, which is not in the recipe"),
        (["--load", "moments"], "init_from.load"),
    ],
)
def test_what_cannot_begin_is_refused_before_it_starts(
    more: list[str], message: str, treering: Run, refused: Callable[..., str], tiny: Path
) -> None:
    assert treering("train", str(tiny), "--out", "half", "eval.suites=[]").returncode == 0
    said = refused("train", str(tiny), "--out", "new", "--from", "half", "eval.suites=[]", "schedule.warmup=8", *more)
    assert re.search(message, " ".join(said.split())), said


def test_exports_that_are_refused(treering: Run, refused: Callable[..., str], tiny: Path, here: Path) -> None:
    assert treering("train", str(tiny), "--out", "half", "eval.suites=[]").returncode == 0
    assert "has no average of the weights" in refused(
        "export", "half", "--to", "safetensors", "--out", "new", "--weights", "ema"
    )
    assert "is not a known format" in refused("export", "half", "--to", "pickle", "--out", "new")
    assert "exists; give a new folder" in refused("export", "half", "--to", "safetensors", "--out", "half")
    assert "there is no commit" in refused("export", "nowhere", "--to", "safetensors", "--out", "new")
