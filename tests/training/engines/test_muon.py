"""Muon against Newton-Schulz in numpy, over ranks, through commits, and through growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treering.launch.recipe.load import RecipeError, read_recipe
from treering.models.growth.operator import grown
from treering.models.growth.plan import plan_growth
from treering.models.model import Model, build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.tests.support.tiny_runs import SIZES, measured, same_end, train_until
from treering.training.checkpoint.commits import Commits, find_commit
from treering.training.checkpoint.store import Store, StoreError
from treering.training.engines import muon
from treering.training.engines.base import Engine
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, EngineConfig, FsdpConfig
from treering.training.engines.layout import shard_rows
from treering.training.engines.muon import Muon, hidden, orthogonal
from treering.training.engines.optimizer import Optimizer, OptimizerConfig, decays
from treering.training.growth import grow
from treering.training.growth.grow import grown_rates
from treering.training.growth.offline import grow_commit
from treering.training.loop import train
from treering.training.objectives.base import Inputs
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive
from treering.training.recipe import Recipe
from treering.training.world import World

ALONE, PLAIN = World(0, 1, torch.device("cpu")), DdpConfig()
SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8, experts=2),
    text=TextSpec(width=12, depth=2, heads=2, context=9).model_copy(update={"vocabulary": 101}),
    captioner=CaptionerSpec(depth=1),
)


def newton_schulz(matrix: Any) -> Any:
    """Five steps of Jordan's quintic in fp64, at the size of AdamW's steps."""
    x = np.asarray(matrix, dtype=np.float64)
    flipped = x.shape[0] > x.shape[1]
    x = x.T if flipped else x
    x = x / max(np.linalg.norm(x), 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if flipped else x) * 0.2 * max(x.shape) ** 0.5


def exactly(matrices: Tensor) -> Tensor:
    """Each of some matrices by the reference."""
    return torch.stack([torch.from_numpy(newton_schulz(matrix)) for matrix in matrices]).to(matrices)


def batch(step: int, world: World = ALONE) -> Inputs:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 9, (8,), generator=generator)
    tokens = torch.randint(0, 101, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=generator)
    mine = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    ids = torch.arange(8)
    return Inputs(images[mine], torch.cat(tokens.split(lengths.tolist())[mine]), lengths[mine], ids[mine], ids[mine])


def engine(optimizer: OptimizerConfig, config: EngineConfig = PLAIN, world: World = ALONE) -> Engine:
    return build_engine(SPEC, [Contrastive(1.0), CaptionLoss(0.5)], config, optimizer, world, seed=1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton-Schulz in fp64, which torch has in bf16 only."""
    monkeypatch.setattr(muon, "orthogonal", exactly)


