"""Activations within a budget: the account against what autograd keeps, the choice, and steps that are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treering.launch.commands.plan import plan
from treering.launch.recipe.load import read_recipe
from treering.models.activations import BlockMemory, block_memory, blocks_to_recompute, peak
from treering.models.model import Model, build
from treering.models.parts import BatchShape
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, SharedSpec, TextSpec
from treering.training.engines import activation_checkpointing
from treering.training.engines.base import Engine
from treering.training.engines.build import build_engine
from treering.training.engines.config import DdpConfig, DeepSpeedConfig, FsdpConfig
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.loop import train
from treering.training.objectives.base import Inputs, Objective, extras_of
from treering.training.objectives.caption import Caption
from treering.training.objectives.contrastive import Between, Contrastive, LateContrastive
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 6
IMAGE = ImageSpec(width=48, depth=3, heads=3, patch=4, resolution=16)
TEXT = TextSpec(width=64, depth=4, heads=2, context=13).model_copy(update={"vocabulary": 101})
AUDIO = ModalitySpec(width=32, depth=2, heads=2, features=5, frames=7)
PLAIN = ModelSpec(embed_dim=16, image=IMAGE, text=TEXT)


def changed(spec: ModelSpec, part: str, **fields: Any) -> ModelSpec:
    return spec.model_copy(update={part: getattr(spec, part).model_copy(update=fields)})


SPECS = {
    "plain": PLAIN,
    "swiglu": changed(changed(PLAIN, "image", mlp="swiglu"), "text", mlp="quick_gelu"),
    "gains": changed(changed(PLAIN, "image", layer_scale=0.1, class_token=True), "text", layer_scale=0.1),
    "experts": changed(changed(PLAIN, "image", experts=4), "text", experts=3, experts_per_token=1),
    "captioner": PLAIN.model_copy(update={"captioner": CaptionerSpec(depth=2)}),
    "after": PLAIN.model_copy(update={"captioner": CaptionerSpec(depth=2, cross_attention="after")}),
    "shared": PLAIN.model_copy(update={"shared": SharedSpec(width=32, depth=2, heads=2)}),
    "filled": changed(PLAIN, "text", causal=False, pool="last"),
    "classed": changed(changed(PLAIN, "text", pool="class"), "image", class_token=True, pool="class"),
    "modalities": PLAIN.model_copy(update={"modalities": {"audio": AUDIO}}),
}


def batch(lengths: tuple[int, ...] = (3, 9, 5, 13, 7, 4)) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 101, (sum(lengths),), generator=generator)
    images = torch.randint(0, 256, (len(lengths), 3, 16, 16), dtype=torch.uint8, generator=generator)
    audio = torch.randn(len(lengths), 7, 5, generator=generator)
    ids = torch.arange(len(lengths))
    known = torch.tensor(lengths)
    return Inputs(images, tokens, known, ids, ids + 10, ids, host_lengths=known, columns={"audio": audio})


def objectives(spec: ModelSpec) -> list[Objective]:
    found: list[Objective] = [Contrastive(1.0)]
    found += [Caption(1.0)] if spec.captioner else []
    return found + [Between(1.0, towers=("audio", "text"))] * bool(spec.modalities)


def engine(spec: ModelSpec, **config: Any) -> Engine:
    return build_engine(spec, objectives(spec), DdpConfig(**config), OptimizerConfig(), ALONE, seed=3)


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps while it lasts, by where it is."""
    sizes: dict[int, int] = {}
    held = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)  # or another could come to lie where it was
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def saved(model: Model, inputs: Inputs, again: dict[str, int], half: bool = False) -> int:
    """Bytes kept of a forward pass beside the weights and their copies in half precision."""
    for name, transformer in model.transformers().items():
        transformer.checkpointed_blocks = again[name]
    with kept() as sizes, torch.autocast("cpu", torch.bfloat16, enabled=half):
        extras = extras_of(objectives(model.spec), inputs)
        output = model(inputs.images, inputs.tokens, inputs.lengths, extras)
    del output
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in sizes.items() if place not in weights)


def shape(inputs: Inputs, half: bool = False) -> BatchShape:
    longest = int(inputs.lengths.max())
    return BatchShape(len(inputs.lengths), len(inputs.tokens), len(inputs.lengths) * longest, None, half)


