"""Stages that cut captions (CLIPA): what the model sees, what it costs, and that a resume does not notice."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from treering.data.loading.loader import Loader
from treering.data.samples.clip_tokenizer import END, Tokenizer
from treering.launch.commands.plan import plan
from treering.launch.recipe.load import read_recipe
from treering.models.flops import training_flops
from treering.models.model import build
from treering.models.towers import TextTower
from treering.tests.support.tiny_runs import SIZES, lines, same_end, train_until
from treering.training.checkpoint.commits import find_commit
from treering.training.loop import train
from treering.training.recipe import Recipe

SHORT = 6
BATCH = 12
NO_CAPTIONER = ["model.captioner=null", "objectives.caption=null"]


def recipe(*words: str) -> Recipe:
    """Two steps of short captions, two at half of the patches too, and three of whole ones."""
    stages = "stages=[{samples: 24, context: 6}, {samples: 24, context: 6, patch_keep: 0.5}, {samples: 36}]"
    overrides = [*SIZES, stages, "eval.suites=[]", "checkpoint.every=12", "checkpoint.keep=20", *words]
    return read_recipe("emoji", overrides).recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Tensor, Tensor]]]:
    """A run, and the captions that its text tower saw."""
    out, seen = tmp_path_factory.mktemp("short") / "run", []
    forward = TextTower.forward

    def noted(self: TextTower, tokens: Tensor, lengths: Tensor, *more: Any) -> Any:
        seen.append((tokens.clone(), lengths.clone()))
        return forward(self, tokens, lengths, *more)

    TextTower.forward = noted  # type: ignore[method-assign, assignment]
    try:
        train(recipe(), out)
    finally:
        TextTower.forward = forward  # type: ignore[method-assign]
    return out, seen


def test_the_model_sees_the_first_tokens_and_the_end(whole: tuple[Path, list[tuple[Tensor, Tensor]]]) -> None:
    """The same captions of the same samples as without, tokenised by themselves."""
    _, seen = whole
    made, tokenizer = recipe(), Tokenizer()
    with closing(Loader(made.data, 24, 16, made.seed).batches(0)) as batches:
        for step, (tokens, lengths) in enumerate(seen):
            context = SHORT if step < 4 else 16
            captions = next(batches).captions
            assert tokens.tolist() == [i for caption in captions for i in tokenizer.encode(caption, context)]
            assert int(lengths.max()) == SHORT if step < 4 else int(lengths.max()) > SHORT
            assert (tokens[lengths.cumsum(0) - 1] == END).all()
    assert step == 6


def test_it_is_counted_as_it_is_seen(whole: tuple[Path, list[tuple[Tensor, Tensor]]]) -> None:
    """FLOPs, lengths and fractions of truncated captions in the log, and the plan before it."""
    out, seen = whole
    made, total = recipe(), 0.0
    [spec, *_] = made.specs()
    stages = plan(made, 1, 1, "cpu", 0.5, None)["stages"]
    for step, (row, (tokens, _)) in enumerate(zip(lines(out, "step"), seen, strict=True)):
        total += BATCH * training_flops(spec, len(tokens) / BATCH, 2 if step in (2, 3) else 4)
        assert row["flops"] == pytest.approx(total)
        assert row["caption_length"] == pytest.approx(len(tokens) / BATCH)
        assert (row["captions_cut"] > 0) == (step < 4)
    assert [stage["patches"] for stage in stages] == [4, 2, 4]
    assert stages[0]["tokens"] == stages[1]["tokens"] < SHORT < stages[2]["tokens"]
    assert sum(stage["flops"] for stage in stages) == pytest.approx(total, rel=0.03)
    assert stages[0]["memory"]["activations"] < stages[2]["memory"]["activations"]


def test_positions_behind_the_cut_wait(tmp_path: Path) -> None:
    """Nothing moves the positions that no caption reaches."""
    moved = []
    for words in ((), ("stages=[{samples: 48}]",)):
        made = recipe("stages=[{samples: 48, context: 6}]", *words)
        out = tmp_path / str(len(moved))
        train(made, out)
        after = find_commit(str(out)).tensors()["model/text.position_embedding"]
        moved.append((after != build(made.specs()[0], made.seed).text.position_embedding.detach()).any(1))
    assert moved[0].tolist() == [True] * SHORT + [False] * (16 - SHORT)
    assert moved[1][SHORT:].any()


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_resume_inside_and_across_stages_is_exact(
    step: int, whole: tuple[Path, list[tuple[Tensor, Tensor]]], tmp_path: Path
) -> None:
    train_until(step, recipe(), tmp_path)
    train(recipe(), tmp_path)
    assert [row["loss"] for row in lines(tmp_path, "step")] == [row["loss"] for row in lines(whole[0], "step")]
    same_end(tmp_path, whole[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages=[{samples: 48, context: 17}]"], r"stages\.0\.context = 17 cuts nothing"),
        (
            [
                "stages=[{samples: 48, context: 6}]",
                "model.text.pool=last",
                "model.captioner=null",
                "objectives.caption=null",
            ],
            r"stages\.0\.context = 6 would save nothing",
        ),
        (["stages=[{samples: 48, context: 2}]"], "context"),
    ],
)
def test_what_would_not_help_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(*words)
