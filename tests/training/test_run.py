"""Whole runs of a tiny model on the real emoji shards: killed, resumed, grown, and spread over ranks."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.data import Loader, Tokenizer
from treering.launch.recipe.load import read_recipe
from treering.training import loop
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store, StoreError
from treering.training.logging.run_log import Summary
from treering.training.loop import train
from treering.training.recipe import Recipe
from treering.training.starting.resume import check_same_run
from treering.training.world import World

TINY = [
    "data.batch=12",
    "model.embed_dim=16",
    "model.image={width: 32, depth: 1, heads: 2, patch: 12, resolution: 24}",
    "model.text={width: 16, depth: 1, heads: 2, context: 16}",
    "model.captioner.depth=1",
    "schedule.warmup=24",
    "stages=[{samples: 60}, {grow: {image.depth: 3, text.depth: 2, captioner.depth: 2}, samples: 84}]",
    "checkpoint.every=24",
    "eval={every: 48, suites: [retrieval, zero_shot], examples: 2, data: samples://emoji/held_out}",
    "log.every=1",
]


def recipe(*overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, *overrides]).recipe


def losses(out: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; every step once."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in steps}


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["event"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """The run that nothing happened to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    return out, train(recipe(), out)


def test_a_whole_run_leaves_everything(whole: tuple[Path, Summary]) -> None:
    out, summary = whole
    assert summary.finished
    assert len(losses(out)) == 12
    grow = events(out, "grow")
    assert len(grow) == 1
    assert grow[0]["step"] == 5
    before, *after = events(out, "eval")
    assert "flips" not in before  # nothing has grown yet
    for line in after:
        assert line["since"] == before["samples"]
        for key, flips in line["flips"].items():
            moved = (flips["won"] - flips["lost"]) / flips["queries"]
            assert line["scores"][key] - before["scores"][key] == pytest.approx(moved)
    assert {"retrieval/text_to_image@1", "zero_shot/role"} <= after[-1]["flips"].keys()
    assert grow[0]["logit_difference"] < 1e-5
    assert grow[0]["parameters_after"] > grow[0]["parameters_before"]
    assert {"retrieval/image_to_text@1", "zero_shot/skin_tone", "zero_shot/role"} <= set(summary.scores)
    assert set(summary.scores) == set(summary.chance)
    assert summary.report.exists()
    assert list(summary.tensorboard.iterdir())
    commit = find_commit(str(out))
    assert commit.url == summary.commit
    assert [event.event for event in commit.manifest.state.lineage] == ["start", "grow"]
    assert len(Commits(Store(str(out / "commits"))).names()) == 4  # checkpoint.keep, and the one before the growth


def test_cut_captions_are_counted(tmp_path: Path) -> None:
    made = recipe("model.text.context=6", "stages=[{samples: 48}]", "eval.suites=[]", "schedule.warmup=4")
    train(made, tmp_path)
    with closing(Loader(made.data, 24, 6, made.seed).batches(0)) as batches:
        shares = [sum(len(Tokenizer().encode(c, 99)) > 6 for c in b.captions) / 12 for b in islice(batches, 4)]
    logged = [row["captions_cut"] for row in events(tmp_path, "step")]
    assert logged == pytest.approx(shares)
    assert 0 < max(logged) < 1


class Died(Exception):
    """Stands in for a kill: nothing after it runs."""


