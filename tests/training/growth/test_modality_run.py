"""Another modality through the real loop: a tower that is there from the start, and one that growth adds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from treering.data.loading.loader import EvaluationSet
from treering.launch.commands.eval import evaluate_commit
from treering.launch.commands.grow import grow_offline
from treering.launch.commands.plan import plan
from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.flops import parameters
from treering.models.model import Model, build
from treering.models.spec import SpecError
from treering.tests.support.tiny_runs import SIZES, lines, same_end, train_until
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store
from treering.training.evaluate.config import EvalConfig
from treering.training.evaluate.suites import evaluate
from treering.training.loop import train
from treering.training.recipe import Recipe

AUDIO = "{width: 8, depth: 1, heads: 2, features: 5, frames: 4}"
ADDED = "modalities.audio.width: 8, modalities.audio.depth: 1, modalities.audio.heads: 2, modalities.audio.features: 5"
LATER = "modalities.audio.depth: 2, modalities.audio.width: 12, modalities.audio.mlp_ratio: 5.0, image.depth: 2"
ARRIVES, GROWS = (
    f"{{grow: {{{ADDED}, modalities.audio.frames: 4}}, samples: 24}}",
    f"{{grow: {{{LATER}}}, samples: 24}}",
)
STAGES = f"{{samples: 36}}, {ARRIVES}, {GROWS}"
TINY = [
    *SIZES,
    "data.columns={audio: npy}",
    "model.captioner=null",
    "objectives={contrastive: {weight: 1.0}, modalities: [{between: [audio, text]}]}",
    f"stages=[{STAGES}]",
    "checkpoint={every: 1_000_000, keep: 20}",
    "eval={suites: [retrieval], examples: 0}",
]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 pictures with a caption and a matrix of frames."""
    path, random = tmp_path_factory.mktemp("shards") / "0.tar", np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(40):
            picture, frames = io.BytesIO(), io.BytesIO()
            Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(picture, "PNG")
            np.save(frames, random.normal(size=(4, 5)).astype(np.float16))
            members = {"png": picture.getvalue(), "txt": f"picture {i}".encode(), "audio.npy": frames.getvalue()}
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{i:02}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def recipe(shard: str, *overrides: str) -> Recipe:
    sources = [f"data.train=[{{source: '{shard}'}}]", f"eval.data={shard}"]
    return read_recipe("emoji", [*TINY, *sources, *overrides]).recipe


def steps(out: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("step", "loss", "losses", "grad_norm")} for row in lines(out, "step")]


