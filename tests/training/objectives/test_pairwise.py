"""The tiled losses against dense fp64 formulas written out here: any tiles, any ranks, and memory that stays flat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treering.training.objectives import scores
from treering.training.objectives.pairwise import sigmoid_losses, softmax_losses
from treering.training.objectives.scores import GATHER_BUDGET, Relations
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
KINDS = ("softmax", "sigmoid")
BIAS = -3.7


def pairs(number: int, channels: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Unit features in which a text resembles its image."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(number, channels, dtype=torch.float64, generator=generator)
    texts = images + torch.randn(number, channels, dtype=torch.float64, generator=generator)
    return [torch.nn.functional.normalize(x, dim=1).to(dtype) for x in (images, texts)]


def ids(number: int) -> Tensor:
    """[b, 2]: pairs 0, 5 and the last share a caption, 2 and 3 a picture."""
    made = torch.arange(2 * number).view(number, 2) + 1000
    made[5, 0] = made[-1, 0] = made[0, 0]
    made[3, 1] = made[2, 1]
    return made


def dense(kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids_bg: Tensor) -> tuple[Tensor, ...]:
    """Entry by entry, from the papers' formulas."""
    scores, count = scale * images @ texts.T, len(images)
    left = [[i == j or bool((ids_bg[i] != ids_bg[j]).all()) for j in range(count)] for i in range(count)]
    if kind == "sigmoid":
        losses = []
        for i in range(count):
            signs = [1.0 if i == j else -1.0 for j in range(count)]
            logits = [signs[j] * (scores[i, j] + bias[0]) for j in range(count) if left[i][j]]
            losses.append(torch.stack([-torch.nn.functional.logsigmoid(logit) for logit in logits]).sum())
        return (torch.stack(losses),)
    rows = [torch.stack([scores[i, j] for j in range(count) if left[i][j]]).logsumexp(0) for i in range(count)]
    columns = [torch.stack([scores[i, j] for i in range(count) if left[i][j]]).logsumexp(0) for j in range(count)]
    return torch.stack(rows) - scores.diagonal(), torch.stack(columns) - scores.diagonal()


def tiled(
    kind: str,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids_bg: Tensor,
    world: World = ALONE,
    budget: int = GATHER_BUDGET,
) -> tuple[Tensor, ...]:
    if kind == "sigmoid":
        return (sigmoid_losses(images, texts, scale, bias, Relations.of(ids_bg), world, gather_budget=budget),)
    return softmax_losses(images, texts, scale, Relations.of(ids_bg), world, gather_budget=budget)


def weights(number: int) -> Tensor:
    """A different slope for each image and text: no error can hide in a symmetric sum."""
    return torch.linspace(0.2, 1.7, 2 * number, dtype=torch.float64).view(2, number)


