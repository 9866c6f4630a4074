"""What every registered objective promises, checked for each automatically, the one of docs/examples too."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from treering.launch.recipe.load import read_recipe
from treering.models.model import Model, build
from treering.models.output import ModelOutput, leaves, with_leaves
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, TextSpec
from treering.training.engines import micro_batches
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.loop import train
from treering.training.objectives import registry, terms
from treering.training.objectives.base import (
    Inputs,
    Objective,
    extras_of,
    load_states,
    scheduled,
    states,
)
from treering.training.objectives.terms import ObjectivesConfig
from treering.training.sample_rng import uniform
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8, experts=3, experts_per_token=2),
    text=TextSpec(width=16, depth=1, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
    modalities={
        "audio": ModalitySpec(width=8, depth=1, heads=2, features=5, frames=3),
        "depth": ModalitySpec(width=8, depth=1, heads=2, features=4),
    },
    logit_bias=True,
)
ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 8
VARIANTS = {
    "contrastive": [
        {"kind": kind, **more}
        for kind in ("softmax", "sigmoid", "filip")
        for more in ({}, {"positives": "caption", "label_smoothing": 0.2})
    ],
    "caption": [{}, {"parallel_fraction": 0.5}, {"parallel_fraction": 1.0}],
    "modalities": [
        {"between": ["audio", "text"]},
        {"between": ["depth", "image"], "positives": "picture", "label_smoothing": 0.2},
        {"between": ["audio", "depth"]},
    ],
}


def load_the_example() -> None:
    """Import the objective of the docs, once a process."""
    if "centred" in registry._registry:
        return
    path = Path(__file__).parents[3] / "docs" / "examples" / "own_objective.py"
    spec = importlib.util.spec_from_file_location("own_objective", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)


load_the_example()
CASES = [(name, fields) for name in registry._registry for fields in VARIANTS.get(name, [{}])]
IDS = ["-".join([name, *map(str, fields.values())]) for name, fields in CASES]


def made(name: str, fields: dict[str, Any]) -> Objective:
    entry = registry.registered(name)
    return entry.build(entry.config.model_validate({"weight": 1.0, **fields}), 5)


@pytest.fixture(autouse=True)
def float64_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())  # as in test_objectives


def batch(seed: int = 0) -> Inputs:
    """Captions 0 and 5 are equal, so are pictures 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (PAIRS,), generator=generator)
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    caption_ids, image_ids = torch.arange(PAIRS) + 100, torch.arange(PAIRS) + 200
    caption_ids[5], image_ids[3] = caption_ids[0], image_ids[2]
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    shapes = {"audio": (PAIRS, 3, 5), "depth": (PAIRS, 4)}
    columns = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    return Inputs(images, tokens, lengths, caption_ids, image_ids, torch.arange(PAIRS) + 1000 * seed, columns=columns)


def model(seed: int = 3) -> Model:
    return build(SPEC, seed).double()


def run(objectives: list[Objective], net: Model, inputs: Inputs) -> tuple[ModelOutput, Tensor]:
    output = net(inputs.images, inputs.tokens, inputs.lengths, extras_of(objectives, inputs))
    return output, net.text.token_embedding.weight


def partial_loss(objective: Objective, net: Model, inputs: Inputs, world: World = ALONE) -> Tensor:
    output, table = run([objective], net, inputs)
    return objective.partial_loss(output, inputs, table, world)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=IDS)