@pytest.mark.parametrize("name", SPECS)
def test_the_account_is_what_autograd_keeps(name: str) -> None:
    """What each further block frees, of each transformer alone; that is all of what blocks keep, but their inputs."""
    spec, inputs = SPECS[name], batch()
    model, found = build(spec, 3), block_memory(spec, shape(inputs))
    assert found.keys() == model.transformers().keys()
    none = dict.fromkeys(found, 0)
    everything = saved(model, inputs, none)
    for part, stack in found.items():
        for again in range(1, stack.depth + 1):
            freed = everything - saved(model, inputs, none | {part: again})
            assert freed == pytest.approx(stack.kept(0) - stack.kept(again), rel=0.03), (part, again)


def test_the_account_holds_in_half_precision() -> None:
    """Weights in half precision are kept as well, and are no activations: they are what a doubled batch leaves."""
    spec, once, twice = PLAIN, batch(), batch((3, 9, 5, 13, 7, 4) * 2)
    model = build(spec, 3)
    found = [block_memory(spec, shape(inputs, half=True)) for inputs in (once, twice)]
    for part in found[0]:
        more = []
        for again in (0, found[0][part].depth):
            choice = dict.fromkeys(found[0], 0) | {part: again}
            more.append(saved(model, twice, choice, half=True) - saved(model, once, choice, half=True))
        expected = [after[part].kept(0) - after[part].kept(after[part].depth) for after in found]
        assert more[0] - more[1] == pytest.approx(expected[1] - expected[0], rel=0.03), part


SIZES = st.tuples(st.integers(1, 5), st.integers(20, 90), st.integers(1, 19), st.integers(1, 9))


@given(st.lists(SIZES, min_size=1, max_size=3), st.integers(0, 700))
@settings(max_examples=200, deadline=None)
def test_as_few_blocks_as_needed(sizes: list[tuple[int, int, int, int]], budget: int) -> None:
    """Against every possible choice: within the budget if any is, and none could be left out of it."""
    found = {str(i): BlockMemory(d, block, block, stream, work) for i, (d, block, stream, work) in enumerate(sizes)}
    chosen = blocks_to_recompute(found, budget)
    ranges = [range(stack.depth + 1) for stack in found.values()]
    possible = [dict(zip(found, counts, strict=True)) for counts in product(*ranges)]
    if any(peak(found, one) <= budget for one in possible):
        assert peak(found, chosen) <= budget
        for name, count in chosen.items():
            assert not count or peak(found, chosen | {name: count - 1}) > budget
    else:
        assert chosen == {name: stack.depth for name, stack in found.items()}


@pytest.mark.parametrize("name", ["plain", "experts", "captioner", "shared", "modalities"])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_budget_changes_no_bit_of_the_gradient(name: str, micro: int) -> None:
    """The less there is, the more blocks are made again."""
    gradients, counts, held = [], [], []
    for share in (None, 0.8, 0.55, 0.0):
        one = engine(SPECS[name], activation_budget=share, micro_batches=micro)
        one.optimizer.step = lambda lr, fade: None  # type: ignore[method-assign]
        one.step(batch(), 1e-3)
        gradients.append({n: p.grad for n, p in one.model.named_parameters()})
        counts.append(sum(one.recomputing.checkpointed.values()))
        held.append(one.recomputing.bytes)
    for n, gradient in gradients[0].items():
        assert gradient is not None
        for other in gradients[1:]:
            assert torch.equal(gradient, other[n]), n  # type: ignore[arg-type]
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3]
    assert counts[3] == sum(t.checkpointed_blocks for t in one.model.transformers().values())
    assert held[1] > held[2] > held[3]


def test_long_captions_and_patches_decide_at_every_step() -> None:
    """A bound in bytes that short captions fit into; the account is of the very batch."""
    short, long = batch((3, 4, 3, 4, 3, 4)), batch((13,) * 6)
    bound = peak(block_memory(PLAIN, shape(short)), {"image": 0, "text": 0})
    one = engine(PLAIN, activation_budget=f"{(bound + 1) / 1e6:.6f}MB")
    counts = []
    for inputs in (short, long, replace(long, patches=torch.arange(2).expand(6, 2)), short):
        one.step(inputs, 1e-3)
        counts.append(sum(one.recomputing.checkpointed.values()))
        assert one.recomputing.bytes <= bound + 1
    assert counts[0] == counts[2] == counts[3] == 0 < counts[1]