# The step


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (5, 40), (1, 7)])
def test_a_move_is_newton_schulz(shape: tuple[int, int]) -> None:
    """torch computes in bf16: 8 bits, over five steps."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    kept = matrix.clone()
    made, expected = orthogonal(matrix[None])[0].double().numpy(), newton_schulz(matrix)
    assert np.linalg.norm(made - expected) < 0.04 * np.linalg.norm(expected)
    assert torch.equal(matrix, kept)
    assert orthogonal(torch.zeros(2, *shape)).abs().max() == 0


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 1)])
def test_matrices_of_a_shape_at_once_are_those_one_by_one(shape: tuple[int, int]) -> None:
    """And each is the step of torch.optim.Muon, which takes one at a time; sizes differ by a factor of a million."""
    sizes = torch.tensor([1.0, 1e-3, 1e3]).view(3, 1, 1)
    matrices = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0)) * sizes
    found = orthogonal(matrices)
    for made, matrix in zip(found, matrices, strict=True):
        moved = nn.Parameter(torch.zeros(shape))
        moved.grad = matrix.clone()
        torch.optim.Muon(
            [moved], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
        ).step()
        for truth in (-moved.detach(), orthogonal(matrix[None])[0]):
            assert float((made - truth).norm()) <= 0.02 * float(truth.norm())


def test_a_step_takes_as_many_calls_for_twelve_blocks_as_for_two() -> None:
    def calls(depth: int) -> int:
        names = [f"image.transformer.blocks.{n}.attention.{each}.weight" for n in range(depth) for each in "qkv"]
        matrices = {name: nn.Parameter(torch.randn(8, 8)) for name in names}
        for matrix in matrices.values():
            matrix.grad = torch.randn(8, 8)
        optimizer = Muon(matrices, 0.1)
        with torch.profiler.profile() as seen:
            optimizer.step(1e-3, {}, torch.ones(()))
        return sum(event.name in ("aten::bmm", "aten::baddbmm") for event in seen.events())

    assert calls(2) == calls(12) == 15


def test_hidden_matrices_are_those_between_two_streams_of_channels() -> None:
    spec = SPEC.grown({"shared.depth": 1, "shared.width": 8, "shared.heads": 2})
    names = {name: p.ndim for name, p in build(spec, 0).named_parameters()}
    chosen = {name for name in names if hidden(name)}
    assert all(names[name] == 2 for name in chosen)
    rest = {name for name, dims in names.items() if dims == 2} - chosen
    assert rest == {
        "image.patches.weight",
        "image.position_embedding",
        "image.projection.weight",
        "image.transformer.blocks.0.mlp.router.weight",
        "text.token_embedding.weight",
        "text.position_embedding",
        "text.projection.weight",
        *(f"shared.{tower}_{way}.weight" for tower in ("image", "text") for way in ("in", "out")),
    }
    assert "captioner.transformer.blocks.0.cross.key.weight" in chosen
    assert "image.transformer.blocks.0.mlp.experts.1.down.weight" in chosen


@pytest.mark.usefixtures("exact")
def test_steps_are_muon_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    """Three steps with clipping, decay and a multiplier; the truth is numpy for one and torch's plain loop for the
    other."""
    config = OptimizerConfig(kind="muon", weight_decay=0.3, grad_clip=0.5)
    ours, theirs = engine(config), build(SPEC, 1)
    name = "text.transformer.blocks.1.mlp.up.weight"
    state = {path: tensor.clone() for path, tensor in ours.logical_state().items()}
    ours.load_logical_state(state, 0, 0, {name: 0.25})
    named = dict(theirs.named_parameters())
    matrices = {n: (p.detach().double().numpy().copy(), np.zeros(p.shape)) for n, p in named.items() if hidden(n)}
    others = {n: p for n, p in named.items() if n not in matrices}
    groups = [{"params": [p], "weight_decay": 0.3 * decays(n, p)} for n, p in others.items()]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas, eps=config.eps, foreach=False)
    for step in range(3):
        inputs = batch(step)
        output = theirs(inputs.images, inputs.tokens, inputs.lengths)
        table = theirs.text.token_embedding.weight
        sum(o.weight * o.partial_loss(output, inputs, table, ALONE) for o in ours.objectives).backward()
        norm = sum(p.grad.square().sum() for p in named.values()).sqrt()
        assert norm > 0.5
        for p in named.values():
            p.grad.mul_(0.5 / (norm + 1e-6))
        adam.step()
        for n, (weights, momentum) in matrices.items():
            gradient = named[n].grad.double().numpy()
            momentum *= 0.95
            momentum += 0.05 * gradient
            factor = 0.25 if n == name else 1.0
            weights *= 1 - 1e-2 * 0.3
            weights -= 1e-2 * factor * newton_schulz(0.05 * gradient + 0.95 * momentum)
            named[n].data = torch.from_numpy(weights).float()
        theirs.zero_grad()
        ours.step(inputs, 1e-2)
    start = {path.partition("/")[2]: tensor for path, tensor in state.items() if path.startswith("model/")}
    for n, p in ours.model.named_parameters():
        moved = (named[n] - start[n]).norm()
        if not n.endswith("key.bias"):  # softmax is blind to it: AdamW steps along rounding noise
            assert (p - named[n]).norm() < 1e-3 * moved, n
    assert ours.applied == 3
    momenta = ours.optimizer.state()["exp_avg"]
    assert all(np.allclose(momenta[n], m, rtol=1e-3, atol=1e-6) for n, (_, m) in matrices.items())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    ours = engine(OptimizerConfig(kind="muon", ema=0.8))
    ours.step(batch(0), 1e-2)
    before = {path: tensor.clone() for path, tensor in ours.logical_state().items()}
    first = ours.objectives[0]
    ours.objectives[0] = Contrastive(float("inf"))
    assert not ours.step(batch(1), 1e-2).grad_norm.isfinite()
    ours.objectives[0] = first
    assert (ours.applied, ours.skipped) == (1, 1)
    after = ours.logical_state()
    assert all(torch.equal(before[path], after[path]) for path in before)
    ours.step(batch(2), 1e-2)
    assert (ours.applied, ours.skipped) == (2, 1)
    name = "image.transformer.blocks.0.attention.query.weight"
    for kind in ("model", "exp_avg", "ema"):
        assert not torch.equal(before[f"{kind}/{name}"], after[f"{kind}/{name}"])
        assert after[f"{kind}/{name}"].isfinite().all()


def test_only_what_adamw_steps_has_a_second_moment() -> None:
    state = engine(OptimizerConfig(kind="muon")).logical_state()
    names = {path.partition("/")[2] for path in state}
    assert {name for name in names if f"exp_avg_sq/{name}" not in state} == {name for name in names if hidden(name)}
    assert all(f"exp_avg/{name}" in state for name in names)


# Ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_on_many_ranks_step_as_the_whole_does_to_the_bit(ranks: int, on_ranks: Callable[..., list[Any]]) -> None:
    """Uneven rows, fewer rows than ranks, and a last round with fewer matrices than ranks."""
    shapes = {"a": (7, 5), "b": (3, 9), "c": (16, 4), "d": (1, 6), "e": (5, 5), "f": (2, 2), "g": (11, 3)}

    def draw(name: str, step: int) -> Tensor:
        return torch.randn(shapes[name], generator=torch.Generator().manual_seed(ord(name) + 100 * step))

    def moved(world: World | None) -> dict[str, Any]:
        layout = {n: shard_rows(s, world.rank if world else 0, world.size if world else 1) for n, s in shapes.items()}

        def own(name: str, step: int) -> Tensor:
            return layout[name].cut(draw(name, step)).view(-1, shapes[name][1])

        held = {name: nn.Parameter(own(name, 0)) for name in shapes}
        ours = Muon(held, 0.1, (world, layout) if world else None)
        for step in (1, 2):
            for name, parameter in held.items():
                parameter.grad = own(name, step)
            ours.step(1e-2, {"c": 0.5}, torch.ones(()))
        return {name: np.concatenate([p.detach(), ours.momenta[name]], 1) for name, p in held.items()}

    whole, parts = moved(None), on_ranks(ranks, moved)
    for name in shapes:
        assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name]), name


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("config", "ranks"), [(PLAIN, 2), (FsdpConfig(), 2), (FsdpConfig(shard_group=2), 4)])
def test_engines_step_alike(config: EngineConfig, ranks: int, on_ranks: Callable[..., list[Any]]) -> None:
    def stepped(world: World) -> tuple[list[float], dict[str, Any]]:
        ours = engine(OptimizerConfig(kind="muon", ema=0.8), config if world.size > 1 else PLAIN, world)
        norms = [ours.step(batch(step, world), 1e-2).grad_norm.item() for step in range(3)]
        state = ours.logical_state()
        found = norms, {path: ours.whole(path.partition("/")[2], own).clone().numpy() for path, own in state.items()}
        ours.close()
        return found

    norms, state = stepped(ALONE)
    for found, theirs in on_ranks(ranks, stepped):
        assert found == pytest.approx(norms, rel=1e-3)
        assert theirs.keys() == state.keys()
        for path in (path for path in state if not path.endswith("key.bias")):
            scale = np.abs(state[path]).mean() + 1e-6
            assert np.abs(theirs[path] - state[path]).mean() < 1e-2 * scale, path


# Growth


def tied(width: int) -> ModelSpec:
    tower = {"width": width, "depth": 1, "heads": width // 4}
    text = TextSpec(context=9, **tower).model_copy(update={"vocabulary": 101})
    return ModelSpec(embed_dim=6, image=ImageSpec(patch=4, resolution=8, **tower), text=text)


def losses_of(model: Model, optimizer: Optimizer, steps: range) -> list[float]:
    found = []
    for step in steps:
        inputs = batch(step)
        output = model(inputs.images, inputs.tokens, inputs.lengths)
        image, text = F.normalize(output.image.pooled, dim=-1), F.normalize(output.text.pooled, dim=-1)
        loss = F.cross_entropy(output.scale * image @ text.T, torch.arange(8))
        loss.backward()
        optimizer.step(5e-3)
        found.append(loss.item())
    return found


def widened(copies: Any, patched: bool = True) -> tuple[Model, Optimizer, Model, Optimizer]:
    """A small model after 20 steps, and the same twice as wide, with their optimizers, in fp64."""
    torch.manual_seed(0)
    small, config = build(tied(8), 0).double(), OptimizerConfig(kind="muon", eps=1e-12)
    optimizer = Optimizer(small.named_parameters(), config)
    losses_of(small, optimizer, range(20))
    old, new = tied(8), tied(16)
    plan = plan_growth(old, new, 3, copies)
    state = {f"model/{n}": p.detach() for n, p in small.named_parameters()}
    state |= {f"{kind}/{n}": t for kind, tensors in optimizer.state().items() for n, t in tensors.items()}
    read = grown(plan, lambda kind, name: state[f"{kind}/{name}"])
    large = build(new, 9).double()
    with torch.no_grad():
        for name, p in large.named_parameters():
            p.copy_(read("model", name))
    following = Optimizer(large.named_parameters(), config)
    moments = {kind: {name: read(kind, name).clone() for name in ts} for kind, ts in following.state().items()}
    following.load(moments, 20, 0, grown_rates(plan, {}, 1.0, old, new, config))
    return small, optimizer, large, following


@pytest.mark.usefixtures("exact")
def test_plain_copies_follow_the_small_model() -> None:
    small, optimizer, large, following = widened("duplicate")
    assert losses_of(large, following, range(20, 120)) == pytest.approx(
        losses_of(small, optimizer, range(20, 120)), abs=1e-6
    )


@pytest.mark.usefixtures("exact")
def test_they_would_not_at_adamw_s_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grow, "source_of", lambda operators, name: "logit_scale")
    small, optimizer, large, following = widened("duplicate")
    apart = np.subtract(losses_of(large, following, range(20, 120)), losses_of(small, optimizer, range(20, 120)))
    assert np.abs(apart).max() > 1e-2


def test_noise_gives_the_update_its_whole_rank() -> None:
    """Of plain copies the momentum has the small model's rank, and copies move alike for ever. Noise ends both: at once
    for the momentum, and within some steps for the moves, where it has to grow to the size of the rest first."""
    name = "image.transformer.blocks.0.mlp.down.weight"
    found = {}
    for copies in ("duplicate", "noise"):
        _, _, large, following = widened(copies)
        before = large.get_parameter(name).detach().clone()
        losses_of(large, following, range(20, 40))
        moved = large.get_parameter(name).detach() - before
        momentum, moves = torch.linalg.svdvals(following.state()["exp_avg"][name]), torch.linalg.svdvals(moved)
        ranks = [int((values > share * values[0]).sum()) for values, share in ((momentum, 1e-9), (moves, 0.3))]
        found[copies] = (*ranks, torch.allclose(moved[:8], moved[8:], rtol=0, atol=1e-9))
    assert max(found["duplicate"][:2]) <= 8
    assert found["duplicate"][2]
    assert found["noise"][0] >= 14  # of 16; a direction or two that pooling hides
    assert found["noise"][1] > 10
    assert not found["noise"][2]


# Runs

TINY = [
    *SIZES,
    "model.captioner=null",
    "optimizer={kind: muon, ema: 0.8}",
    "checkpoint.every=12",
    "checkpoint.keep=20",
    "eval.suites=[]",
]
GROW = "{grow: {image.width: 24, text.width: 16, text.depth: 2, image.experts: 2, captioner.depth: 1, shared.depth: 1, \
shared.width: 8, shared.heads: 2}, multiplier_fade: 60, samples: 36}"
WHOLE = f"stages=[{{samples: 36}}, {GROW}]"


def recipe(*overrides: str) -> Recipe:
    return read_recipe("emoji", [*TINY, *overrides]).recipe


def losses(out: Path) -> list[tuple[int, float, float]]:
    return measured(out, "loss", "grad_norm")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(recipe(WHOLE), out).finished
    return out


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_resume_is_bit_identical_also_across_growth(step: int, whole: Path, tmp_path: Path) -> None:
    train_until(step, recipe(WHOLE), tmp_path)
    assert train(recipe(WHOLE), tmp_path).finished
    assert losses(tmp_path) == losses(whole)
    same_end(tmp_path, whole)
    held = find_commit(str(whole)).manifest.state.multipliers
    assert held["text.transformer.blocks.0.attention.out.weight"] == pytest.approx(0.5 * 2**0.5)
    assert held["text.projection.weight"] == 0.5  # AdamW's


@pytest.mark.slow
def test_rows_on_two_ranks_resume_across_growth_to_the_bit(
    whole: Path, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    sharded = recipe(WHOLE, "engine.kind=fsdp")
    on_ranks(2, lambda group: train_until(4, sharded, tmp_path / "resumed"))
    for name in ("straight", "resumed"):
        assert all(on_ranks(2, lambda group, name=name: train(sharded, tmp_path / name).finished))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    same_end(tmp_path / "resumed", tmp_path / "straight")
    for ours, theirs in zip(losses(tmp_path / "straight"), losses(whole), strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-3)


def test_a_commit_grown_offline_is_that_of_the_run(whole: Path, tmp_path: Path) -> None:
    commits = Commits(Store(str(whole / "commits")))
    before = commits.open(next(name for name in commits.names() if f"{3:012d}" in name))
    stage = recipe(WHOLE).stages[1].model_dump(exclude={"samples"}, exclude_defaults=True)
    made = grow_commit(before.url, stage, str(tmp_path / "commits"), 36)
    assert train(made.recipe, tmp_path).finished
    assert losses(tmp_path) == losses(whole)[3:]
    same_end(tmp_path, whole)


def test_a_run_may_begin_with_another_s_state_as_far_as_that_goes(whole: Path, tmp_path: Path) -> None:
    stages = "stages=[{samples: 36}, {grow: {text.depth: 2}, samples: 12}]"
    pure = "objectives.caption=null"
    for carry in ("weights", "all"):
        commit = f"{whole / 'commits'}/step-000000000002-attempt-0001"
        begun = recipe(stages, pure, f"init_from={{commit: {commit}, load: {carry}}}")
        assert train(begun, tmp_path / carry).finished
    adamw = begun.model_copy(update={"optimizer": OptimizerConfig(ema=0.8)})
    with pytest.raises(StoreError, match=r"no second moment of the matrices inside of blocks; set optimizer"):
        train(adamw, tmp_path / "adamw")
    plain = recipe(pure, "stages=[{samples: 36}]", "optimizer={kind: adamw, ema: 0.8}")
    assert train(plain, tmp_path / "plain").finished
    stages = "stages=[{samples: 48}]"
    begun = recipe(stages, pure, f"init_from={{commit: {tmp_path / 'plain'}, load: all}}")
    assert train(begun, tmp_path / "muon").finished


def test_deepspeed_is_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"updates a matrix as a whole; set engine.kind: fsdp, or optimizer.kind: adamw"
    ):
        recipe(WHOLE, "engine={kind: deepspeed}")
