"""The gradient contract: ranks x micro-batches x objectives, each parameter's gradient that of dense formulas in one
process, written out here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.model import Model, build
from treering.models.output import Extras, Merge, TowerOutput, with_leaves
from treering.models.spec import CaptionerSpec, ImageSpec, ModalitySpec, ModelSpec, TextSpec
from treering.training.engines import micro_batches
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.base import Inputs, Objective, extras_of
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Between, Contrastive, LateContrastive, SigmoidContrastive
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
    modalities={"audio": ModalitySpec(width=8, depth=1, heads=2, features=5, frames=3)},
    logit_bias=True,
)
ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 16
WEIGHTS = {"softmax": 0.7, "sigmoid": 0.05, "filip": 1.3, "caption": 0.9, "parallel": 0.4}
MODALITY = {f"contrastive/audio-{other}": weight for other, weight in {"text": 1.1, "image": 0.3}.items()}


def named(kind: str) -> Objective:
    """Each with a name of its own, so that all can run together."""
    if kind in MODALITY:
        return Between(MODALITY[kind], towers=("audio", kind.rpartition("-")[2]))
    made = {
        "softmax": Contrastive,
        "sigmoid": SigmoidContrastive,
        "filip": LateContrastive,
        "caption": CaptionLoss,
        "parallel": lambda weight: CaptionLoss(weight, parallel_fraction=0.5, seed=3),
    }[kind](WEIGHTS[kind])
    made.name = kind
    return made


SETS = {kind: [kind] for kind in ("softmax", "sigmoid", "filip", "caption", "parallel")} | {
    "all": ["softmax", "sigmoid", "filip", "parallel", *MODALITY],
    "modalities": list(MODALITY),
}


def batch() -> Inputs:
    """Captions 0 and 9 are equal, so are pictures 2 and 3."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (PAIRS,), generator=generator)
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    caption_ids, image_ids = torch.arange(PAIRS) + 100, torch.arange(PAIRS) + 200
    caption_ids[9], image_ids[3] = caption_ids[0], image_ids[2]
    images = torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=generator)
    columns = {"audio": torch.randn(PAIRS, 3, 5, dtype=torch.float64, generator=generator)}
    return Inputs(images, tokens, lengths, caption_ids, image_ids, torch.arange(PAIRS) + 40, columns=columns)


def dense(kind: str, net: Model, inputs: Inputs) -> Tensor:
    """The mean over the whole batch, all logits at once."""
    masked = named(kind).extras(inputs).parallel_b
    output = net(inputs.images, inputs.tokens, inputs.lengths, Extras(True, masked, modalities=inputs.columns))
    if kind in ("caption", "parallel"):
        log_probabilities = (output.caption @ net.text.token_embedding.weight.T).log_softmax(1)
        ends = set((inputs.lengths.cumsum(0) - 1).tolist())
        places = [t for t in range(len(inputs.tokens)) if t not in ends]
        return -torch.stack([log_probabilities[t, inputs.tokens[t + 1]] for t in places]).mean()
    same = (inputs.caption_ids[:, None] == inputs.caption_ids) | (inputs.image_ids[:, None] == inputs.image_ids)
    own = torch.eye(PAIRS, dtype=torch.bool)
    x, y = F.normalize(output.image.pooled, dim=-1), F.normalize(output.text.pooled, dim=-1)
    if kind in MODALITY:
        x, y = F.normalize(output.modalities["audio"].pooled, dim=-1), y if kind.endswith("text") else x
        output = output._replace(scale=output.modalities["audio"].scale)
    forth = back = x @ y.T
    if kind == "filip":
        patches = F.normalize(output.image_tokens, dim=-1)
        words = F.normalize(output.text_tokens, dim=-1).split(inputs.lengths.tolist())
        forth = torch.stack([torch.stack([(p @ w.T).amax(1).mean() for w in words]) for p in patches])
        back = torch.stack([torch.stack([(p @ w.T).amax(0).mean() for w in words]) for p in patches])
    if kind == "sigmoid":
        signs = torch.where(own, 1.0, -1.0).double()
        losses = -F.logsigmoid(signs * (output.scale * x @ y.T + output.bias))
        return losses.masked_fill(same & ~own, 0.0).sum() / PAIRS
    targets = torch.arange(PAIRS)
    forth, back = ((output.scale * s).masked_fill(same & ~own, float("-inf")) for s in (forth, back))
    return (F.cross_entropy(forth, targets) + F.cross_entropy(back.T, targets)) / 2