@pytest.fixture(scope="module")
def whole(shard: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to: seven steps, the tower comes after the third and grows after the fifth."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(recipe(shard), out).finished
    return out


def test_a_tower_joins_the_run(shard: str, whole: Path) -> None:
    """Its loss term starts with it; it learns; the other towers' outputs stay; retrieval scores are logged."""
    rows = steps(whole)
    assert [sorted(row["losses"]) for row in rows[2:4]] == [["contrastive"], ["contrastive", "contrastive/audio-text"]]
    joined, larger = lines(whole, "grow")
    assert joined["logit_difference"] == 0.0
    assert 0.0 < larger["logit_difference"] < 1e-5  # rounding in the new tower: blocks add none
    assert [operator["operator"] for operator in joined["operators"]] == ["new_part"]
    assert joined["to"]["modalities.audio.frames"] == 4
    assert joined["parameters_after"] == parameters(recipe(shard).specs()[1])
    widened = [o["field"] for o in larger["operators"] if o["operator"] == "widen"]
    assert widened == ["modalities.audio.width", "modalities.audio.heads", "modalities.audio.mlp_width"]
    final = find_commit(str(whole)).tensors()
    for name in ("frames.weight", "logit_scale", "projection.weight", "transformer.blocks.1.mlp.down.weight"):
        assert final[f"exp_avg/modalities.audio.{name}"].any(), name
    scores = lines(whole, "eval")[-1]["scores"]
    assert {f"retrieval/{way}@{k}" for way in ("audio_to_text", "text_to_audio") for k in (1, 5, 10)} <= scores.keys()


def trained(out: Path) -> Model:
    commit = find_commit(str(out))
    model, tensors = build(commit.manifest.spec, 0), commit.tensors("model")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model/{name}"])
    return model


def test_retrieval_is_that_of_plain_numpy(shard: str, whole: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """At any number of ranks."""
    model = trained(whole)
    with torch.no_grad():
        samples = EvaluationSet(shard, 24, 16, columns=["audio"])
        every = [samples.sample(i) for i in range(len(samples))]
        sound = model.modalities["audio"](
            torch.from_numpy(np.stack([s.columns["audio"] for s in every]))
        ).pooled.numpy()
        tokens, lengths = [i for s in every for i in s.tokens], [len(s.tokens) for s in every]
        text = model.embed_texts(torch.tensor(tokens), torch.tensor(lengths)).pooled.numpy()
    sound, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (sound, text))
    nearest = np.argsort(-(sound @ text.T), axis=1)[:, :5]
    found = lines(whole, "eval")[-1]["scores"]
    assert found["retrieval/audio_to_text@5"] == pytest.approx(np.mean([i in row for i, row in enumerate(nearest)]))
    config = EvalConfig(suites=("retrieval",), batch=3, examples=0)
    for ranks in on_ranks(3, lambda group: evaluate(model, config, shard, group).scores):
        assert ranks == pytest.approx(found)


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_resume_across_the_new_tower_is_bit_identical(step: int, shard: str, whole: Path, tmp_path: Path) -> None:
    train_until(step, recipe(shard), tmp_path)
    assert train(recipe(shard), tmp_path).finished
    assert steps(tmp_path) == steps(whole)
    same_end(tmp_path, whole)


@pytest.mark.parametrize(
    "engine",
    [
        "{kind: ddp}",
        "{kind: ddp, micro_batches: 2}",
        "{kind: fsdp}",
        pytest.param("{kind: deepspeed, zero_stage: 1}", marks=pytest.mark.slow),
        pytest.param("{kind: deepspeed, zero_stage: 3}", marks=pytest.mark.slow),
    ],
)
def test_two_ranks(engine: str, shard: str, whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]) -> None:
    """The losses of the whole run, killed on the way in the first step of the new tower."""
    of = recipe(shard, f"engine={engine}", "data.workers=1")
    on_ranks(2, lambda group: train_until(3, of, tmp_path))
    assert all(on_ranks(2, lambda group: train(of, tmp_path).finished))
    for row, true in zip(steps(tmp_path), steps(whole), strict=True):
        assert row["loss"] == pytest.approx(true["loss"], abs=1e-5)
        assert row["losses"] == pytest.approx(true["losses"], abs=1e-5)
    scores = [lines(out, "eval")[-1]["scores"] for out in (tmp_path, whole)]
    assert scores[0].keys() == scores[1].keys()


def test_a_tower_from_the_start_beside_a_sigmoid(shard: str, tmp_path: Path) -> None:
    """Compared with pictures, by a softmax at its own temperature."""
    of = recipe(
        shard,
        f"model.modalities={{audio: {AUDIO}}}",
        "model.logit_bias=true",
        "objectives={contrastive: {kind: sigmoid}, modalities: [{between: [audio, image], label_smoothing: 0.1}]}",
        "stages=[{samples: 36}]",
        "eval.suites=[]",
    )
    assert train(of, tmp_path).finished
    assert all(np.isfinite(row["loss"]) for row in steps(tmp_path))
    assert find_commit(str(tmp_path)).tensors()["exp_avg/modalities.audio.logit_scale"].any()