def test_finite_differences(name: str, fields: dict[str, Any]) -> None:
    """Along a random direction of all parameters."""
    net = model()
    partial_loss(made(name, fields), net, batch()).backward()
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.1 for p in net.parameters()]
    slope = sum((d * p.grad).sum() for d, p in zip(direction, net.parameters(), strict=True) if p.grad is not None)
    ends = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for d, p in zip(direction, net.parameters(), strict=True):
                p += step * d
            objective = made(name, fields)
            if objective.state():  # the state is no function of the parameters: it stays what it was
                fresh = made(name, fields)
                partial_loss(fresh, model(), batch())
                objective.load(fresh.state())
                objective.momentum = 1.0
            ends.append(partial_loss(objective, net, batch()).item())
    assert slope.abs() > 1e-6
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=IDS)
def test_neutral_at_weight_0(name: str, fields: dict[str, Any]) -> None:
    """The gradient of the others does not change by a bit."""
    other = "caption" if name != "caption" else "contrastive"
    gradients = []
    for objectives in ([made(other, {})], [made(other, {}), made(name, fields | {"weight": 0.0})]):
        net, inputs = model(), batch()
        masked = extras_of(objectives[1:], inputs).parallel_b is not None
        micro_batches.backward(lambda piece, o=objectives, n=net: run(o, n, piece), objectives, inputs, 1, ALONE)
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None and p.grad.any()})
    assert masked == (fields.get("parallel_fraction", 0) > 0)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


def test_the_world_does_not_matter(on_ranks: Callable[..., list[Any]]) -> None:
    """The parts of all ranks sum to the same term with the same gradients; the mean of the values is the term; ranks
    agree on state."""

    def one_rank(group: World) -> list[Any]:
        answers = []
        for name, fields in CASES:
            objective, net, inputs = made(name, fields), model(), micro_batches.cut(batch(), group.size)[group.rank]
            term = partial_loss(objective, net, inputs, group)
            term.backward()
            gradients = {n: p.grad.numpy().copy() for n, p in net.named_parameters() if p.grad is not None}
            output, table = run([objective], net, inputs)
            values = objective.values(output, inputs, table, group)
            assert not values.requires_grad
            answers.append((term.item(), gradients, values.numpy(), objective.state()))
        return answers

    alone = one_rank(ALONE)
    many = on_ranks(2, one_rank)
    for number, (term, gradients, values, _) in enumerate(alone):
        ranks = [rank[number] for rank in many]
        assert sum(one[0] for one in ranks) == pytest.approx(term, rel=1e-12)
        assert values.mean() == pytest.approx(term, rel=1e-12)
        np.testing.assert_allclose(np.concatenate([one[2] for one in ranks]), values, rtol=1e-10)
        assert ranks[0][3] == ranks[1][3]
        for key, gradient in gradients.items():
            np.testing.assert_allclose(
                sum(one[1][key] for one in ranks if key in one[1]), gradient, rtol=1e-9, atol=1e-12, err_msg=key
            )


@pytest.mark.parametrize(("name", "fields"), CASES, ids=IDS)
def test_state_survives_as_json(name: str, fields: dict[str, Any]) -> None:
    """After two batches; the third comes out the same to the bit."""
    first = made(name, fields)
    for seed in (1, 2):
        partial_loss(first, model(), batch(seed))
    kept = json.loads(json.dumps(states([first])))
    second = made(name, fields)
    load_states([second], kept)
    assert partial_loss(second, model(), batch(3)).item() == partial_loss(first, model(), batch(3)).item()
    assert first.state() == second.state()
    if first.state():
        assert (
            partial_loss(made(name, fields), model(), batch(3)).item() != partial_loss(first, model(), batch(3)).item()
        )