def gradients(net: Model) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in net.named_parameters() if p.grad is not None}


@pytest.fixture
def float64_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())  # as in test_objectives


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_gradient_is_that_of_the_dense_loss(
    world: int, on_ranks: Callable[..., list[Any]], float64_losses: None
) -> None:
    """1, 2 and 4 micro-batches; the temperature's and the bias's gradients too, in the ratio 1."""

    def one_rank(group: World) -> dict[tuple[str, int], Any]:
        answers = {}
        for name, kinds in SETS.items():
            for parts in (1, 2, 4):
                net, objectives = build(SPEC, 3).double(), [named(kind) for kind in kinds]

                def forward(piece: Inputs, net: Model = net, objectives: list[Objective] = objectives) -> Any:
                    extras = extras_of(objectives, piece)
                    return net(piece.images, piece.tokens, piece.lengths, extras), net.text.token_embedding.weight

                own = micro_batches.cut(batch(), group.size)[group.rank]
                partial_losses = micro_batches.backward(forward, objectives, own, parts, group)
                answers[name, parts] = {n: s.item() for n, s in partial_losses.items()}, gradients(net)
        return answers

    answers = on_ranks(world, one_rank) if world > 1 else [one_rank(ALONE)]
    for name, kinds in SETS.items():
        truth = build(SPEC, 3).double()
        terms = {kind: dense(kind, truth, batch()) for kind in kinds}
        sum((WEIGHTS | MODALITY)[kind] * term for kind, term in terms.items()).backward()
        expected = gradients(truth)
        for parts in (1, 2, 4):
            ranks = [answer[name, parts] for answer in answers]
            for kind, term in terms.items():
                assert sum(partial_losses[kind] for partial_losses, _ in ranks) == pytest.approx(term.item(), rel=1e-12)
            for key, gradient in expected.items():
                mean = sum(found[key] for _, found in ranks if key in found) / world
                scale = max(1e-3, float(np.abs(gradient).max()))
                np.testing.assert_allclose(mean, gradient, rtol=1e-10, atol=1e-10 * scale, err_msg=f"{name} {key}")
            scalars = {
                "modalities": ["modalities.audio.logit_scale"],
                "softmax": ["logit_scale"],
                "sigmoid": ["logit_scale", "logit_bias"],
                "all": ["logit_bias"],
            }
            for key in scalars.get(name, []):
                assert sum(found[key] for _, found in ranks) / world / expected[key] == pytest.approx(1.0, rel=1e-10)


def test_random_numbers_are_replayed() -> None:
    """With dropout in the towers the two passes see the same units, so the gradient is that of one pass."""

    class Dropped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(SPEC, 3).double()
            self.net.image.patches = torch.nn.Sequential(self.net.image.patches, torch.nn.Dropout(0.3))

        def forward(self, piece: Inputs) -> Any:
            extras = Extras(tokens=True)
            return self.net(piece.images, piece.tokens, piece.lengths, extras), self.net.text.token_embedding.weight

    found = []
    for parts in (2, 1):
        torch.manual_seed(5)
        module = Dropped()
        if parts == 1:  # the same numbers: the two halves one after another, with a graph, then one loss
            outputs = [module(piece)[0] for piece in micro_batches.cut(batch(), 2)]
            pooled = {
                f"/{tower}/pooled": torch.cat([getattr(output, tower).pooled for output in outputs])
                for tower in ("image", "text")
            }
            output = with_leaves(outputs[0], pooled | {"/scale": outputs[0].scale})
            Contrastive(1.0).partial_loss(output, batch(), module.net.text.token_embedding.weight, ALONE).backward()
        else:
            micro_batches.backward(module, [Contrastive(1.0)], batch(), 2, ALONE)
        found.append(gradients(module.net))
    for key, gradient in found[0].items():
        np.testing.assert_allclose(gradient, found[1][key], rtol=1e-4, atol=1e-7, err_msg=key)
    assert np.abs(found[0]["image.patches.0.weight"]).max() > 1e-6


