"""The held-out loss against a dense fp64 formula, at any number of ranks, on sets that are small, bad or lack a column;
and training that does not know that it was computed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from treering.data.loading.loader import EvaluationSet
from treering.data.order import permuted
from treering.data.samples.sample import Sample, collate
from treering.launch.recipe.load import read_recipe
from treering.models.model import Model, build
from treering.models.output import ModelOutput
from treering.tests.support.made_up_shards import Members, shard
from treering.tests.support.tiny_runs import SIZES, lines, measured, train_through
from treering.training import held_out, loop
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig
from treering.training.engines.device_prefetch import Feed
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.evaluate.config import EvalConfig
from treering.training.evaluate.outcome import Evaluation
from treering.training.evaluate.suites import evaluate
from treering.training.held_out import Terms
from treering.training.objectives import registry
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.config import ObjectiveConfig
from treering.training.objectives.terms import build_objectives
from treering.training.recipe import Recipe
from treering.training.report.losses import gap_text
from treering.training.state import RunState
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
BEGUN = RunState()


class LookedAtConfig(ObjectiveConfig, frozen=True, extra="forbid", strict=True):
    column: str | None = None


@dataclass
class LookedAt(Objective):
    """Counts the batches that it has seen; its loss is that count, and on request the mean of a column."""

    name = "looked_at"
    needs: ClassVar = frozenset({"embeddings"})
    column: str | None = None
    seen: int = 0

    def partial_loss(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        self.seen += 1
        own = output.image.pooled.float().mean() * 0 + self.seen
        if self.column:
            own = own + inputs.columns[self.column].mean()
        return own / world.size

    def values(self, output: ModelOutput, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        return torch.full((len(inputs.lengths),), float(self.seen))

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen} if self.seen else {}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.fixture(autouse=True)
def looked_at() -> Iterator[None]:
    registry.register("looked_at", LookedAtConfig)(lambda config, seed: LookedAt(config.weight, config.column))
    yield
    del registry._registry["looked_at"]


def pictures(path: Path, samples: int, broken: frozenset[int] = frozenset(), column: str = "") -> str:
    """Sample i is a square with the caption `kind i mod 7`, so captions repeat; `broken` ones hold no picture."""
    random = np.random.default_rng(len(path.name))
    members: Members = []
    for i in range(samples):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file, "PNG")
        members.append((f"{i:03}.png", b"not a picture" if i in broken else file.getvalue()))
        members.append((f"{i:03}.txt", f"kind {i % 7} of things".encode()))
        if column:
            array = io.BytesIO()
            np.save(array, np.full(3, i, np.float32))
            members.append((f"{i:03}.{column}.npy", array.getvalue()))
    return str(shard(path, members))


def recipe_for(train: str, seen: str, *overrides: str) -> Recipe:
    settings = [
        *SIZES,
        f"data.train=[{{source: {train}}}]",
        f"eval={{data: {seen}, examples: 0}}",
        "model.captioner={depth: 1}",
        "objectives={contrastive: {}, caption: {weight: 0.5}}",
        "stages=[{samples: 72}]",
    ]
    return read_recipe("emoji", [*settings, *overrides]).recipe


def measure(recipe: Recipe, model: Model, world: World = ALONE, state: RunState = BEGUN, **learned: Any) -> Evaluation:
    terms = Terms.of(recipe, state, learned)
    return evaluate(model, recipe.eval, recipe.evaluation_source, world, tokenizer="clip", terms=terms)


def found_by(recipe: Recipe, world: World) -> dict[str, Any]:
    found = measure(recipe, build(recipe.model, 3), world)
    return {"notes": found.notes, **(found.held_out.json() if found.held_out else {})}


def by_hand(recipe: Recipe, numbers: list[int]) -> dict[str, float]:
    """The terms of one batch in fp64, from formulas on dense matrices."""
    model = build(recipe.model, 3).double()
    spec = recipe.model
    data = EvaluationSet(recipe.evaluation_source, spec.image.resolution, spec.text.context)
    samples = [sample for number in numbers if isinstance(sample := data.sample(number), Sample)]
    assert len(samples) == len(numbers)
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)
    tokens = torch.tensor([i for s in samples for i in s.tokens])
    lengths = torch.tensor([len(s.tokens) for s in samples])
    with torch.no_grad():
        output = model(images, tokens, lengths)
        image, text = (torch.nn.functional.normalize(each.pooled, dim=-1) for each in (output.image, output.text))
        scores = (output.scale * image @ text.T).numpy()
        logits = (output.caption @ model.output_table.T).numpy()
    captions = [s.caption for s in samples]
    same = np.array([[i != j and captions[i] == captions[j] for j in range(len(samples))] for i in range(len(samples))])
    scores[same] = -np.inf  # equal captions are no negatives of each other
    right = np.diag(scores)
    each = [np.log(np.exp(scores).sum(axis)) - right for axis in (0, 1)]
    ends = np.cumsum(lengths.numpy())
    predicting = [place for place in range(len(tokens)) if place + 1 not in ends]
    costs = [np.log(np.exp(logits[p]).sum()) - logits[p][tokens[p + 1]] for p in predicting]
    return {"contrastive": float(np.mean(each)), "caption": float(np.mean(costs))}


def order(size: int) -> list[int]:
    return permuted(np.arange(size), size, held_out._ORDER).tolist()


def test_it_is_the_formula_on_whole_batches_of_the_held_out_data(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 40)
    recipe = recipe_for(train, seen, "eval.held_out=20", "eval.batch=5")
    loss = found_by(recipe, ALONE)
    batches = [by_hand(recipe, order(40)[at : at + 12]) for at in (0, 12)]  # 20 samples, rounded up
    for name in ("contrastive", "caption"):
        assert loss["losses"][name] == pytest.approx(np.mean([each[name] for each in batches]), rel=1e-5)
    assert loss["loss"] == pytest.approx(loss["losses"]["contrastive"] + 0.5 * loss["losses"]["caption"], rel=1e-12)
    assert (loss["samples"], loss["batch"], loss["without"], loss["notes"]) == (24, 12, [], [])


def test_bad_samples_are_skipped_and_a_batch_that_is_not_full_is_left_out(tmp_path: Path) -> None:
    bad = frozenset(order(29)[at] for at in (2, 3, 13))
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 29, bad)
    recipe = recipe_for(train, seen)
    usable = [number for number in order(29) if number not in bad]
    batches = [by_hand(recipe, usable[at : at + 12]) for at in (0, 12)]
    loss = found_by(recipe, ALONE)
    assert loss["losses"] == pytest.approx({n: np.mean([b[n] for b in batches]) for n in batches[0]}, rel=1e-5)
    assert loss["samples"] == 24


def test_less_than_a_batch_is_one_smaller_batch_and_is_said(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 8, frozenset({5}))
    recipe = recipe_for(train, seen)
    loss = found_by(recipe, ALONE)
    assert loss["losses"] == pytest.approx(by_hand(recipe, [n for n in order(8) if n != 5]), rel=1e-5)
    assert (loss["samples"], loss["batch"]) == (7, 7)
    assert "has 7 usable samples, fewer than data.batch = 12" in loss["notes"][0]


@pytest.mark.parametrize(("world", "samples"), [(2, 40), (3, 29), (2, 7), (3, 8)])
def test_any_number_of_ranks_finds_the_same(
    world: int, samples: int, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    bad = frozenset({1, 4} if samples > 8 else {})
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", samples, bad)
    recipe = recipe_for(train, seen, "eval.batch=5", "objectives.caption.parallel_fraction=0.4")
    alone = found_by(recipe, ALONE)
    for ours in on_ranks(world, lambda group: found_by(recipe, group)):
        assert ours["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert {name: ours[name] for name in ("samples", "batch", "notes")} == {
            name: alone[name] for name in ("samples", "batch", "notes")
        }


@pytest.mark.parametrize(
    "terms",
    [
        ("objectives={contrastive: {kind: sigmoid}}", "model.logit_bias=true", "model.captioner=null"),
        ("objectives={contrastive: {kind: filip}}", "model.captioner=null"),
        ("objectives={contrastive: {positives: caption, label_smoothing: 0.1}, balance: {}, caption: {}}",
         "model.image.experts=3"),
        ("objectives={contrastive: {}, modalities: [{between: [teacher, text]}], caption: {}}",
         "data.columns={teacher: npy}", "model.modalities={teacher: {width: 8, depth: 1, heads: 1, features: 3}}"),
    ],
    ids=["sigmoid", "filip", "balance", "modality"],
)  # fmt: skip
def test_every_objective_is_that_of_a_step_on_the_same_batch(
    terms: tuple[str, ...], tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """Against the engine, whose losses the tests of the objectives compare with formulas; alone and on two ranks."""
    train, seen = (pictures(tmp_path / name, 24, column="teacher") for name in ("train.tar", "held_out.tar"))
    recipe = recipe_for(train, seen, *terms, "eval.held_out=12", "eval.batch=5")
    spec = recipe.model
    data = EvaluationSet(seen, spec.image.resolution, spec.text.context, columns=recipe.data.columns)
    batch = collate([sample for number in order(24)[:12] if isinstance(sample := data.sample(number), Sample)])
    objectives = build_objectives(recipe.objectives, spec)
    engine = build_engine(spec, objectives, DdpConfig(), OptimizerConfig(), ALONE, 3)
    expected = {name: loss.item() for name, loss in engine.step(Feed(ALONE, 0)(batch, 0, 1.0, 0), 0.0).losses.items()}
    for found in (found_by(recipe, ALONE), *on_ranks(2, lambda group: found_by(recipe, group))):
        assert found["losses"] == pytest.approx(expected, rel=2e-6)
        assert found["notes"] == []


def test_a_tower_without_its_column_leaves_its_term_out(tmp_path: Path) -> None:
    train, bare = pictures(tmp_path / "train.tar", 30, column="teacher"), pictures(tmp_path / "held_out.tar", 24)
    term = (
        "data.columns={teacher: npy}",
        "model.modalities={teacher: {width: 8, depth: 1, heads: 1, features: 3}}",
        "objectives.modalities=[{between: [teacher, text]}]",
    )
    found = found_by(recipe_for(train, bare, *term), ALONE)
    assert found["without"] == ["contrastive/teacher-text"]
    assert found["losses"].keys() == {"contrastive", "caption"}


def test_captions_are_cut_as_in_the_stage(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 24)
    whole, cut = (
        found_by(recipe_for(train, seen, *more), ALONE) for more in ((), ("stages=[{samples: 72, context: 4}]",))
    )
    assert cut["losses"]["caption"] != whole["losses"]["caption"]
    shorter = found_by(recipe_for(train, seen, "stages=[{samples: 72, context: 16}]"), ALONE)
    assert shorter["losses"] == whole["losses"]


@pytest.mark.parametrize("samples", [1, 2, 12])
def test_very_small_sets(samples: int, tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", samples)
    found = found_by(recipe_for(train, seen, "eval.held_out=1000000000000"), ALONE)
    assert (found["samples"], found["batch"], len(found["notes"])) == (samples, samples, int(samples < 12))
    assert samples > 1 or found["losses"]["contrastive"] == pytest.approx(0.0, abs=1e-6)


def test_a_broken_model_has_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 12)
    recipe = recipe_for(train, seen)
    model = build(recipe.model, 3)
    with torch.no_grad():
        model.text.token_embedding.weight.fill_(float("nan"))
    found = measure(recipe, model)
    assert found.held_out
    assert not np.isfinite(found.held_out.loss)
    assert found.held_out.json()["losses"] == {"caption": None, "contrastive": None}
    assert gap_text(found.held_out.json()).startswith("held-out loss not finite (caption 0.5 x not finite")


@pytest.mark.parametrize("engine", ["{kind: ddp}", "{kind: fsdp}"])
def test_it_is_the_same_under_every_engine(
    engine: str, run: tuple[Callable[..., Recipe], Path], on_ranks: Callable[..., list[Any]]
) -> None:
    recipe, folder = run
    loop.train(recipe(), folder / "one")
    on_ranks(2, lambda group: loop.train(recipe(f"engine={engine}"), folder / "two").finished)
    one, two = ([line["held_out"] for line in lines(folder / name, "eval")] for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
        assert theirs["training"]["losses"] == pytest.approx(ours["training"]["losses"], rel=1e-5)


def test_every_batch_finds_the_state_of_training_and_leaves_it(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 40)
    recipe = recipe_for(train, seen, "objectives.looked_at={weight: 0.0}")
    model = build(recipe.model, 3)
    learned = {"seen": 7}
    found = measure(recipe, model, looked_at=learned)
    assert found.held_out
    assert found.held_out.losses["looked_at"] == 8.0  # as the next batch of training would find it, three times
    assert learned == {"seen": 7}
    nothing_yet = measure(recipe, model)
    assert nothing_yet.held_out
    assert nothing_yet.held_out.losses["looked_at"] == 1.0


def test_weights_are_those_of_the_step_before(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 12)
    recipe = recipe_for(train, seen, "objectives.caption.schedule=[[0.0, 0.0], [1.0, 1.0]]")
    found = measure(recipe, build(recipe.model, 3), state=RunState(step=4, samples=48))
    assert found.held_out
    assert found.held_out.weights == {"caption": pytest.approx(0.5 * 36 / 72), "contrastive": 1.0}


def test_a_term_without_its_column_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    train, bare = pictures(tmp_path / "train.tar", 30, column="teacher"), pictures(tmp_path / "held_out.tar", 24)
    term = ("data.columns={teacher: npy}", "objectives.looked_at={column: teacher}")
    loss = found_by(recipe_for(train, bare, *term), ALONE)
    assert loss["losses"].keys() == loss["weights"].keys() == {"contrastive", "caption"}
    assert loss["without"] == ["looked_at"]
    assert loss["notes"] == [f"the held-out loss is without looked_at: {bare} has no column 'teacher'"]
    whole = pictures(tmp_path / "with.tar", 12, column="teacher")
    found = found_by(recipe_for(train, whole, *term), ALONE)
    assert found["losses"]["looked_at"] == pytest.approx(1 + np.mean(range(12)))


def test_nothing_usable_is_said(tmp_path: Path) -> None:
    train, broken = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "bad.tar", 5, frozenset(range(5)))
    found = found_by(recipe_for(train, broken), ALONE)
    assert found == {"notes": [f"there is no held-out loss: {broken} has no sample that it could be computed on"]}


def test_bf16_is_that_of_training(tmp_path: Path) -> None:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 24)
    exact, half = (
        found_by(recipe_for(train, seen, f"engine.precision={p}"), ALONE)["losses"] for p in ("fp32", "bf16")
    )
    assert exact != half
    assert exact == pytest.approx(half, rel=0.05)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Callable[..., Recipe], Path]:
    train, seen = pictures(tmp_path / "train.tar", 30), pictures(tmp_path / "held_out.tar", 40)

    def recipe(*overrides: str) -> Recipe:
        more = ("eval.every=24", "optimizer.ema=0.9", "objectives.looked_at={weight: 0.1}")
        return recipe_for(train, seen, *more, *overrides)

    return recipe, tmp_path


def test_training_is_the_same_bit_for_bit_with_and_without(run: tuple[Callable[..., Recipe], Path]) -> None:
    recipe, folder = run
    loop.train(recipe(), folder / "with")
    loop.train(recipe("eval.held_out=0", "eval.data=null", "eval.every=null"), folder / "without")
    train_through("evaluate 4", recipe(), folder / "killed")
    figures = [measured(folder / name, "loss", "losses", "grad_norm") for name in ("with", "without", "killed")]
    assert figures[0] == figures[1] == figures[2]
    evaluations, again = (lines(folder / name, "eval") for name in ("with", "killed"))
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert [line["held_out"] for line in evaluations] == [line["held_out"] for line in again]
    assert lines(folder / "without", "eval") == []


def test_the_records_have_it_beside_the_training_loss(
    run: tuple[Callable[..., Recipe], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = run
    loop.train(recipe("stages=[{samples: 240}]", "eval.every=120"), folder / "run")
    steps = {row["step"]: row["losses"] for row in lines(folder / "run", "step")}
    for line in lines(folder / "run", "eval"):
        held = line["held_out"]
        of = [n for n in steps if 0.9 * line["samples"] <= 12 * n <= line["samples"]]  # the last tenth
        assert held["training"]["lines"] == len(of)
        for name, value in held["training"]["losses"].items():
            assert value == pytest.approx(np.mean([steps[n][name] for n in of]))
        file = folder / "run" / "evaluations" / f"step-{line['step']:09d}.json"
        assert json.loads(file.read_text())["held_out"]["loss"] == held["loss"]
    said = capsys.readouterr().err
    assert "held-out loss " in said
    assert ": gap " in said
    assert said.count("scores:") == 0


def test_a_set_of_its_own_and_no_suite_is_enough_to_evaluate() -> None:
    assert EvalConfig(data="some/*.tar").is_asked_for
    assert not EvalConfig().is_asked_for
    assert not EvalConfig(data="some/*.tar", held_out=0).is_asked_for
