"""Blocks are compiled where compiled ones have the gradients of the blocks as they are written, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from treering.models import compiling
from treering.models.model import build
from treering.models.spec import CaptionerSpec, ModalitySpec, SharedSpec
from treering.models.transformer import TransformerBlock
from treering.tests.support.five_pairs import PLAIN, SPEC, batch, gradients
from treering.training.engines import kernels
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.kernels import prepare_kernels
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.base import Inputs
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive
from treering.training.state import TrainingError
from treering.training.world import World

CPU = torch.device("cpu")
COMPILES = pytest.mark.skipif(torch.__version__ < "2.13", reason="compiled blocks have wrong gradients before 2.13")
SMALL = {"width": 16, "depth": 1, "heads": 2}
KINDS = {
    "captioner": SPEC,
    "after": SPEC.model_copy(update={"captioner": CaptionerSpec(depth=2, cross_attention="after")}),
    "scaled experts": PLAIN.model_copy(
        update={"image": SPEC.image.model_copy(update={"experts": 3, "mlp": "swiglu", "layer_scale": 0.1})}
    ),
    "shared": PLAIN.model_copy(update={"shared": SharedSpec(**SMALL), "modalities": {
        "sound": ModalitySpec(**SMALL, features=5, frames=7)
    }}),
    "open_clip": PLAIN.model_copy(update={
        "image": SPEC.image.model_copy(update={"class_token": True, "pool": "class", "pre_norm": True}),
        "text": SPEC.text.model_copy(update={"pool": "class", "mlp": "quick_gelu"}),
    }),
    "padded": PLAIN.model_copy(update={"text": SPEC.text.model_copy(update={"pool": "last"})}),
    "pooler": SPEC.model_copy(update={"image": SPEC.image.model_copy(update={"pool": "attention"})}),
}  # fmt: skip


def right(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    return graph.forward


class _HalfTheSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> torch.Tensor:
        return slopes[0] / 2


def wrong(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """The values are right, and the gradients are not."""
    return lambda *given: tuple(_HalfTheSlope.apply(x) for x in graph.forward(*given))


def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    raise NotImplementedError("no code for this device")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[dict[str, Any]]]:
    """`backend(one)`: blocks are compiled by it, and nothing of earlier trials counts; returns the options they were
    compiled with."""
    monkeypatch.setattr(compiling, "_tried", {})

    def use(one: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def compile_(self: TransformerBlock, **options: Any) -> None:
            calls.append(options)
            nn.Module.compile(self, backend=one, **options)

        monkeypatch.setattr(TransformerBlock, "compile", compile_)
        return calls

    return use


@COMPILES
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_every_kind_are_tried(kind: str, half: bool, backend: Callable[[Any], Any]) -> None:
    spec = KINDS[kind]
    backend(right)
    assert compiling.refusal(spec, half, CPU, "", lambda model: None) is None
    backend(wrong)
    assert compiling.refusal(spec, half, CPU, "", lambda model: None) is None, "tried once"
    said = compiling.refusal(spec, half, CPU, "others", lambda model: None)
    assert said
    assert said.startswith("compiled blocks give wrong gradients, that of ")


@pytest.mark.parametrize(
    ("compiler", "why"),
    [(wrong, "compiled blocks give wrong gradients, that of "), (broken, r".*no code for this device|Backend")],
)
def test_what_was_asked_for_and_fails_is_refused(compiler: Any, why: str, backend: Callable[[Any], Any]) -> None:
    backend(compiler)
    with pytest.raises(
        TrainingError, match=rf"engine\.compile = true does not work here: ({why}).*leave engine\.compile"
    ):
        prepare_kernels(build(PLAIN, 3), DdpConfig(compile=True), CPU)


@COMPILES
def test_left_open_it_is_taken_where_it_works(
    backend: Callable[[Any], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks(config: DdpConfig) -> str | None:
        return prepare_kernels(build(PLAIN, 3), config, CPU).get("blocks")

    calls = backend(right)
    assert blocks(DdpConfig()) is None, "on a CPU only if asked"
    assert not calls
    monkeypatch.setattr(kernels, "_COMPILING", ("cpu",))
    assert blocks(DdpConfig()) == "torch.compile"
    assert blocks(DdpConfig(compile=False)) is None
    assert blocks(DdpConfig(deterministic=True)) == "torch, uncompiled (engine.deterministic)"
    monkeypatch.setattr(compiling, "_tried", {})
    backend(wrong)
    assert str(blocks(DdpConfig())).startswith("torch, uncompiled (compiled blocks give wrong gradients")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert str(blocks(DdpConfig())).startswith("torch, uncompiled (there is no C++ compiler")


@COMPILES
def test_evaluation_and_single_gradients_run_blocks_as_they_are_written(backend: Callable[[Any], Any]) -> None:
    """Their shapes would be compiled anew, and a compiled backward pass may be run once only."""
    ran: list[int] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        def run(*given: Any) -> Any:
            ran.append(1)
            return graph.forward(*given)

        return run

    backend(note)
    objectives = [Contrastive(1.0), CaptionLoss(1.0)]
    engine = DdpEngine(SPEC, objectives, DdpConfig(compile=True), OptimizerConfig(), World(0, 1, CPU), 0)
    images, tokens, lengths = batch()
    inputs = Inputs(images, tokens, lengths, *(torch.arange(5) for _ in range(3)), host_lengths=lengths)
    engine.step(inputs, 1e-3)
    assert ran
    ran.clear()
    with engine.whole_model() as model:
        model.embed_images(images)
    engine.output(inputs)
    engine.gradient_norms(inputs)
    assert not ran
    engine.step(inputs, 1e-3)
    assert ran


@COMPILES
def test_compiled_blocks_give_the_same_gradient(backend: Callable[[Any], list[dict[str, Any]]]) -> None:
    """Through the tracer of torch.compile; the code generator behind it is torch's affair. Pictures have one shape."""
    calls = backend("eager")
    models = [build(SPEC, 3) for _ in range(2)]
    prepare_kernels(models[1], DdpConfig(compile=True), CPU)
    assert calls[-5:] == [{"dynamic": False}] * 2 + [{"dynamic": True}] * 3
    found = [gradients(model, model(*batch())) for model in models]
    for name, gradient in found[0].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