class WiderOutput(NamedTuple):
    """An output with fields that no engine knows."""

    image: TowerOutput
    text: TowerOutput
    scale: Annotated[Tensor, Merge("equal")]
    words: Annotated[dict[str, Tensor], Merge("concatenate", "words")]
    """[t, d] by name"""
    total: Annotated[Tensor, Merge("sum")]
    """[1]: of the words"""


class Words(Contrastive):
    """Reads what `WiderOutput` has, beside the embeddings."""

    needs = frozenset({"embeddings", "words"})  # type: ignore[arg-type]

    def partial_loss(self, output: Any, inputs: Inputs, table: Tensor, world: World) -> Tensor:
        words = output.words["first"]
        own = words.square().mean() + output.total.square().sum() / len(inputs.tokens) ** 2
        return super().partial_loss(output, inputs, table, world) + own * output.scale.sum()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_output_that_declares_itself_needs_no_change_here(parts: int) -> None:
    """Against one pass over the whole batch."""

    def forward(piece: Inputs, net: Model) -> tuple[Any, Tensor]:
        output = net(piece.images, piece.tokens, piece.lengths)
        words = {"first": output.text.tokens}
        wider = WiderOutput(output.image, output.text, output.scale, words, output.text.tokens.exp().sum().view(1))
        return wider, net.text.token_embedding.weight

    truth, net = build(SPEC, 3).double(), build(SPEC, 3).double()
    output, table = forward(batch(), truth)
    Words(1.0).partial_loss(output, batch(), table, ALONE).backward()
    micro_batches.backward(lambda piece: forward(piece, net), [Words(1.0)], batch(), parts, ALONE)
    expected, found = gradients(truth), gradients(net)
    assert expected.keys() == found.keys()
    for key, gradient in expected.items():
        np.testing.assert_allclose(found[key], gradient, rtol=1e-5, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("world", [1, 2])
def test_engine_steps_are_the_same(world: int, on_ranks: Callable[..., list[Any]]) -> None:
    """Through DDP, which exchanges gradients once a step."""

    def one_rank(group: World) -> list[dict[str, np.ndarray]]:
        states = []
        for parts in (1, 4):
            objectives = [Contrastive(1.0), CaptionLoss(0.5)]
            spec = SPEC.model_copy(update={"logit_bias": False, "modalities": {}})
            engine = DdpEngine(spec, objectives, DdpConfig(micro_batches=parts), OptimizerConfig(), group, seed=1)
            for _ in range(2):
                engine.step(micro_batches.cut(batch(), group.size)[group.rank], 1e-3)
            states.append({name: tensor.numpy().copy() for name, tensor in engine.logical_state().items()})
            engine.close()
        return states

    for plain, parted in on_ranks(world, one_rank) if world > 1 else [one_rank(ALONE)]:
        for name, value in plain.items():
            if name.startswith("exp_avg/"):
                np.testing.assert_allclose(parted[name], value, rtol=1e-3, atol=2e-6, err_msg=name)


def test_less_is_kept() -> None:
    """What a forward pass keeps for its backward pass is that of one piece."""
    net, objectives = build(SPEC, 3), [Contrastive(1.0), CaptionLoss(0.5)]

    def forward(piece: Inputs) -> Any:
        extras = extras_of(objectives, piece)
        return net(piece.images, piece.tokens, piece.lengths, extras), net.text.token_embedding.weight

    def most(parts: int) -> int:
        peak, alive = 0, 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal peak, alive
                self.tensor, self.size = tensor, tensor.nbytes
                alive += self.size
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            micro_batches.backward(forward, objectives, batch(), parts, ALONE, contextlib.nullcontext)
        return peak

    table = 2 * net.text.token_embedding.weight.nbytes  # its gradient is kept by the caption loss
    assert most(8) - table < 0.35 * (most(1) - table)