@pytest.mark.parametrize(("name", "fields"), CASES, ids=IDS)
def test_it_reads_no_more_than_it_needs(name: str, fields: dict[str, Any]) -> None:
    """Given the needed parts and nothing else, the partial loss is the same."""
    objective, net, inputs = made(name, fields), model(), batch()
    output, table = run([objective], net, inputs)
    stripped = with_leaves(output, {path: leaf.tensor for path, leaf in leaves(output, objective.needs).items()})
    whole, parts = (
        made(name, fields).partial_loss(output, inputs, table, ALONE),
        objective.partial_loss(stripped, inputs, table, ALONE),
    )
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("parts", [1, 3])
def test_gradient_norms(parts: int) -> None:
    """Of each objective alone, against a backward pass by hand; no piece with a graph is larger than it should be."""
    objectives = [made("contrastive", {}), made("caption", {"weight": 3.0})]
    net, inputs = model(), batch()
    graphs: list[int] = []

    def forward(piece: Inputs) -> tuple[ModelOutput, Tensor]:
        graphs.append(len(piece.lengths) if torch.is_grad_enabled() else 0)
        return run(objectives, net, piece)

    norms = micro_batches.gradient_norms(forward, objectives, inputs, parts, ALONE, list(net.parameters()))
    assert sum(graphs) == len(inputs.lengths)
    assert max(graphs) == -(-len(inputs.lengths) // parts)
    assert all(p.grad is None for p in net.parameters())
    for objective in objectives:
        alone = model()
        partial_loss(objective, alone, inputs).backward()
        squares = sum(p.grad.square().sum() for p in alone.parameters() if p.grad is not None)
        assert norms[objective.name] == pytest.approx(squares.sqrt().item(), rel=1e-12)


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_skipped_step_leaves_the_states_of_objectives(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All objectives at once, in a step whose gradient is not finite, between two whose gradient is."""
    monkeypatch.undo()  # an engine's losses are in fp32
    objectives = [made(name, VARIANTS.get(name, [{}])[0]) for name in sorted(registry.names())]
    config = DdpConfig(micro_batches=pieces)
    engine = build_engine(SPEC, objectives, config, OptimizerConfig(), ALONE, seed=1)
    inputs = batch()
    inputs = replace(inputs, columns={name: column.to(torch.float32) for name, column in inputs.columns.items()})
    engine.step(inputs, 1e-3)
    learned, norm = states(objectives), torch.nn.utils.get_total_norm
    assert learned
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: norm(gradients) * float("nan"))
    engine.step(inputs, 1e-3)
    assert states(objectives) == learned
    monkeypatch.undo()
    engine.step(inputs, 1e-3)
    assert states(objectives) != learned


def test_schedules() -> None:
    points = [(0.2, 1.0), (0.6, 3.0), (1.0, 0.0)]
    for progress, factor in ((0.0, 1.0), (0.2, 1.0), (0.4, 2.0), (0.6, 3.0), (0.8, 1.5), (1.0, 0.0)):
        assert scheduled(points, progress) == pytest.approx(factor)
    assert scheduled([], 0.3) == 1.0
    modalities = [
        {"between": ["audio", "text"], "weight": 6.0, "schedule": points},
        {"between": ["audio", "depth"], "weight": 3.0},
    ]
    config = ObjectivesConfig.model_validate(
        {"contrastive": {"weight": 2.0, "schedule": points}, "caption": {}, "centred": {"momentum": 0.5}}
        | {"modalities": modalities}
    )
    assert config.model_dump(mode="json")["centred"] == {"weight": 1.0, "schedule": [], "momentum": 0.5}
    assert ObjectivesConfig.model_validate(config.model_dump(mode="json")) == config
    objectives = terms.build_objectives(config, SPEC)
    terms.advance(objectives, config, 0.4)
    assert [o.weight for o in objectives] == [2.0, 1.0, pytest.approx(4.0), pytest.approx(12.0), 3.0]
    bare = SPEC.model_copy(update={"captioner": None, "modalities": {"audio": SPEC.modalities["audio"]}})
    built = terms.build_objectives(config, bare)
    assert [o.name for o in built] == ["centred", "contrastive", "contrastive/audio-text"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"nonsense": {}},
            "objective 'nonsense' is not known; the objectives are balance, caption, centred, contrastive, modalities",
        ),
        ({"centred": {"speed": 1}}, r"centred\.speed"),
        ({"caption": {"schedule": [[0.5, 1.0], [0.5, 2.0]]}}, "in increasing order"),
        ({"caption": {"schedule": [[0.5, -1.0]]}}, "greater than or equal to 0"),
        (
            {"modalities": [{"between": ["text", "image"]}]},
            "must begin with a modality tower; use `contrastive` for that",
        ),
        (
            {"modalities": [{"between": ["text", "audio"]}]},
            r"must begin with a modality tower; write \[audio, text\]",
        ),
        ({"modalities": [{"between": ["audio", "audio"]}]}, "compares a tower with itself"),
        ({"contrastive": {"gather_budget": "much"}}, "'much' is not a valid size; write one such as 64MB or 1GB"),
        ({"modalities": [{"between": ["a", "b"]}, {"between": ["b", "a"]}]}, "compares b and a twice"),
    ],
)
def test_wrong_blocks_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectivesConfig.model_validate({"contrastive": {}, **block})


def test_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from treering.training.objectives.caption import CaptionConfig\n"
        "from treering.training.objectives.caption import CaptionLoss\n"
        "from treering.training.objectives.registry import register\n"
        "@register('elsewhere', CaptionConfig)\n"
        "def build(config, seed):\n    return CaptionLoss(config.weight)\n"
    )
    info = tmp_path / "elsewhere-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[treering.objectives]\nelsewhere = elsewhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert registry.registered("elsewhere").config.__name__ == "CaptionConfig"
    finally:
        registry._registry.pop("elsewhere", None)


def test_masked_captions_are_those_of_their_numbers() -> None:
    """The fraction asked for, the same whatever else is in the batch; another seed, others."""
    numbers = torch.arange(20_000)
    drawn = uniform(7, "caption/parallel", numbers)[:, 0]
    assert abs((drawn < 0.75).double().mean().item() - 0.75) < 0.01
    assert torch.equal(uniform(7, "caption/parallel", numbers[500:510])[:, 0], drawn[500:510])
    assert (uniform(8, "caption/parallel", numbers)[:, 0] - drawn).abs().mean() > 0.3
    assert (uniform(7, "patches", numbers)[:, 0] - drawn).abs().mean() > 0.3
    several = uniform(7, "patches", numbers[:1000], 50)
    assert several.unique().numel() == 50_000
    assert abs(np.corrcoef(several.numpy().T)[np.triu_indices(50, 1)]).max() < 0.2


def test_a_masked_caption_sees_no_token() -> None:
    """Its prediction depends on positions and the picture alone; the others' do not change by masking it."""
    net, inputs = model(), batch()
    masked = torch.arange(PAIRS) % 2 == 0
    from treering.models.output import Extras

    plain = net(inputs.images, inputs.tokens, inputs.lengths).caption
    some = net(inputs.images, inputs.tokens, inputs.lengths, Extras(parallel_b=masked)).caption
    others = net(
        inputs.images, torch.randint(0, 49408, inputs.tokens.shape), inputs.lengths, Extras(parallel_b=masked)
    ).caption
    masked_t = masked.repeat_interleave(inputs.lengths)
    torch.testing.assert_close(some[~masked_t], plain[~masked_t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some[masked_t], others[masked_t], rtol=1e-12, atol=1e-12)
    assert (some[masked_t] - plain[masked_t]).abs().min(1).values.max() > 1e-4


def test_state_goes_through_growth_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two stages, and the same one continued from its first commits: the last losses are the same."""
    monkeypatch.undo()  # fp32, as runs are
    overrides = [
        "data.batch=4",
        "model={embed_dim: 8, image: {width: 8, depth: 1, heads: 1, patch: 12, resolution: 12}, "
        "text: {width: 8, depth: 1, heads: 1, context: 8}, captioner: {depth: 1}}",
        "objectives.centred={weight: 5.0}",
        "stages=[{samples: 16}, {grow: {image.depth: 2}, samples: 16}]",
        "schedule.warmup=4",
        "eval.suites=[]",
        "log.every=1",
        "checkpoint={every: 8, keep: 100}",
    ]
    recipe = read_recipe("emoji", overrides).recipe

    def losses(folder: Path) -> list[float]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row["losses"]["centred"] for row in rows if row["event"] == "step"]

    train(recipe, tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    assert len(whole) == 8
    for step in (2, 4):
        again = tmp_path / f"from-{step}"
        commits = sorted((tmp_path / "whole" / "commits").glob("step-*"))
        for commit in commits[: step // 2]:
            shutil.copytree(commit, again / "commits" / commit.name)
        train(recipe, again)
        assert losses(again) == whole[step:]
