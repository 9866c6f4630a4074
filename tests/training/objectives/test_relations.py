"""Ids, labels and weights of images and texts, against dense fp64 formulas: several captions an image,
equal labels, weights, hard negatives, label smoothing; any tiles, any ranks, dot products and late interaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from treering.training.objectives import scores
from treering.training.objectives.pairwise import late_softmax_losses, sigmoid_losses, softmax_losses
from treering.training.objectives.scores import GATHER_BUDGET, Relations
from treering.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
IMAGES, TOKENS, CHANNELS = 8, 3, 5
BIAS = -3.7


class Case(NamedTuple):
    """Texts of each image, and which arguments are given."""

    texts: int = IMAGES
    labels: bool = False
    weights: bool = False
    label_smoothing: float = 0.0


CASES = {
    "plain": Case(),
    "labels": Case(labels=True),
    "captions": Case(texts=2 * IMAGES, labels=True),
    "hard": Case(texts=IMAGES + 4),
    "weights": Case(weights=True),
    "softened": Case(label_smoothing=0.3),
    "all": Case(texts=2 * IMAGES, labels=True, weights=True, label_smoothing=0.1),
}
KINDS = ("softmax", "sigmoid", "late")


def relations(case: Case, world: int = 1) -> Relations:
    """Ids put 1 and 6, 2 and 3 apart; labels join 0 and 4, text 5 has no image; image 3 and text 2 count 0."""
    image_ids = torch.stack([torch.arange(IMAGES), torch.arange(IMAGES) + 50], 1)
    image_ids[6, 0], image_ids[3, 1] = image_ids[1, 0], image_ids[2, 1]
    per = case.texts // IMAGES
    owners = torch.arange(case.texts) // per if case.labels else torch.arange(case.texts)
    if not case.labels and case.texts > IMAGES:  # on each rank its own texts come first, then its hard negatives
        size, more = IMAGES // world, (case.texts - IMAGES) // world
        owners = torch.cat([torch.cat([torch.arange(size) + r * size, torch.full((more,), -1)]) for r in range(world)])
    text_ids = torch.where(owners[:, None] < 0, -1 - torch.arange(len(owners))[:, None], image_ids[owners.clamp(min=0)])
    image_labels = torch.tensor([0, 1, 2, 3, 0, 5, 6, 7])
    text_labels = image_labels[owners.clamp(min=0)].clone()
    text_labels[5] = 99
    generator = torch.Generator().manual_seed(4)
    weights = [torch.rand(n, dtype=torch.float64, generator=generator) * 2 for n in (IMAGES, case.texts)]
    weights[0][3] = weights[1][2] = 0.0
    return Relations(
        image_ids,
        text_ids,
        *((image_labels, text_labels) if case.labels else (None, None)),
        *(weights if case.weights else (None, None)),
    )


def positives(case: Case, known: Relations, world: int = 1) -> Tensor:
    if case.labels:
        return known.image_labels_b[:, None] == known.text_labels_n
    size, texts = IMAGES // world, case.texts // world
    made = torch.zeros(IMAGES, case.texts, dtype=torch.bool)
    for i in range(IMAGES):
        made[i, i // size * texts + i % size] = True
    return made


def features(kind: str, texts: int) -> list[Tensor]:
    """Images [b, e] and texts [n, e]; for late interaction tokens [b, p, e] and packed [t, e] of 1 to 4 a text."""
    generator = torch.Generator().manual_seed(texts)
    shapes = [(IMAGES, TOKENS, CHANNELS), (int(lengths(texts).sum()), CHANNELS)]
    if kind != "late":
        shapes = [(IMAGES, CHANNELS), (texts, CHANNELS)]
    return [F.normalize(torch.randn(s, dtype=torch.float64, generator=generator), dim=-1) for s in shapes]


def lengths(texts: int) -> Tensor:
    return torch.arange(texts) % 4 + 1


def dense_scores(kind: str, image: Tensor, text: Tensor, texts: int) -> tuple[Tensor, Tensor]:
    """Of images with texts and of texts with images, both [b, n]."""
    if kind != "late":
        return image @ text.T, image @ text.T
    forth, back, parts = [], [], text.split(lengths(texts).tolist())
    for x_pe in image:
        matches = [x_pe @ y_le.T for y_le in parts]
        forth.append(torch.stack([match.max(1).values.mean() for match in matches]))
        back.append(torch.stack([match.max(0).values.mean() for match in matches]))
    return torch.stack(forth), torch.stack(back)


def cross_entropies(scores_bn: Tensor, positive_bn: Tensor, kept_bn: Tensor, weights: Tensor, soft: float) -> Tensor:
    """One softmax a row, entry by entry."""
    losses = []
    for row, positive, kept in zip(scores_bn, positive_bn, kept_bn, strict=True):
        seen = [j for j in range(len(row)) if kept[j] and weights[j] > 0]
        true = [j for j in seen if positive[j]]
        if not true:
            losses.append(row.sum() * 0)
            continue
        lse = torch.stack([row[j] + weights[j].log() for j in seen]).logsumexp(0)
        target = sum(weights[j] * row[j] for j in true) / sum(weights[j] for j in true)
        spread = sum(weights[j] * row[j] for j in seen) / sum(weights[j] for j in seen)
        losses.append(lse - (1 - soft) * target - soft * spread)
    return torch.stack(losses)


def dense(kind: str, case: Case, known: Relations, world: int, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    image, text, scale, bias = inputs
    forth, back = (scale * s for s in dense_scores(kind, image, text, case.texts))
    positive = positives(case, known, world)
    same = (known.image_ids_bg[:, None] == known.text_ids_ng[None]).any(2)
    kept = positive | ~same
    ones = torch.ones(max(IMAGES, case.texts), dtype=torch.float64)
    image_weights = ones[:IMAGES] if known.image_weights_b is None else known.image_weights_b
    text_weights = ones[: case.texts] if known.text_weights_n is None else known.text_weights_n
    if kind == "sigmoid":
        logits, half = forth + bias, case.label_smoothing / 2
        targets = positive.double() * (1 - 2 * half) + half
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return ((losses * text_weights * kept).sum(1),)
    return (
        cross_entropies(forth, positive, kept, text_weights, case.label_smoothing),
        cross_entropies(back.T, positive.T, kept.T, image_weights, case.label_smoothing),
    )


def tiled(
    kind: str,
    case: Case,
    known: Relations,
    inputs: list[Tensor],
    world: World,
    lengths_n: Tensor,
    budget: int = GATHER_BUDGET,
) -> tuple[Tensor, ...]:
    image, text, scale, bias = inputs
    if kind == "sigmoid":
        return (sigmoid_losses(image, text, scale, bias, known, world, case.label_smoothing, budget),)
    if kind == "late":
        return late_softmax_losses(image, text, lengths_n, scale, known, world, case.label_smoothing, budget)
    return softmax_losses(image, text, scale, known, world, case.label_smoothing, budget)


def measured(found: Callable[[list[Tensor]], tuple[Tensor, ...]], inputs: list[Tensor], slopes: list[Tensor]) -> Any:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    losses = found(leaves)
    sum((loss * slope.to(loss)).sum() for loss, slope in zip(losses, slopes, strict=False)).backward()
    return [x.detach().double().numpy() for x in losses], [
        None if x.grad is None else x.grad.double().numpy() for x in leaves
    ]


def slopes(texts: int) -> list[Tensor]:
    return [torch.linspace(0.3, 1.6, n, dtype=torch.float64) for n in (IMAGES, texts)]


def learned(scale: float) -> list[Tensor]:
    return [torch.tensor([scale], dtype=torch.float64), torch.tensor([BIAS], dtype=torch.float64)]


def assert_equal(found: Any, expected: Any, tolerance: float) -> None:
    for mine, truth in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert (mine is None) == (truth is None)
        if truth is not None:
            np.testing.assert_allclose(
                mine, truth, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(truth).max()))
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", [1, 3, 100])
def test_equals_the_dense_formula(kind: str, name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    per_score = TOKENS * 4 if kind == "late" else 1
    monkeypatch.setattr(scores, "TILE_BYTES", 8 * side * side * per_score)
    known, inputs = relations(case), [*features(kind, case.texts), *learned(14.3)]
    found = measured(lambda x: tiled(kind, case, known, x, ALONE, lengths(case.texts)), inputs, slopes(case.texts))
    expected = measured(lambda x: dense(kind, case, known, 1, x), inputs, slopes(case.texts))
    assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_single_precision_at_scale_100(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images 3 and 4 are as unlike their texts as can be."""
    case = CASES[name]
    monkeypatch.setattr(scores, "TILE_BYTES", 4 * 3 * 3 * (TOKENS * 4 if kind == "late" else 1))
    image, text = features(kind, case.texts)
    image[3:5] = -text[3:5] if kind != "late" else -text[3]
    known = relations(case)
    inputs = [x.float() for x in (image, text, *learned(100.0))]
    known32 = Relations(*(x if x is None or x.dtype == torch.int64 else x.float() for x in known))
    known64 = Relations(*(x if x is None or x.dtype == torch.int64 else x.double() for x in known32))
    even = [s / 10 for s in slopes(case.texts)]
    found = measured(lambda x: tiled(kind, case, known32, x, ALONE, lengths(case.texts)), inputs, even)
    expected = measured(lambda x: dense(kind, case, known64, 1, x), [x.double() for x in inputs], even)
    assert max(float(loss.max()) for loss in expected[0]) > 50
    assert_equal(found, expected, 1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks(world: int, on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Positives of an item on other ranks, ranks of different numbers of tokens, texts at once and one by one."""
    monkeypatch.setattr(scores, "TILE_BYTES", 8 * 9)
    cases = [(kind, case, budget) for kind in KINDS for case in CASES.values() for budget in (GATHER_BUDGET, 0)]

    def own(x: Tensor | None, group: World) -> Tensor | None:
        return x if x is None else x.chunk(group.size)[group.rank]

    def one_rank(group: World) -> Any:
        answers = []
        for kind, case, budget in cases:
            mine = Relations(*(own(x, group) for x in relations(case, world)))
            image, text = features(kind, case.texts)
            counts = lengths(case.texts)
            parts = text.split(counts.tolist()) if kind == "late" else text.split(1)
            text = torch.cat(list(parts)[group.rank * len(parts) // world : (group.rank + 1) * len(parts) // world])
            inputs = [own(image, group), text, *learned(14.3)]
            even = [own(s, group) for s in slopes(case.texts)]
            mine_lengths = own(counts, group)
            answers.append(
                measured(
                    lambda x, a=(kind, case, mine), n=mine_lengths, most=budget: tiled(*a, x, group, n, most),
                    inputs,
                    even,
                )
            )
        return answers

    everyone = on_ranks(world, one_rank)
    for number, (kind, case, _) in enumerate(cases):
        answers = [rank[number] for rank in everyone]
        losses = [np.concatenate(part) for part in zip(*(losses for losses, _ in answers), strict=True)]
        gradients = [np.concatenate([g[i] for _, g in answers]) for i in range(2)]
        gradients += [None if answers[0][1][i] is None else sum(g[i] for _, g in answers) for i in (2, 3)]
        known, inputs = relations(case, world), [*features(kind, case.texts), *learned(14.3)]
        expected = measured(lambda x, a=(kind, case, known): dense(*a, world, x), inputs, slopes(case.texts))
        assert_equal((losses, gradients), expected, 1e-12)


def test_a_weight_is_a_number_of_copies() -> None:
    """A pair of weight 2 changes what the others see as the pair twice does; of weight 0, as if it were gone."""
    image, text = features("softmax", IMAGES)
    scale, ids = learned(14.3)[0], torch.zeros(IMAGES, 0)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]).double()
    rows = torch.tensor([0, 1, 1, 3, 4, 5, 6, 7])
    labels = torch.arange(IMAGES)
    weighted = softmax_losses(image, text, scale, Relations(ids, ids, labels, labels, weights, weights), ALONE)
    copied = softmax_losses(image[rows], text[rows], scale, Relations(ids, ids, labels[rows], labels[rows]), ALONE)
    for mine, truth in zip(weighted, copied, strict=True):
        torch.testing.assert_close(mine[rows], truth, rtol=1e-12, atol=1e-12)


def test_saved_bytes_of_late_interaction_do_not_grow_with_the_world(on_ranks: Callable[..., list[Any]]) -> None:
    def one_rank(group: World) -> int:
        image, text = (x.requires_grad_() for x in features("late", IMAGES))
        storages: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = Relations.of(torch.zeros(IMAGES, 0))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            losses = late_softmax_losses(image, text, lengths(IMAGES), learned(14.3)[0], ids, group)
        assert losses[0].requires_grad
        return sum(storages.values())

    alone = one_rank(ALONE)
    assert on_ranks(2, one_rank) == [alone] * 2
