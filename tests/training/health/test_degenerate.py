"""Training that learns nothing is said at its first log line, with the cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treering.launch.recipe.load import read_recipe
from treering.tests.support.tiny_runs import SIZES
from treering.training import loop
from treering.training.health.degenerate import nothing_to_learn
from treering.training.objectives.base import Inputs
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive, SigmoidContrastive
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))


def inputs(captions: list[int], samples: list[int]) -> Inputs:
    count = len(captions)
    ids = torch.tensor(captions), torch.tensor(samples)
    return Inputs(torch.zeros(count, 3, 8, 8), torch.zeros(3 * count), torch.full((count,), 3), *ids)


@pytest.mark.parametrize(
    ("captions", "samples", "said"),
    [
        ([1], [1], "data.batch = 1 is one pair, and objectives.contrastive has no negatives"),
        ([1, 1, 1], [1, 2, 3], "all 3 pairs of a batch have one caption"),
        ([1, 2, 3], [7, 7, 7], "all 3 pairs of a batch have one sample"),
        ([1, 1], [7, 7], "all 2 pairs of a batch have one caption"),
        ([1, 1, 2], [1, 2, 1], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_the_cause(captions: list[int], samples: list[int], said: str | None) -> None:
    for objective in (Contrastive(1.0), SigmoidContrastive(1.0)):
        found = nothing_to_learn(inputs(captions, samples), [objective], 0.3, 0.2, ALONE)
        assert (found or "").startswith(said or "\0") or found is said


def test_a_term_without_negatives_is_no_matter_and_zero_is() -> None:
    one = inputs([1], [1])
    assert nothing_to_learn(one, [CaptionLoss(1.0)], 2.0, 1.0, ALONE) is None
    zero = nothing_to_learn(inputs([1, 2], [1, 2]), [Contrastive(0.0)], 0.0, 0.0, ALONE)
    assert zero is not None
    assert "exactly 0" in zero


def test_a_run_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["data.batch=1", "data.workers=0", "stages=[{samples: 4}]", "schedule.warmup=1", "eval.suites=[]"]
    recipe = read_recipe("emoji", [*SIZES, *more, "eval.examples=0"]).recipe
    loop.train(recipe, tmp_path)
    assert capsys.readouterr().err.count("warning: data.batch = 1 is one pair") == 1