def measured(losses: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], *rest: Any, slopes: Tensor) -> Any:
    """Losses, and the gradients in the inputs of their sum with `slopes`, as numpy arrays."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = losses(*leaves, *rest)
    torch.stack([(loss * slope.to(loss)).sum() for loss, slope in zip(found, slopes, strict=False)]).sum().backward()
    gradients = [None if x.grad is None else x.grad.double().numpy() for x in leaves]
    return [loss.detach().double().numpy() for loss in found], gradients


def assert_equal(found: Any, expected: Any, rtol: float, atol: float) -> None:
    for mine, truth in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert (mine is None) == (truth is None)
        if truth is not None:
            np.testing.assert_allclose(mine, truth, rtol=rtol, atol=atol * max(1.0, float(np.abs(truth).max())))


def learned(scale: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor([scale], dtype=dtype), torch.tensor([BIAS], dtype=dtype)]


@contextmanager
def tiles_of(side: int, itemsize: int = 8) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "TILE_BYTES", itemsize * side * side)
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0])
@pytest.mark.parametrize("side", [1, 4, 5, 13, 100])
def test_equals_the_dense_formula(kind: str, scale: float, side: int) -> None:
    """13 pairs cut into 1s, 4 + 4 + 4 + 1, 5 + 5 + 3, one tile, and less than one; duplicates across tiles."""
    inputs, slopes = [*pairs(13), *learned(scale)], weights(13)
    expected = measured(lambda *x: dense(kind, *x), inputs, ids(13), slopes=slopes)
    with tiles_of(side):
        found = measured(lambda *x: tiled(kind, *x), inputs, ids(13), slopes=slopes)
    assert_equal(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_at_scale_100_with_an_adversarial_row(kind: str) -> None:
    """Scores from -100 to 100: pair 3 is as unlike as can be, and image 7 is text 29, of another tile."""
    images, texts = pairs(40, channels=16, dtype=torch.float32)
    images[3], images[7] = -texts[3], texts[29]
    inputs, slopes = [images, texts, *learned(100.0, torch.float32)], weights(40) / 40
    expected = measured(lambda *x: dense(kind, *x), [x.double() for x in inputs], ids(40), slopes=slopes)
    with tiles_of(16, itemsize=4):
        found = measured(lambda *x: tiled(kind, *x), inputs, ids(40), slopes=slopes)
    assert max(float(loss.max()) for loss in expected[0]) > 150
    assert_equal(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    inputs = [x.requires_grad_() for x in (*pairs(7), *learned(5.0))]
    with tiles_of(3):
        assert torch.autograd.gradcheck(lambda *x: tiled(kind, *x, ids(7)), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("dtype", "scale", "tolerance"), [(torch.float64, 14.3, 1e-12), (torch.float32, 100.0, 1e-5)])
def test_any_number_of_ranks(
    kind: str, world: int, dtype: torch.dtype, scale: float, tolerance: float, on_ranks: Callable[..., list[Any]]
) -> None:
    """Losses of a rank's own pairs; gradients with another slope on every rank; duplicates on different ranks.

    The texts of all ranks come at once, by groups of two and, at the end, fewer of each, or one by one. Text 1 is the
    opposite of all images of the first rank and equal to one of another: its parts differ by e^(2 scale).
    """
    number = 12
    size, slopes, (images, texts) = number // world, weights(number), pairs(number, dtype=dtype)
    images[:size], images[7] = -texts[1], texts[1]
    everyone = [images, texts, *learned(scale, dtype)]

    a_text = texts.shape[1] * texts.element_size()

    def one_rank(group: World) -> Any:
        own = slice(group.rank * size, (group.rank + 1) * size)
        inputs = [x[own] if len(x) == number else x for x in everyone]

        def found(budget: int) -> Any:
            return measured(lambda *x: tiled(kind, *x, group, budget), inputs, ids(number)[own], slopes=slopes[:, own])

        with tiles_of(3):
            return [found(budget) for budget in (GATHER_BUDGET, 2 * world * a_text, 0)]

    expected = measured(lambda *x: dense(kind, *x), [x.double() for x in everyone], ids(number), slopes=slopes)
    for answers in zip(*on_ranks(world, one_rank), strict=True):
        losses = [np.concatenate(part) for part in zip(*(losses for losses, _ in answers), strict=True)]
        features = [np.concatenate([gradients[i] for _, gradients in answers]) for i in range(2)]
        scalars = [None if answers[0][1][i] is None else sum(gradients[i] for _, gradients in answers) for i in (2, 3)]
        assert_equal((losses, features + scalars), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_ids_leave_out_and_nothing_else_does(kind: str) -> None:
    """Neutral without ids and with distinct ones, bit for bit; with all equal, only the true pairs remain."""
    features, (scale, bias) = pairs(9), learned(14.3)
    distinct = torch.arange(18).view(9, 2)
    with tiles_of(4):
        none = tiled(kind, *features, scale, bias, distinct[:, :0])
        assert all(torch.equal(x, y) for x, y in zip(none, tiled(kind, *features, scale, bias, distinct), strict=True))
        alone = tiled(kind, *features, scale, bias, torch.zeros(9, 1, dtype=torch.int64))
    scores = scale * (features[0] * features[1]).sum(1)
    truth = -torch.nn.functional.logsigmoid(scores + bias) if kind == "sigmoid" else torch.zeros(9).double()
    for losses in alone:
        torch.testing.assert_close(losses, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_slope_no_gradient(kind: str) -> None:
    """Neutral at weight 0, exactly."""
    _, gradients = measured(lambda *x: tiled(kind, *x), [*pairs(9), *learned(14.3)], ids(9), slopes=torch.zeros(2, 9))
    assert all(g is None or not g.any() for g in gradients)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_larger_than_a_tile_or_the_features(kind: str) -> None:
    """64 x 64 scores or a mask of that size would be seen."""
    number, side, channels = 64, 16, 5
    leaves = [x.requires_grad_() for x in (*pairs(number, channels), *learned(14.3))]
    largest = Largest()
    with tiles_of(side), largest:
        losses = tiled(kind, *leaves, ids(number))
        torch.stack(losses).sum().backward()
    assert largest.numbers == max(side * side, number * channels)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rank_holds_does_not_grow_with_the_world(kind: str, on_ranks: Callable[..., list[Any]]) -> None:
    """Nothing is larger than its own features, though four ranks have four times as many; without the budget it is."""
    number, channels = 16, 32

    def one_rank(group: World) -> list[int]:
        found = []
        for budget in (2 * group.size * channels * 8, GATHER_BUDGET):
            leaves = [x.requires_grad_() for x in (*pairs(number, channels), *learned(14.3))]
            largest = Largest()
            with tiles_of(4), largest:
                torch.stack(tiled(kind, *leaves, ids(number), group, budget)).sum().backward()
            found.append(largest.numbers)
        return found

    assert on_ranks(4, one_rank) == [[number * channels, 4 * number * channels]] * 4


def saved_bytes(loss: Callable[[], Tensor]) -> int:
    """Of the distinct storages kept for the backward pass."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = loss()
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_do_not_grow_with_the_world(kind: str, on_ranks: Callable[..., list[Any]]) -> None:
    size, channels = 32, 8

    def one_rank(group: World) -> int:
        leaves = [x.requires_grad_() for x in (*pairs(size, channels), *learned(14.3))]
        return saved_bytes(lambda: torch.stack(tiled(kind, *leaves, ids(size), group)).sum())

    alone = one_rank(ALONE)
    # Features, ids, and of each item its highest score, sum, positives' scores and number.
    assert alone <= 8 * (2 * size * channels + 2 * size + 8 * size + 2)
    assert on_ranks(2, one_rank) == [alone] * 2
    assert on_ranks(4, one_rank) == [alone] * 4


def test_a_nan_is_seen(on_ranks: Callable[..., list[Any]]) -> None:
    """A NaN on one rank makes the loss of all ranks NaN, so that all skip the step."""

    def one_rank(group: World) -> bool:
        images, texts = pairs(4)
        if group.rank == 1:
            texts[2] = math.nan
        losses = softmax_losses(images, texts, *learned(14.3)[:1], Relations.of(torch.zeros(4, 0)), world=group)
        return bool(torch.stack(losses).sum().isnan())

    assert on_ranks(2, one_rank) == [True, True]
