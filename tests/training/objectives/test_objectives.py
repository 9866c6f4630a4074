"""Objectives against dense fp64 formulas written out here, and the same gradient at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.models.model import Model, build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, TextSpec
from treering.training.objectives import caption as caption_module
from treering.training.objectives.base import Inputs
from treering.training.objectives.caption import CaptionLoss, linear_cross_entropy
from treering.training.objectives.contrastive import Contrastive
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=16, depth=1, heads=2, context=9),
    captioner=CaptionerSpec(depth=1),
)
ALONE = World(0, 1, torch.device("cpu"))
PAIRS = 12


def batch(pairs: int = PAIRS) -> Inputs:
    """Captions 0 and 7 are equal, so are pictures 2 and 3."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (pairs,), generator=generator)
    tokens = torch.randint(0, 49408, (int(lengths.sum()),), generator=generator)
    caption_ids, image_ids = torch.arange(pairs) + 100, torch.arange(pairs) + 200
    caption_ids[7], image_ids[3] = caption_ids[0], image_ids[2]
    images = torch.randint(0, 256, (pairs, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Inputs(images, tokens, lengths, caption_ids, image_ids)


def part(inputs: Inputs, rank: int, world: int) -> Inputs:
    size = len(inputs.lengths) // world
    own = slice(rank * size, (rank + 1) * size)
    start = int(inputs.lengths[: own.start].sum())
    tokens = inputs.tokens[start : start + int(inputs.lengths[own].sum())]
    return Inputs(inputs.images[own], tokens, inputs.lengths[own], inputs.caption_ids[own], inputs.image_ids[own])


def double_model(scale: float | None = None) -> Model:
    model = build(SPEC, 3).double()
    if scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(float(np.log(scale)))
    return model


def dense_contrastive(model: Model, inputs: Inputs) -> Tensor:
    """The formula, entry by entry."""
    output = model(inputs.images, inputs.tokens, inputs.lengths)
    a, t = F.normalize(output.image.pooled, dim=-1), F.normalize(output.text.pooled, dim=-1)
    scores, pairs = output.scale * a @ t.T, len(a)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(pairs):
        negatives = [
            j
            for j in range(pairs)
            if j != i and inputs.caption_ids[i] != inputs.caption_ids[j] and inputs.image_ids[i] != inputs.image_ids[j]
        ]
        for row in (scores[i], scores[:, i]):
            total = total - row[i] + torch.stack([row[i], *(row[j] for j in negatives)]).logsumexp(0)
    return total / (2 * pairs)


def dense_caption(model: Model, inputs: Inputs) -> Tensor:
    output = model(inputs.images, inputs.tokens, inputs.lengths)
    log_probabilities = (output.caption @ model.text.token_embedding.weight.T).log_softmax(1)
    losses, start = [], 0
    for length in inputs.lengths.tolist():
        losses += [-log_probabilities[start + i, inputs.tokens[start + i + 1]] for i in range(length - 1)]
        start += length
    return torch.stack(losses).mean()


def partial_loss(model: Model, objective: Any, inputs: Inputs, world: World) -> Tensor:
    output = model(inputs.images, inputs.tokens, inputs.lengths)
    return objective.partial_loss(output, inputs, model.text.token_embedding.weight, world)


def gradients(loss: Tensor, model: Model) -> dict[str, np.ndarray]:
    loss.backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def float64_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objectives compute in fp32; here the formula is checked to fp64's precision, so `.float()` must not round."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())


DENSE = {"contrastive": (Contrastive(1.0), dense_contrastive), "caption": (CaptionLoss(1.0), dense_caption)}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_equals_the_dense_formula(name: str, scale: float) -> None:
    objective, dense = DENSE[name]
    ours, theirs = double_model(scale), double_model(scale)
    loss, expected = partial_loss(ours, objective, batch(), ALONE), dense(theirs, batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    mine, truth = gradients(loss, ours), gradients(expected, theirs)
    assert mine.keys() == truth.keys()
    for key in mine:
        np.testing.assert_allclose(mine[key], truth[key], rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_do_not_depend_on_the_world(name: str, world: int, on_ranks: Callable[..., list[Any]]) -> None:
    """Summed over ranks, every parameter's gradient is that of one process, the temperature's included."""
    objective, dense = DENSE[name]

    def one_rank(group: World) -> tuple[float, dict[str, np.ndarray]]:
        model = double_model()
        loss = partial_loss(model, objective, part(batch(), group.rank, group.size), group)
        return loss.item(), gradients(loss, model)

    answers = on_ranks(world, one_rank)
    model = double_model()
    expected = dense(model, batch())
    truth = gradients(expected, model)
    assert sum(loss for loss, _ in answers) == pytest.approx(expected.item(), rel=1e-12)
    for key in truth:
        summed = sum(grads[key] for _, grads in answers if key in grads)
        np.testing.assert_allclose(summed, truth[key], rtol=1e-9, atol=1e-12, err_msg=key)


def test_duplicates_matter() -> None:
    """Power: without the exclusion the loss of this batch is another one."""
    inputs, model = batch(), double_model()
    distinct = Inputs(inputs.images, inputs.tokens, inputs.lengths, torch.arange(PAIRS), torch.arange(PAIRS))
    with torch.no_grad():
        assert (
            abs(
                partial_loss(model, Contrastive(1.0), inputs, ALONE)
                - partial_loss(model, Contrastive(1.0), distinct, ALONE)
            )
            > 1e-3
        )


@pytest.mark.parametrize("chunk", [1, 100_000, 1 << 23])
def test_linear_cross_entropy_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_module, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    table = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=generator)
    assert torch.autograd.gradcheck(lambda s, t: 3 * linear_cross_entropy(s, t, targets), (states, table))
    expected = F.cross_entropy(states @ table.T, targets, reduction="sum")
    assert linear_cross_entropy(states, table, targets).item() == pytest.approx(expected.item(), rel=1e-14)


def test_linear_cross_entropy_in_bf16_rounds_only_the_operands() -> None:
    """Against fp64 on the same rounded numbers: the sum as in fp32, gradients but for the rounding of the slopes."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(70, 16, generator=generator).bfloat16().requires_grad_()
    table, targets = torch.randn(50, 16, generator=generator), torch.randint(0, 50, (70,), generator=generator)
    table.requires_grad_()
    found = linear_cross_entropy(states, table, targets)
    found.backward()
    exact = [states.detach().double().requires_grad_(), table.detach().bfloat16().double().requires_grad_()]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    expected.backward()
    assert found.dtype == table.grad.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.item() != pytest.approx(
        F.cross_entropy(exact[0] @ table.detach().double().T, targets, reduction="sum").item(), rel=1e-6
    )
    for mine, truth in zip((states.grad, table.grad), (exact[0].grad, exact[1].grad), strict=True):
        assert (mine.double() - truth).norm() < 0.005 * truth.norm()


def test_a_slope_near_one_keeps_its_difference() -> None:
    """A target of probability 0.9999 in bf16, where 1 minus it would be rounded to 0."""
    states, table = torch.tensor([[9.25]]).bfloat16().requires_grad_(), torch.tensor([[1.0], [0.0]], requires_grad=True)
    linear_cross_entropy(states, table, torch.tensor([0])).backward()
    assert table.grad[0].item() == pytest.approx(-9.25 / (1 + np.exp(9.25)), rel=0.005)


def test_the_captioner_says_in_what_precision_it_computes() -> None:
    inputs, model = batch(), build(SPEC, 3)
    assert model(inputs.images, inputs.tokens, inputs.lengths).caption.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs.images, inputs.tokens, inputs.lengths).caption.dtype == torch.bfloat16


def test_linear_cross_entropy_at_a_large_scale() -> None:
    states, table = torch.tensor([[3000.0], [-3000.0]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(states, table, torch.tensor([0, 0])).item() == pytest.approx(6000.0)
