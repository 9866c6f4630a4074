"""Every engine at every world against one plain process: losses, state, and commits that go from any to any."""

from __future__ import annotations

import contextlib
import itertools
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.manifest import Commit
from treering.training.checkpoint.snapshot import Snapshot
from treering.training.checkpoint.store import Store
from treering.training.engines.base import Engine
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, DeepSpeedConfig, EngineConfig, FsdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.engines.zero_state import require
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.caption import Caption
from treering.training.objectives.contrastive import Contrastive
from treering.training.state import RunState, TrainingError
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 12
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.3, grad_clip=0.5, ema=0.8)
ENGINES = {
    "ddp": DdpConfig(),
    "fsdp": FsdpConfig(),
    "hybrid": FsdpConfig(shard_group=2),
    **{f"zero{stage}": DeepSpeedConfig(zero_stage=stage) for stage in (1, 2, 3)},
}
QUICK = {("fsdp", 2, True), ("hybrid", 4, False), ("zero3", 2, False)}
MATRIX = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(ENGINES, (1, 2, 4), (False, True))
]


@pytest.fixture(autouse=True, scope="module")
def imported_once() -> None:
    """Ranks are forked: what is imported here they need not import again."""
    require(ALONE)


def spec(caption: bool) -> ModelSpec:
    """Widths that no number of ranks divides: shards are uneven, some are empty. A short token table saves time."""
    text = TextSpec(width=18, depth=2, heads=3, context=9).model_copy(update={"vocabulary": 101})
    return ModelSpec(
        embed_dim=10,
        image=ImageSpec(width=14, depth=2, heads=2, patch=4, resolution=8),
        text=text,
        captioner=CaptionerSpec(depth=1) if caption else None,
    )


def objectives(caption: bool) -> list[Objective]:
    return [Contrastive(1.0), *([Caption(0.5)] if caption else [])]


