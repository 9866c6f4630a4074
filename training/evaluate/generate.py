"""Generates captions for a batch of pictures: greedy, beam search or nucleus sampling.

Shape suffixes: b pictures, w beams of a picture, v vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...models.decoding import Decoder
from ...models.model import Model
from ..sample_rng import uniform

CaptionDecoding = Literal["greedy", "beam", "nucleus"]


def write(kind: CaptionDecoding, model: Model, images: Tensor, start: int, end: int, longest: int) -> list[list[int]]:
    """Token ids of each caption, without `start` and `end`; at most `longest` tokens including `start`.

    `images` is uint8 [b, 3, resolution, resolution].
    """
    return {"greedy": greedy, "beam": beam, "nucleus": nucleus}[kind](model, images, start, end, longest)


def greedy(model: Model, images: Tensor, start: int, end: int, longest: int) -> list[list[int]]:
    """Take the most likely next token at each step."""
    return nucleus(model, images, start, end, longest, mass=0.0)


@torch.no_grad()
def nucleus(
    model: Model,
    images: Tensor,
    start: int,
    end: int,
    longest: int,
    mass: float = 0.9,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Sample each token from the most likely ones with a total probability of `mass` (Holtzman et al., arXiv
    1904.09751)."""
    decoder = Decoder(model, model.embed_images(images), longest)
    draws = uniform(seed, "evaluate/nucleus", torch.arange(len(images), device=images.device), longest)
    written = torch.full((len(images), 1), start, device=images.device)
    done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for length in range(1, longest):
        logits_bv = _ending_where_broken(decoder.next(written[:, -1]), end)
        chosen_b = _drawn(logits_bv / temperature, mass, draws[:, length]) if mass else logits_bv.argmax(1)
        written = torch.cat([written, chosen_b.masked_fill(done, end)[:, None]], 1)
        done |= chosen_b == end
        if bool(done.all()):
            break
    return _captions(written, end)


def _drawn(logits_bv: Tensor, mass: float, draws_b: Tensor) -> Tensor:
    """One token of each row's nucleus, by inverse transform sampling with the uniform numbers `draws_b`."""
    likely_bv, tokens_bv = logits_bv.softmax(1).double().sort(1, descending=True)
    before_bv = likely_bv.cumsum(1) - likely_bv
    kept_bv = likely_bv.masked_fill(before_bv >= mass, 0.0)
    ends_bv = kept_bv.cumsum(1)
    place_b1 = torch.searchsorted(ends_bv, (draws_b * ends_bv[:, -1])[:, None], right=True)
    # Rounding may put a draw behind the last token of the nucleus.
    last_b1 = (kept_bv > 0).sum(1, keepdim=True) - 1
    return tokens_bv.gather(1, torch.minimum(place_b1, last_b1))[:, 0]


@torch.no_grad()
def beam(
    model: Model, images: Tensor, start: int, end: int, longest: int, width: int = 4, length_power: float = 1.0
) -> list[list[int]]:
    """Beam search with `width` beams; a finished caption stays in the beam.

    The result is the beam with the largest log-probability / length^length_power: 0 prefers short captions, 1 compares
    means per token.
    """
    pictures, device = len(images), images.device
    decoder = Decoder(model, model.embed_images(images), longest)
    decoder.select(torch.arange(pictures, device=device).repeat_interleave(width))
    first_b1 = torch.arange(pictures, device=device)[:, None] * width
    written = torch.full((pictures * width, 1), start, device=device)
    scores_bw = torch.full((pictures, width), float("-inf"), device=device)
    scores_bw[:, 0] = 0.0  # all beams are equal at first, so only one of them competes
    lengths, done = torch.zeros(pictures * width, device=device), torch.zeros(pictures * width, device=device).bool()
    for _ in range(1, longest):
        likely_v = _ending_where_broken(decoder.next(written[:, -1]).float(), end).log_softmax(1)
        likely_v[done] = float("-inf")
        likely_v[done, end] = 0.0  # a finished caption can only be extended by `end`, at no cost
        vocabulary = likely_v.shape[1]
        all_bv = (scores_bw[..., None] + likely_v.view(pictures, width, -1)).flatten(1)
        scores_bw, places_bw = all_bv.topk(width, 1)
        rows, tokens = (first_b1 + places_bw // vocabulary).flatten(), (places_bw % vocabulary).flatten()
        decoder.select(rows)
        written = torch.cat([written[rows], tokens[:, None]], 1)
        lengths, done = lengths[rows] + ~done[rows], done[rows] | (tokens == end)
        if bool(done.all()):
            break
    best_b = (scores_bw / lengths.view(pictures, width).clamp(min=1) ** length_power).argmax(1)
    return _captions(written[first_b1[:, 0] + best_b], end)


def _ending_where_broken(logits_bv: Tensor, end: int) -> Tensor:
    """The logits; in rows where one is not finite, such that the caption ends: it says nothing rather than anything."""
    broken_b1 = ~logits_bv.isfinite().all(1, keepdim=True)
    only_end_v = torch.full_like(logits_bv[:1], float("-inf")).index_fill(
        1, torch.tensor([end], device=logits_bv.device), 0.0
    )
    return torch.where(broken_b1, only_end_v, logits_bv)


def _captions(written: Tensor, end: int) -> list[list[int]]:
    return [[token for token in row[1:] if token != end] for row in written.tolist()]
