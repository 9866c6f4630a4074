"""A commit grown offline is the commit of a run that grew there: trained on, the two are the same bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treering.launch.commands.grow import grow_offline
from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.spec import SpecError
from treering.tests.support.tiny_runs import measured, same_end
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.manifest import Commit
from treering.training.checkpoint.store import Store, StoreError
from treering.training.checkpoint.writer import CommitPart
from treering.training.growth import offline
from treering.training.growth.offline import OldState, grow_commit
from treering.training.loop import train

GROW = "{grow: {image.width: 24, text.width: 16, text.depth: 3, captioner.depth: 1}, multiplier_fade: 60, samples: 36}"
TINY = [
    "data.batch=12",
    "model.embed_dim=16",
    "model.image={width: 16, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 8, depth: 1, heads: 2, context: 16}",
    "model.captioner=null",
    "schedule.warmup=24",
    "checkpoint.every=12",
    "checkpoint.keep=20",
    "eval.suites=[]",
    "log.every=1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that grows on its way: two stages of three steps."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(read_recipe("emoji", [*TINY, f"stages=[{{samples: 36}}, {GROW}]"]).recipe, out).finished
    return out


def commit_at(out: Path, step: int) -> Commit:
    commits = Commits(Store(str(out / "commits")))
    return commits.open(next(name for name in commits.names() if f"{step:012d}" in name))


def losses(out: Path) -> list[tuple[int, float, float]]:
    return measured(out, "loss", "lr")


def test_it_is_what_the_run_would_have_been(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "PART_BYTES", 1 << 20)  # several parts of each kind
    out = tmp_path / "grown"
    to = ["image.width=24,text.width=16", "text.depth=3,captioner.depth=1"]
    found = grow_offline(commit_at(whole, 3).url, to, [], ["multiplier_fade=60", "samples=36"], str(out))
    commit = find_commit(str(out))
    assert found["commit"] == commit.url
    assert len(commit.manifest.parts) > 6
    assert found["continue"][:2] == ["treering", "train"]
    grown = commit.manifest.state.lineage[-1]
    assert (grown.event, grown.detail["source"], grown.detail["seed"]) == ("grow", commit_at(whole, 3).url, 0)
    assert [o["operator"] for o in grown.detail["operators"]] == ["widen"] * 6 + ["depth", "captioner"]
    assert commit.manifest.state.multipliers["text.projection.weight"] == 0.5
    assert train(read_recipe(str(out / "recipe.yaml")).recipe, out).finished
    assert losses(out) == losses(whole)[3:]
    same_end(out, whole)


def test_new_parts_from_the_average_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds of state are read in turn, from several parts of each."""
    monkeypatch.setattr(offline, "PART_BYTES", 1 << 20)
    grow = "{grow: {image.width: 24, text.depth: 2, captioner.depth: 1}, inherit: ema, samples: 36}"
    recipe = read_recipe("emoji", [*TINY, "optimizer.ema=0.5", f"stages=[{{samples: 36}}, {grow}]"]).recipe
    assert train(recipe, tmp_path / "run").finished
    stage = {"grow": recipe.stages[1].grow, "inherit": "ema"}
    reads: list[str] = []
    real = Commit.pieces
    monkeypatch.setattr(Commit, "pieces", lambda self, part: (reads.append(part.file), real(self, part))[1])
    made = grow_commit(commit_at(tmp_path / "run", 3).url, stage, str(tmp_path / "off" / "commits"), 36)
    assert max(map(reads.count, reads)) <= 4  # not once for each tensor
    inherited = [o for o in made.event["operators"] if o["operator"] == "inherit"]
    assert inherited == [{"operator": "inherit", "new_from": "ema", "reconstruction": True, "lossy": True}]
    assert train(made.recipe, tmp_path / "off").finished
    assert losses(tmp_path / "off") == losses(tmp_path / "run")[3:]
    mine, other = find_commit(str(tmp_path / "off")).tensors(), find_commit(str(tmp_path / "run")).tensors()
    assert all(torch.equal(mine[path], other[path]) for path in other)


