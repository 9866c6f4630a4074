"""Captions written with a cache against whole prefixes through the uncached model, picture by picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treering.models.decoding import Decoder
from treering.models.model import Model, build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, SharedSpec, TextSpec
from treering.training.evaluate.generate import beam, greedy, nucleus, write

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=1, heads=2, patch=4, resolution=8),
    text=TextSpec(width=12, depth=2, heads=3, head_dim=5, context=12),
    captioner=CaptionerSpec(depth=2),
)
START, END = 5, 7
VOCABULARY = 40


@pytest.fixture
def model() -> Model:
    """Random enough for pictures and prefixes to matter; only the first 40 tokens are ever likely."""
    net = build(SPEC, 2).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*net.captioner.parameters(), *net.text.transformer.parameters()):
            p.add_(torch.randn(p.shape, generator=generator).double() * 0.3)
        net.captioner.transformer.norm.bias[0] = 20.0
        net.text.token_embedding.weight[VOCABULARY:] = -torch.eye(1, 12).double()
        net.text.token_embedding.weight[:VOCABULARY] = torch.randn(VOCABULARY, 12, generator=generator).double()
        net.text.token_embedding.weight[:VOCABULARY, 0] = 0.0
        net.text.token_embedding.weight[END, 0] = 0.15  # captions of many lengths
    return net


def pictures(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def logits(model: Model, picture: Tensor, prefix: list[int]) -> Tensor:
    """Of the token after `prefix`, uncached."""
    output = model(picture[None], torch.tensor(prefix), torch.tensor([len(prefix)]))
    return output.caption[-1] @ model.text.token_embedding.weight.T


@torch.no_grad()
def test_a_cached_step_is_the_uncached_forward(model: Model) -> None:
    compare_cached_steps(model)


def compare_cached_steps(model: Model) -> None:
    tokens = torch.randint(0, 49408, (3, 12), generator=torch.Generator().manual_seed(3))
    decoder = Decoder(model, model.embed_images(pictures()), 12)
    for n in range(12):
        found = decoder.next(tokens[:, n])
        truth = torch.stack([logits(model, pictures()[i], tokens[i, : n + 1].tolist()) for i in range(3)])
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_cache_goes_through_shared_blocks_and_experts() -> None:
    spec = SPEC.model_copy(update={"shared": SharedSpec(width=8, depth=2, heads=2, experts=3)})
    sharing = build(spec, 2).double()
    sharing.shared.text_gate.fill_(0.7)
    sharing.shared.image_gate.fill_(-0.4)
    compare_cached_steps(sharing)


@torch.no_grad()
def test_selecting_captions(model: Model) -> None:
    """Caption 2 twice, and 0: they go on with their own pictures and prefixes."""
    decoder = Decoder(model, model.embed_images(pictures()), 5)
    decoder.next(torch.tensor([1, 2, 3]))
    decoder.select(torch.tensor([2, 2, 0]))
    found = decoder.next(torch.tensor([8, 9, 4]))
    truth = [
        logits(model, pictures()[2], [3, 8]),
        logits(model, pictures()[2], [3, 9]),
        logits(model, pictures()[0], [1, 4]),
    ]
    torch.testing.assert_close(found, torch.stack(truth), rtol=1e-11, atol=1e-11)


def searched(model: Model, picture: Tensor, width: int, longest: int, power: float) -> list[int]:
    """Beam search as lists."""
    beams = [([START], 0.0)]
    for _ in range(1, longest):
        grown = []
        for prefix, score in beams:
            if prefix[-1] == END and len(prefix) > 1:
                grown.append((prefix, score))
                continue
            likely = logits(model, picture, prefix).log_softmax(0)
            best = likely.topk(width)
            grown += [
                ([*prefix, t], score + s) for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(grown, key=lambda one: -one[1])[:width]
    best = max(beams, key=lambda one: one[1] / (len(one[0]) - 1) ** power)[0]
    return [token for token in best[1:] if token != END]


@pytest.mark.parametrize(("width", "power"), [(1, 0.0), (3, 0.0), (3, 1.0), (5, 1.0)])
@torch.no_grad()
def test_beams_are_those_of_a_plain_search(model: Model, width: int, power: float) -> None:
    found = beam(model, pictures(6), START, END, 7, width, power)
    assert found == [searched(model, picture, width, 7, power) for picture in pictures(6)]
    assert len({len(one) for one in found}) > 1
    if width == 1:
        assert found == greedy(model, pictures(6), START, END, 7)
    else:
        assert found != greedy(model, pictures(6), START, END, 7)


@torch.no_grad()
def test_a_nucleus_is_what_its_mass_says(model: Model) -> None:
    """Drawn 2,000 times for one picture: only tokens of the nucleus, each as often as its probability says."""
    many = pictures(1).expand(500, -1, -1, -1)
    mass, temperature = 0.8, 1.5
    drawn = [
        t[0] if t else END for seed in range(4) for t in nucleus(model, many, START, END, 2, mass, temperature, seed)
    ]
    likely, tokens = (logits(model, pictures()[0], [START]) / temperature).softmax(0).sort(descending=True)
    size = int((likely.cumsum(0) < mass).sum()) + 1
    assert 1 < size < VOCABULARY
    assert set(drawn) == set(tokens[:size].tolist())
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY)[tokens[:size]]
    expected = likely[:size] / likely[:size].sum() * len(drawn)
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


@torch.no_grad()
def test_a_small_nucleus_is_greedy_and_draws_repeat(model: Model) -> None:
    assert nucleus(model, pictures(), START, END, 8, mass=1e-9) == greedy(model, pictures(), START, END, 8)
    first = write("nucleus", model, pictures(), START, END, 8)
    assert first == write("nucleus", model, pictures(), START, END, 8)
    assert first != nucleus(model, pictures(), START, END, 8, seed=1)