def test_auto_is_what_the_device_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    others = sum(activation_checkpointing.parts(PLAIN, DdpConfig(), OptimizerConfig(), 1, PAIRS).values())
    whole = peak(block_memory(PLAIN, shape(batch())), {"image": 0, "text": 0})
    monkeypatch.setattr(activation_checkpointing, "process_memory", lambda: 1000)
    for share, expected in ((1.01, 0), (0.5, 1), (0.0, 7)):
        has = (others + 1000 + share * whole) / activation_checkpointing.USABLE
        monkeypatch.setattr(activation_checkpointing, "memory", lambda device, has=has: has)
        one = engine(PLAIN, activation_budget="auto")
        one.step(batch(), 1e-3)
        again = sum(one.recomputing.checkpointed.values())
        assert again == expected if share in (0.0, 1.01) else 0 < again < 7
        assert (one.recomputing.shortage() is None) == (share > 0)
    assert one.recomputing.shortage() is None, "said once"


def unequal(world: World) -> list[dict[str, int]]:
    """Ranks with captions of quite different lengths, so that they make different blocks again."""
    whole = peak(block_memory(PLAIN, shape(batch((3,) * 6))), {"image": 0, "text": 0})
    found = []
    budget = f"{whole / 1e6:.6f}MB"
    for config in (
        DdpConfig(activation_budget=budget),
        FsdpConfig(activation_budget=budget),
        DeepSpeedConfig(zero_stage=3, activation_budget=budget),
    ):
        one = build_engine(PLAIN, [Contrastive(1.0)], config, OptimizerConfig(), world, seed=1)
        for _ in range(2):
            one.step(batch((3,) * 6 if world.rank == 0 else (13,) * 6), 1e-3)
        found.append(one.recomputing.checkpointed)
        one.close()
    return found


def test_ranks_need_not_agree(on_ranks: Callable[..., list[Any]]) -> None:
    """But under ZeRO 3, which fetches weights for a block that is made again."""
    first, second = on_ranks(2, unequal)
    for i in (0, 1):
        assert sum(first[i].values()) == 0 < sum(second[i].values())
    assert first[2] == second[2]


def test_tokens_that_are_read_need_the_whole_last_block() -> None:
    inputs = batch()
    reading = shape(inputs)._replace(reads_tokens=True)
    pruned, read = (block_memory(PLAIN, each)["text"] for each in (shape(inputs), reading))
    assert pruned.last < 0.7 * pruned.block
    assert read.last == read.block == pruned.block
    one = build_engine(
        PLAIN, [LateContrastive(1.0)], DdpConfig(activation_budget=1.0), OptimizerConfig(), ALONE, seed=3
    )
    one.step(inputs, 1e-3)
    assert one.recomputing.bytes == pytest.approx(sum(s.kept(0) for s in block_memory(PLAIN, reading).values()))


OVERRIDES = [
    "data.batch=4",
    "model={embed_dim: 8, image: {width: 8, depth: 2, heads: 1, patch: 12, resolution: 24}, "
    "text: {width: 8, depth: 2, heads: 1, context: 16}}",
    "objectives={contrastive: {}}",
    "stages=[{samples: 8}, {grow: {image.width: 64}, samples: 8}]",
    "schedule.warmup=4",
    "eval={suites: []}",
    "log={every: 1}",
    "checkpoint.every=1_000_000",
]


def test_growth_changes_what_is_made_again(tmp_path: Path) -> None:
    """A bound that the small model keeps with ease; the plan counts what the run does."""
    recipe = read_recipe("emoji", [*OVERRIDES, "engine.activation_budget=0.1MB"]).recipe
    train(recipe, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    before, after = (sum(row["recomputed"].values()) for row in (steps[0], steps[-1]))
    assert before == 0 < after
    assert all(row["activations"] <= 100_000 for row in steps)
    stages = plan(recipe, 1, 1, "cpu", 0.5, None)["stages"]
    assert sum(stages[0]["recomputed"].values()) == 0 < sum(stages[1]["recomputed"].values())
    assert 0 < stages[1]["memory"]["activations"] <= 100_000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lots", "is not a valid size; write one such as 500MB"),
        (1.5, "is not a fraction; write one from 0"),
        (-0.1, "is not a fraction"),
    ],
)
def test_a_bound_that_is_none_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DdpConfig(activation_budget=value)