def test_the_rest_of_a_stage_is_the_new_one(whole: Path, tmp_path: Path) -> None:
    source = commit_at(whole, 2)
    recipe = grow_commit(source.url, {"grow": {"text.context": 20}}, str(tmp_path)).recipe
    assert [stage.samples for stage in recipe.stages] == [24, 12, 36]
    assert recipe.stages[1].grow == {"text.context": 20}
    assert recipe.total_samples == 72
    health = find_commit(str(tmp_path)).manifest.state.health
    assert source.manifest.state.health.losses
    assert (health.losses, health.healthy_step) == ({}, 2)  # a new model is not judged by the old one's losses
    assert recipe.objectives.caption is not None  # a later stage has the captioner
    last = grow_commit(source.url, {"grow": {"text.context": 20}}, str(tmp_path / "last"), 48).recipe
    assert [stage.samples for stage in last.stages] == [24, 48]
    assert "caption" not in dict(last.objectives.items())
    with pytest.raises(StoreError, match="has commits already; give an empty folder"):
        grow_commit(source.url, {"grow": {"text.context": 20}}, str(tmp_path))
    with pytest.raises(SpecError, match="has not trained since it grew"):
        grow_commit(str(tmp_path), {"grow": {"text.context": 24}}, str(tmp_path / "again"))


def test_every_part_is_read_once_for_each_kind_and_one_is_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "PART_BYTES", 1 << 20)
    grow_commit(commit_at(whole, 3).url, {"grow": {"image.depth": 2}}, str(tmp_path / "a"), samples=24)
    source = find_commit(str(tmp_path / "a"))
    read: list[str] = []
    real = Commit.pieces
    monkeypatch.setattr(Commit, "pieces", lambda self, part: (read.append(part.file), real(self, part))[1])
    held = OldState(source)
    whole_state = {path: held[path] for path in held}  # in the order of the parts
    files = [part.file for part in source.manifest.parts]
    assert len(files) > 6
    assert read == files * 2  # once to see what is where, once to use it
    assert len(held._part) < len(whole_state) == len(held)
    expected = source.tensors()
    assert all(torch.equal(whole_state[path], expected[path]) for path in expected)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ([], [], "nothing to grow; say what, as in --to image.depth=12"),
        (["image.depth=1"], ["samples=24"], "has these sizes already"),
        (["image.depth=2"], [], "at the end of its stage; give the length of the next one: samples=36"),
        (["image.depth=0"], ["samples=24"], "smaller than the model's 1"),
        (["image.depth=2"], ["sample=24"], "'sample' is not an option of growth; known are samples, width_init"),
        (["image.depth=2"], ["samples=no"], "is not a valid budget"),
        (
            ["image.depth=2"],
            ["samples=24", "depth_init=none"],
            "depth_init = 'none': must be 'zero', 'stack' or 'interleave'",
        ),
        (["image.depth=two"], ["samples=24"], r"^grow\.image\.depth = 'two': must be a number$"),
    ],
)
def test_bad_requests_are_refused(to: list[str], options: list[str], message: str, whole: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, SpecError), match=message):
        grow_offline(commit_at(whole, 3).url, to, [], options, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_nothing_that_a_reader_sees(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = offline._put

    def dying(store: Store, name: str, kind: str, number: int, chunk: dict[str, torch.Tensor]) -> CommitPart:
        if kind == "exp_avg_sq":
            raise KeyboardInterrupt
        return real(store, name, kind, number, chunk)

    monkeypatch.setattr(offline, "_put", dying)
    stage = {"grow": {"image.depth": 2}}
    with pytest.raises(KeyboardInterrupt):
        grow_commit(commit_at(whole, 3).url, stage, str(tmp_path), 24)
    assert Commits(Store(str(tmp_path))).names() == []
    monkeypatch.undo()
    assert grow_commit(commit_at(whole, 3).url, stage, str(tmp_path), 24).url.endswith("attempt-0002")