def batch(step: int, world: World) -> Inputs:
    """This rank's part of a global batch."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 9, (PAIRS,), generator=generator)
    tokens = torch.randint(0, 101, (int(lengths.sum()),), generator=generator)
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    mine = slice(world.rank * PAIRS // world.size, (world.rank + 1) * PAIRS // world.size)
    ids = torch.arange(PAIRS)
    return Inputs(images[mine], torch.cat(tokens.split(lengths.tolist())[mine]), lengths[mine], ids[mine], ids[mine])


def engine(config: EngineConfig, world: World, caption: bool = True, seed: int = 1) -> Engine:
    return build_engine(spec(caption), objectives(caption), config, OPTIMIZER, world, seed)


def train(ours: Engine, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = []
    for step in steps:
        result = ours.step(batch(step, ours.world), 1e-3 * min(1.0, (step + 1) / 10))
        losses = ours.world.sum(torch.stack([o.weight * result.losses[o.name] for o in ours.objectives]))
        found.append((losses.sum().item(), result.grad_norm.item()))
    return found


def wholes(ours: Engine) -> dict[str, Any]:
    """The whole logical state, as numpy."""
    state = ours.logical_state()
    return {path: ours.whole(path.partition("/")[2], own).clone().numpy() for path, own in state.items()}


@pytest.mark.parametrize(("kind", "ranks", "caption"), MATRIX)
def test_fifty_steps_equal_one_process(
    kind: str, ranks: int, caption: bool, on_ranks: Callable[..., list[Any]]
) -> None:
    def one_rank(world: World) -> Any:
        ours = engine(ENGINES[kind], world, caption)
        found = train(ours, range(50)), ours.scale(), ours.applied, ours.skipped, ours.parameters
        ours.close()
        return found

    plain = engine(DdpConfig(), ALONE, caption)
    expected, scale = train(plain, range(50)), plain.scale()
    for found, its_scale, *counts in on_ranks(ranks, one_rank, limit=250):
        for (loss, norm), (true_loss, true_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(true_loss, abs=1e-5)
            assert norm == pytest.approx(true_norm, rel=1e-3)
        assert its_scale == pytest.approx(scale, rel=1e-5)
        assert counts == [50, 0, plain.parameters]
    assert expected[-1][0] < 0.8 * expected[0][0]


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_parts_of_open_clips_coca(kind: str, on_ranks: Callable[..., list[Any]]) -> None:
    """Class tokens, an attention pooler, layer scale, an output table of its own: all of it sharded."""
    tree = spec(True).model_dump()
    tree["image"] |= {"class_token": True, "pool": "attention", "queries": 3, "pool_heads": 2, "pre_norm": True}
    tree["text"] |= {"pool": "class", "layer_scale": 0.5, "projection_bias": True}
    tree["captioner"] |= {"cross_attention": "after", "tied_embeddings": False}
    theirs = ModelSpec.model_validate(tree)

    def one_rank(world: World) -> Any:
        ours = build_engine(theirs, objectives(True), ENGINES[kind], OPTIMIZER, world, 1)
        found = train(ours, range(10))
        ours.close()
        return found

    expected = train(build_engine(theirs, objectives(True), DdpConfig(), OPTIMIZER, ALONE, 1), range(10))
    for found in on_ranks(2, one_rank):
        for (loss, norm), (true_loss, true_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(true_loss, abs=1e-5)
            assert norm == pytest.approx(true_norm, rel=1e-3)


def bf16(kind: str) -> EngineConfig:
    """The engine of this name with its matrix work in bf16."""
    return ENGINES[kind].model_copy(update={"precision": "bf16"})


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("fsdp", 2), ("zero2", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 2), ("zero3", 4)))],
)
def test_bf16_multiplies_alone(kind: str, ranks: int, on_ranks: Callable[..., list[Any]]) -> None:
    """Losses near those of fp32 and not they; weights, moments and sums of gradients have all the digits of fp32."""

    def one_rank(world: World) -> Any:
        ours = build_engine(spec(True), objectives(True), bf16(kind), unclipped, world, 1)
        losses = train(ours, range(1))
        first = {name.partition("/")[2]: own for name, own in wholes(ours).items() if name.startswith("exp_avg/")}
        losses += train(ours, range(1, 10))
        types = {str(tensor.dtype) for tensor in ours.logical_state().values()}
        ours.close()
        return losses, first, types

    unclipped = OptimizerConfig(grad_clip=1e9)
    expected = train(build_engine(spec(True), objectives(True), DdpConfig(), unclipped, ALONE, 1), range(10))
    for losses, first, types in on_ranks(ranks, one_rank):
        assert types == {"torch.float32"}
        apart = [abs(loss - true_loss) / true_loss for (loss, _), (true_loss, _) in zip(losses, expected, strict=True)]
        assert 1e-6 < max(apart) < 1e-2
        # A sum of bf16 numbers taken in bf16 is one; the moment is a tenth of it.
        for name in ("image.transformer.blocks.0.mlp.up.weight", "text.transformer.blocks.1.attention.query.weight"):
            sums = torch.from_numpy(first[name]) * 10
            rounded = ((sums - sums.bfloat16().float()).abs() < 1e-6 * sums.abs()).float().mean()
            assert rounded < 0.5, (name, rounded)


CHAIN = [("zero3", 4), ("ddp", 1), ("fsdp", 3), ("zero1", 2), ("hybrid", 4), ("zero2", 3), ("zero3", 1), ("fsdp", 4)]
SHORT = [("zero3", 2), ("hybrid", 4), ("fsdp", 3), ("ddp", 1)]
STEPS = 5


@pytest.mark.parametrize(
    ("chain", "precision"),
    [
        pytest.param(SHORT, "fp32", id="short"),
        pytest.param(CHAIN, "fp32", id="long", marks=pytest.mark.slow),
        pytest.param(CHAIN, "bf16", id="long in bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_hops_through_engines_and_worlds_by_commits(
    chain: list[tuple[str, int]], precision: str, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """Five steps each; then the losses, weights and moments are those of the run that stayed where it was.

    What a commit holds is loaded to the bit. In bf16 the order of sums within a product already shows in the losses.
    """
    commits = Commits(Store(str(tmp_path)))
    configs = ENGINES if precision == "fp32" else {kind: bf16(kind) for kind in ENGINES}

    def one_leg(world: World, kind: str, leg: int) -> Any:
        ours = engine(configs[kind], world, seed=leg)
        if leg:
            commit = commits.open(commits.names()[-1])
            load(ours, commit)
            held, committed = wholes(ours), commit.tensors()
            assert held.keys() == committed.keys()
            assert all((held[path] == tensor.numpy()).all() for path, tensor in committed.items())
        else:
            load_initial(ours)
        losses = train(ours, range(leg * STEPS, (leg + 1) * STEPS))
        write(commits, ours, (leg + 1) * STEPS, world)
        ours.close()
        return losses

    found: list[tuple[float, float]] = []
    for leg, (kind, ranks) in enumerate(chain):
        found += on_ranks(ranks, one_leg, kind, leg, limit=250)[0]
    plain = engine(configs["ddp"], ALONE)
    expected = train(plain, range(STEPS * len(chain)))
    for (loss, _), (true_loss, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(true_loss, **({"abs": 1e-5} if precision == "fp32" else {"rel": 2e-2}))
    if precision == "bf16":
        return
    commit = commits.open(commits.names()[-1])
    assert commit.manifest.state.applied == plain.applied
    theirs, state = commit.tensors(), plain.logical_state()
    assert theirs.keys() == state.keys()
    for path, tensor in state.items():
        # Softmax is blind to the bias of keys: there Adam steps along rounding noise.
        assert path.endswith("key.bias") or torch.allclose(theirs[path], tensor, rtol=1e-3, atol=1e-5), path


def load_initial(ours: Engine) -> None:
    """The state of a fresh engine of seed 1, whatever it was built with."""
    fresh = engine(DdpConfig(), ALONE).logical_state()
    ours.load_logical_state({p: ours.cut(p.partition("/")[2], t) for p, t in fresh.items()}, 0, 0, {})


def write(commits: Commits, ours: Engine, step: int, world: World) -> None:
    state = RunState(step=step, attempt=1, applied=ours.applied, skipped=ours.skipped, multipliers=ours.multipliers)
    valid = ours.model.spec.model_copy(update={"text": TextSpec(width=18, depth=2, heads=3, context=9)})
    snapshot = Snapshot(valid, state, {}, ours.logical_state(), ours.layout, ours.copies)
    commits.begin(snapshot, world).finish()


def load(ours: Engine, commit: Commit) -> None:
    state = commit.manifest.state
    ours.expect(state.multipliers)
    ours.load_logical_state(commit.tensors(layout=ours.layout), state.applied, state.skipped, state.multipliers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("fsdp", 2),
        ("zero2", 2),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("ddp", 2), ("zero1", 2), ("zero3", 2), ("hybrid", 4))),
    ],
)
def test_a_resume_where_nothing_changed_is_bit_identical(
    kind: str, ranks: int, precision: str, tmp_path: Path, on_ranks: Callable[..., list[Any]]
) -> None:
    """Also with multipliers, and with a step that was skipped on the way, and one that only one rank cannot take."""
    commits = Commits(Store(str(tmp_path)))
    factors = {"image.projection.weight": 0.25, "text.transformer.norm.weight": 0.5}
    config = ENGINES[kind] if precision == "fp32" else bf16(kind)

    def straight(world: World) -> Any:
        ours = engine(config, world)
        ours.expect(factors)
        fresh = {path: ours.cut(path.partition("/")[2], t) for path, t in initial.items()}
        ours.load_logical_state(fresh, 0, 0, factors)
        train(ours, range(3))
        before = wholes(ours)
        inputs = batch(3, world)
        with weight_of_caption(ours, float("inf") if world.rank == 1 else 0.5):
            assert not ours.step(inputs, 1e-3).grad_norm.isfinite()
        assert (ours.applied, ours.skipped) == (3, 1)
        after = wholes(ours)
        assert all((before[path] == after[path]).all() for path in before)
        write(commits, ours, 4, world)
        losses = train(ours, range(4, 8))
        end = wholes(ours)
        ours.close()
        return losses, end

    def resumed(world: World) -> Any:
        ours = engine(config, world, seed=9)
        load(ours, commits.open(commits.names()[-1]))
        assert (ours.applied, ours.skipped, ours.multipliers) == (3, 1, factors)
        losses = train(ours, range(4, 8))
        end = wholes(ours)
        ours.close()
        return losses, end

    initial = {path: t.clone() for path, t in engine(DdpConfig(), ALONE).logical_state().items()}
    first, second = on_ranks(ranks, straight, limit=250), on_ranks(ranks, resumed)
    for (losses, state), (again, same) in zip(first, second, strict=True):
        assert losses == again
        assert state.keys() == same.keys()
        assert all((state[path] == same[path]).all() for path in state)
    plain = engine(DdpConfig(), ALONE)
    plain.load_logical_state(initial, 0, 0, factors)
    train(plain, range(3))
    for (loss, _), (true_loss, _) in zip(first[0][0], train(plain, range(4, 8)), strict=True):
        assert loss == pytest.approx(true_loss, abs=1e-5 if precision == "fp32" else 5e-2)


@contextlib.contextmanager
def weight_of_caption(ours: Engine, weight: float) -> Iterator[None]:
    """Another weight of the caption objective for a step."""
    usual = ours.objectives[1]
    ours.objectives[1] = Caption(weight)
    yield
    ours.objectives[1] = usual


@pytest.mark.parametrize("installed", ["0.18.9", "0.19.7", "0.20.0", "1.0"])
def test_other_versions_of_deepspeed_are_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: installed)
    with pytest.raises(
        TrainingError, match=rf"from 0\.19\.8 to below 0\.20, and {installed} is installed; pip install"
    ):
        require(World(0, 1, torch.device("cpu")))


def test_the_range_of_deepspeed_is_that_of_the_extra() -> None:
    extra = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "deepspeed>=0.19.8,<0.20" in extra["deepspeed"]
    require(World(0, 1, torch.device("cpu")))