def test_a_commit_grown_offline_is_that_of_the_run(shard: str, whole: Path, tmp_path: Path) -> None:
    """The tower brings its column and its term with it."""
    plain = recipe(shard, "data.columns={}", "objectives.modalities=[]", "stages=[{samples: 36}]")
    train(plain, tmp_path / "plain")
    sizes = [size.strip().replace(": ", "=") for size in f"{ADDED}, modalities.audio.frames: 4".split(",")]
    out = tmp_path / "grown"
    grow_offline(str(tmp_path / "plain"), sizes, [], ["samples=24"], str(out))
    grown = read_recipe(str(out / "recipe.yaml")).recipe
    assert grown.data.columns == {"audio": "npy"}
    assert [term.between for term in grown.objectives.modalities] == [("audio", "text")]
    commits = Commits(Store(str(whole / "commits")))
    before = commits.open(next(name for name in commits.names() if "0003" in name)).tensors()
    after = find_commit(str(out)).tensors()
    assert {path for path in after if ".audio." not in path} == before.keys()
    assert all(after[path].isfinite().all() for path in after)
    assert train(grown, out).finished
    assert "contrastive/audio-text" in steps(out)[-1]["losses"]


def test_the_plan_counts_it(shard: str) -> None:
    of = recipe(shard)
    stages = plan(of, 1, 1, "cpu", 0.5, None)["stages"]
    assert [stage["parameters"] for stage in stages] == [parameters(spec) for spec in of.specs()]
    per_sample = [stage["flops"] / stage["samples"] for stage in stages]
    assert per_sample == sorted(per_sample)
    assert stages[1]["memory"]["activations"] > stages[0]["memory"]["activations"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.columns={}"], r"model\.modalities\.audio has nothing to read; add `audio: npy` to data\.columns"),
        (["objectives.modalities=[]"], r"audio is not trained in stages\.1; add `\{between: \[audio, text\]\}`"),
        (
            ["objectives.modalities=[{between: [audio, depth]}]"],
            r"audio-depth needs a tower called 'depth'; describe it",
        ),
        ([f"model.modalities={{text: {AUDIO}}}"], "the model already has a tower called text"),
        ([f"model.modalities={{'../x': {AUDIO}}}"], "is not a valid name"),
        (["stages.2.grow={modalities.audio.features: 9}"], "does not fit the samples of its data column"),
        (["stages.2.grow={modalities.radio.depth: 2}"], r"modalities\.radio\.width is missing; add it"),
        (["stages.2.grow={audio.depth: 2}"], r"no such size, the nearest is modalities\.audio\.depth"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(overrides: list[str], message: str, shard: str) -> None:
    with pytest.raises((RecipeError, ValidationError), match=message):
        recipe(shard, *overrides)


def test_a_tower_is_described_field_by_field_on_the_command_line(shard: str) -> None:
    fields = {"width": 8, "depth": 1, "heads": 2, "features": 5, "frames": 4}
    overrides = [f"model.modalities.audio.{key}={value}" for key, value in fields.items()]
    found = recipe(shard, *overrides, "stages=[{samples: 36}, {samples: 36}]", "stages.1.grow.modalities.audio.depth=3")
    assert found.model.modalities["audio"].model_dump(include=fields.keys()) == fields
    assert found.specs()[1].modalities["audio"].depth == 3
    with pytest.raises(RecipeError, match=r"model\.modalities\.audio\.widht .*did you mean width"):
        recipe(shard, *overrides, "model.modalities.audio.widht=3")


def test_samples_of_another_shape_are_refused_before_the_first_step(shard: str, tmp_path: Path) -> None:
    """Although the tower comes later."""
    of = recipe(shard, f"stages=[{{samples: 36}}, {{grow: {{{ADDED}, modalities.audio.frames: 6}}, samples: 24}}]")
    message = r"frames = 6 and features = 5, but a sample of column audio is \[4, 5\]; set frames: 4, features: 5"
    with pytest.raises(SpecError, match=message):
        train(of, tmp_path)
    assert not lines(tmp_path, "step")
    with pytest.raises(SpecError, match=message):
        plan(of, 1, 1, "cpu", 0.5, None)


def test_an_evaluation_without_the_column_is_one_of_pictures(whole: Path) -> None:
    scores = evaluate_commit(str(whole), ["retrieval"], "samples://emoji/held_out")["scores"]
    assert not any("audio" in name for name in scores)
