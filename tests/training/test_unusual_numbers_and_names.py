"""Runs with losses and scores that are not finite, and with names that mean something elsewhere: they end, and can be
read again."""

from __future__ import annotations

import tarfile
from math import inf, nan
from pathlib import Path

import pytest
import torch
from PIL import Image

from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES, dies, lines
from treering.training import loop
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store
from treering.training.engines import base
from treering.training.engines.base import StepResult
from treering.training.recipe import Recipe
from treering.training.report.readable import counts_first, is_fraction, lower_is_better, score
from treering.training.report.sections import score_names
from treering.training.run_plan import RunPlan
from treering.training.state import RunState
from treering.training.tally import Tally, fold
from treering.training.world import World

MORE = ["data.workers=0", "eval.examples=0"]


def recipe(*more: str) -> Recipe:
    return read_recipe("emoji", [*SIZES, *MORE, "eval.suites=[]", *more]).recipe


def test_a_loss_that_is_not_finite_is_in_no_window_and_its_commits_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = base.Forward.forward, [0]

    def forward(self: base.Forward, inputs: base.Inputs, losses: bool = True) -> object:
        found = real(self, inputs, losses)
        if losses and torch.is_grad_enabled():
            count[0] += 1
            if count[0] == 3:
                assert isinstance(found, dict)
                return {name: loss * nan for name, loss in found.items()}
        return found

    monkeypatch.setattr(base.Forward, "forward", forward)
    stages = "stages=[{samples: 120, plateau: {window: 1200}}, {samples: 60, grow: {image.depth: 2}}]"
    with dies("step", 7):
        loop.train(recipe(stages, "checkpoint.every=60"), tmp_path)
    commits = Commits(Store(str(tmp_path / "commits")))
    (name,) = commits.names()
    window = commits.verified(name).manifest.state.window
    assert len(window) == 2  # of five steps two are in the warm-up, and one is not finite
    assert all(0 < loss < 100 for loss, _ in window)
    assert loop.train(recipe(stages, "checkpoint.every=60"), tmp_path).finished


@pytest.mark.parametrize("loss", [nan, inf, -inf])
def test_a_window_takes_finite_losses_alone(loss: float) -> None:
    plan = RunPlan.of(recipe("stages=[{samples: 240, plateau: {window: 120}}, {samples: 12}]"), ())
    tally = Tally(World(0, 1, torch.device("cpu")))
    for value in (1.0, loss, 2.0):
        tally.add(StepResult({"contrastive": torch.tensor(value)}, torch.tensor(1.0)), {"contrastive": 1.0}, 60)
    found = fold(tally.take(), RunState(step=13, samples=156), plan, None, False)
    assert [value for value, _ in found.window] == [1.0, 2.0]
    assert 0 < found.flops < inf


def test_a_score_that_is_not_finite_and_a_suite_called_like_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The uniformity of one picture, and class folders under the name zero_shot_pets."""
    for kind, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "pets" / kind).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / "pets" / kind / "0.png")
    (tmp_path / "a.txt").write_text("red")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "pets/cat/0.png", "a.png")
        tar.add(tmp_path / "a.txt", "a.txt")
    (tmp_path / "s.yaml").write_text("name: zero_shot_pets\ndata: pets\nprotocol: zero_shot\n")
    suites = f"eval.suites=[geometry, '{tmp_path}/s.yaml']"
    keep = "checkpoint.keep_best=geometry/uniformity_image"
    of = recipe("stages=[{samples: 60}]", suites, f"eval.data={tmp_path}/0.tar", keep)
    assert loop.train(of, tmp_path / "run").finished
    found = find_commit(str(tmp_path / "run")).manifest.scores
    assert "zero_shot_pets/accuracy@1" in found
    assert "geometry/uniformity_image" not in found
    assert "geometry/uniformity_image is nan here and is left out" in capsys.readouterr().err
    (line,) = lines(tmp_path / "run", "eval")
    assert line["data"] == {"geometry": f"{tmp_path}/0.tar", "zero_shot_pets": f"{tmp_path}/pets"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{tmp_path}/pets" in page
    assert f"{tmp_path}/0.tar" in page


@pytest.mark.parametrize(
    "label", ["alignment", "calibration_error", "cider", "modality_gap", "a/b@5", "uniformity_text"]
)
def test_a_label_is_a_name_and_nothing_else(label: str) -> None:
    """Characters of a game have an alignment; the accuracy of telling it is higher the better, and a fraction."""
    key = f"zero_shot/{label}"
    assert lower_is_better(key) is False
    assert is_fraction(key)
    assert score(key, 0.5) == "50.0%"
    assert counts_first(key)
    assert score_names(key) == ("Zero-shot", label.replace("_", " "))
    assert lower_is_better("geometry/alignment")


@pytest.mark.parametrize(
    ("path", "value"), [("optimizer.lr", inf), ("optimizer.weight_decay", inf), ("data.train", nan)]
)
def test_numbers_of_a_recipe_are_finite(path: str, value: float) -> None:
    tree = recipe("stages=[{samples: 60}]").model_dump(mode="json")
    block, key = path.split(".")
    if key == "train":
        tree[block][key][0]["weight"] = value
    else:
        tree[block][key] = value
    with pytest.raises(ValueError, match=rf"{path}.* = {value} is not a finite number"):
        Recipe.model_validate(tree)