@COMPILES
def test_compiling_does_not_grow_with_depth_and_goes_on_after_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pieces of code for five blocks as for two, none for other captions, and new ones for each new width,
    also beyond the number that torch keeps of one function."""
    made: list[int] = []

    def note(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        made.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(compiling, "refusal", lambda *given: None)
    monkeypatch.setattr(
        TransformerBlock, "compile", lambda self, **options: nn.Module.compile(self, backend=note, **options)
    )
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # type: ignore[attr-defined]

    def pieces(width: int, depth: int, steps: int) -> int:
        sizes = {"width": width, "depth": depth, "heads": width // 8}
        spec = PLAIN.model_copy(
            update={part: getattr(PLAIN, part).model_copy(update=sizes | {"head_dim": 8}) for part in ("image", "text")}
        )
        model = build(spec, 3)
        prepare_kernels(model, DdpConfig(compile=True), CPU)
        before = len(made)
        for step in range(steps):
            images, tokens, lengths = batch()
            first, last = (int(lengths[:sample].sum()) for sample in (step, step + 3))
            gradients(model, model(images[step : step + 3], tokens[first:last], lengths[step : step + 3]))
        return len(made) - before

    few = pieces(16, 2, 3)
    assert few == pieces(16, 5, 3) <= 6
    assert pieces(16, 5, 2) == few, "a third batch needs no more"
    assert min(pieces(width, 2, 1) for width in (24, 32)) >= 3


@COMPILES
def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainingError, match=r"engine\.compile = true does not work here: there is no C\+\+ compiler"):
        prepare_kernels(build(PLAIN, 3), DdpConfig(compile=True), CPU)
    prepare_kernels(build(PLAIN, 3), DdpConfig(), CPU)