@pytest.mark.parametrize("at", ["step 3", "step 7", "commit 4", "grow", "evaluate 8", "evaluate 12", "report"])
def test_a_resume_is_bit_identical(
    at: str, whole: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real kills are in tests/launch; here the exact place is chosen."""
    place, _, number = at.partition(" ")

    def dying(method: str) -> None:
        real = getattr(loop.Run, method)

        def wrapper(run: loop.Run, *arguments: Any, **named: Any) -> Any:
            if not number or run.state.step == int(number):
                raise Died
            return real(run, *arguments, **named)

        monkeypatch.setattr(loop.Run, method, wrapper)

    if place == "grow":
        monkeypatch.setattr(loop, "grow", lambda *a: (_ for _ in ()).throw(Died))
    elif place == "report":
        dying("summary")
    elif place == "commit":
        real = Commits.seal

        def seal(self: Commits, name: str, manifest: Any) -> None:
            if manifest.state.step == int(number):
                raise Died
            real(self, name, manifest)

        monkeypatch.setattr(Commits, "seal", seal)
    else:
        dying({"step": "step", "evaluate": "_evaluate"}[place])
    with pytest.raises(Died):
        train(recipe(), tmp_path)
    monkeypatch.undo()
    summary = train(recipe(), tmp_path)
    assert summary.finished
    assert losses(tmp_path) == losses(whole[0])
    assert summary.scores == whole[1].scores
    ours, theirs = find_commit(str(tmp_path)).tensors(), find_commit(str(whole[0])).tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(events(tmp_path, "grow")) == 1
    assert [row["step"] for row in events(tmp_path, "eval")] == [row["step"] for row in events(whole[0], "eval")]


@pytest.mark.parametrize("world", [2, 3])
def test_the_world_does_not_matter(world: int, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """Fifty steps, growth included: the losses of one process within 1e-5, and the same scores on every rank."""
    longer = recipe(
        "stages=[{samples: 240}, {grow: {image.depth: 2, text.depth: 2}, samples: 360}]", "checkpoint.every=240"
    )

    def one_rank(group: World) -> dict[str, float]:
        return train(longer, tmp_path / "many").scores

    alone = train(longer, tmp_path / "one").scores
    scores = on_ranks(world, one_rank)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert len(one) == len(many) == 50
    for step, (loss, norm) in one.items():
        assert many[step][0] == pytest.approx(loss, abs=1e-5)
        assert many[step][1] == pytest.approx(norm, rel=1e-3)
    assert all(ranks == scores[0] for ranks in scores)
    assert scores[0].keys() == alone.keys()


def test_a_finished_run_is_not_trained_again(whole: tuple[Path, Summary]) -> None:
    before = losses(whole[0])
    again = train(recipe(), whole[0])
    assert again.finished
    assert again.scores == whole[1].scores
    assert losses(whole[0]) == before


def test_another_recipe_is_refused(whole: tuple[Path, Summary]) -> None:
    with pytest.raises(
        StoreError, match=r"another recipe \(optimizer.lr: 0.001 there, 0.002 here\); use the same recipe"
    ):
        train(recipe("optimizer.lr=0.002"), whole[0])


def test_a_field_newer_than_the_commit_does_not_matter(whole: tuple[Path, Summary]) -> None:
    commit = find_commit(str(whole[0]))
    older = commit.manifest.recipe | {"stages": [s | {} for s in commit.manifest.recipe["stages"]]}
    for stage in older["stages"]:
        del stage["width_init"]
    manifest = commit.manifest.model_copy(update={"recipe": older})
    assert check_same_run(recipe(), replace(commit, manifest=manifest)) == []


OTHERS = "{source: samples://emoji/held_out, name: others, weight: 0}"


def test_a_mixture_may_change_from_stage_to_stage(tmp_path: Path, whole: tuple[Path, Summary]) -> None:
    """A source that arrives with the second stage: until then the run is the one without it."""
    mixed = [
        f"data.train=[{{source: samples://emoji}}, {OTHERS}]",
        "stages=[{samples: 60}, {mixture: {others: 1, samples://emoji: 2}, samples: 84}]",
    ]
    train(recipe(*mixed), tmp_path / "mixed")
    alone = losses(whole[0])
    assert [losses(tmp_path / "mixed")[step] == alone[step] for step in range(1, 7)] == [True] * 5 + [False]


def test_a_source_and_a_stage_may_come_while_the_run_trains(tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """Stopped in the first stage; continued with a source and a stage that are new: as if planned from the start. What
    lies behind cannot be changed, nor the stages once the learning rate falls."""
    steady = ["schedule.cooldown=0.25", "eval.suites=[]"]
    planned = [
        f"data.train=[{{source: samples://emoji}}, {OTHERS}]",
        "stages=[{samples: 60}, {samples: 48}, {mixture: {others: 1}, samples: 36}]",
    ]
    first = recipe("stages=[{samples: 60}, {samples: 48}]", *steady)

    def stopped_at_step(step: int) -> None:
        original = loop.Run.log

        def log(run: loop.Run) -> None:
            original(run)
            run.stopping = run.state.step == step

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Run, "log", log)
            assert not train(first, tmp_path / "grown").finished

    stopped_at_step(4)
    with pytest.raises(StoreError, match=r"stages.0.samples: 60 there, 72 here"):
        train(recipe("stages=[{samples: 72}]", *steady), tmp_path / "grown")
    with pytest.raises(StoreError, match=r"data.train.0.weight.0: 1.0 there, 2.0 here"):
        train(recipe("data.train.0.weight=2.0", "stages=[{samples: 60}]", *steady), tmp_path / "grown")
    summary = train(recipe(*planned, *steady), tmp_path / "grown")
    assert summary.finished
    train(recipe(*planned, *steady), tmp_path / "planned")
    assert losses(tmp_path / "grown") == losses(tmp_path / "planned")
    lineage = json.loads((tmp_path / "grown" / "lineage.json").read_text())
    (changes,) = [line["detail"]["changes"] for line in lineage if "changes" in line["detail"]]
    assert any(
        change.startswith("data.train.1.source: None there, 'samples://emoji/held_out' here") for change in changes
    )
    with pytest.raises(StoreError, match=r"has been falling since sample 108: its stages can no longer change"):
        train(recipe(*planned[:1], planned[1].replace("36}", "36}, {samples: 12}"), *steady), tmp_path / "grown")


def test_a_damaged_commit_is_named_and_the_one_before_taken(
    tmp_path: Path, whole: tuple[Path, Summary], capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(), tmp_path)
    newest = Path(find_commit(str(tmp_path)).url)
    part = newest / "model-00000-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    summary = train(recipe(), tmp_path)
    assert summary.finished
    assert losses(tmp_path) == losses(whole[0])
    said = capsys.readouterr().err.replace("\n", "")
    assert f"{part} is damaged" in said
    parts = ("imports", "find", "read", "build", "first step")
    pattern = r"continued in (\d+\.\d) s: " + ", ".join(rf"{part} (\d+\.\d)" for part in parts)
    (spent,) = re.findall(pattern, re.sub(" +", " ", said))
    assert sum(map(float, spent[1:])) == pytest.approx(float(spent[0]), abs=0.4)


def test_a_store_slower_than_the_clock_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of step 1 hangs until step 4: what the clock asks for in between is left out, not waited for."""
    open_door, put, step = threading.Event(), Store.put, loop.Run.step
    waited: list[bool] = []

    def held(self: Store, name: str, data: bytes) -> None:
        waited.append(open_door.wait(20))
        put(self, name, data)

    def stepping(run: loop.Run, batch: Any) -> None:
        if run.state.step == 4:
            open_door.set()
        step(run, batch)

    monkeypatch.setattr(Store, "put", held)
    monkeypatch.setattr(loop.Run, "step", stepping)
    out = tmp_path / "run"
    train(recipe("checkpoint.every=0.001s", "eval.suites=[]", "stages=[{samples: 96}]"), out)
    assert all(waited)
    steps = [row["step"] for row in events(out, "commit")]
    assert steps[0] == 1
    assert not {2, 3, 4} & set(steps)
    assert steps[-1] == 8
