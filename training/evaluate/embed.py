"""Running the model over an evaluation set once, shared out over all ranks.

Sample i is embedded by rank i mod world, and every rank ends with all embeddings in index order, so every score is the
same at any number of ranks, also when the set does not divide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.loader import evaluation_samples
from ...data.record import Sample
from ...data.text import Tokenizer
from ...models.model import Model
from ..world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """A whole evaluation set, the same on every rank; n pictures, m captions, e channels."""

    images: Tensor
    """float [n, e], unit rows"""
    texts: Tensor
    """float [m, e], unit rows"""
    owners: Tensor
    """int64 [m]: the picture each caption belongs to"""
    keys: list[str]
    """of the pictures"""
    captions: list[str]
    labels: list[dict[str, str]]
    """of the pictures"""


@torch.no_grad()
def embed(model: Model, url: str, batch: int, world: World) -> Embedded:
    """Embed every sample of the shards at `url`, with all its captions. Raises DataError if they cannot be read."""
    spec = model.spec
    samples = evaluation_samples(url, spec.image.resolution, spec.text.context, world.rank, world.size)
    images, texts, facts = [], [], []
    for some in _chunks(samples, batch):
        images.append(embed_pictures(model, some, world))
        texts.append(embed_captions(model, [c for s in some for c in s.captions], batch, world))
        facts += [{"key": s.key, "captions": list(s.captions), "labels": s.labels} for s in some]
    none = torch.zeros(0, spec.embed_dim)
    image_rows, text_rows = torch.cat([none, *images]), torch.cat([none, *texts])
    return _assemble(_everyones(image_rows, world), _everyones(text_rows, world), world.objects(facts))


def embed_pictures(model: Model, samples: Sequence[Sample], world: World) -> Tensor:
    """Unit embeddings [b, e] of the samples' pictures, on the CPU in fp32."""
    pixels = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).to(world.device)
    return F.normalize(model.embed_images(pixels).pooled.float(), dim=-1).cpu()


def embed_captions(model: Model, captions: Sequence[str], batch: int, world: World) -> Tensor:
    """Unit embeddings [len(captions), e] of texts, on the CPU in fp32."""
    tokenizer, rows = Tokenizer(), []
    for some in _chunks(captions, batch):
        ids = [tokenizer.encode(caption, model.spec.text.context) for caption in some]
        tokens = torch.tensor([i for one in ids for i in one], device=world.device)
        lengths = torch.tensor([len(one) for one in ids], device=world.device)
        rows.append(F.normalize(model.embed_texts(tokens, lengths).pooled.float(), dim=-1).cpu())
    return torch.cat(rows)


def _everyones(own: Tensor, world: World) -> list[Tensor]:
    """The rows of each rank, whose numbers may differ: padded to the most, gathered, and cut again."""
    counts = world.objects(len(own))
    padded = torch.cat([own, own.new_zeros(max(counts) - len(own), own.shape[1])])
    gathered = world.gather(padded.to(world.device)).cpu()
    return (
        [rows[:count] for rows, count in zip(gathered.chunk(world.size), counts, strict=True)] if max(counts) else [own]
    )


def _assemble(images: list[Tensor], texts: list[Tensor], facts: list[list[dict]]) -> Embedded:
    """Interleave the ranks' rows back into index order."""
    picture_rows, caption_rows, owners = [], [], []
    keys: list[str] = []
    captions: list[str] = []
    labels: list[dict[str, str]] = []
    starts = [0] * len(facts)
    for index in range(sum(len(f) for f in facts)):
        rank, row = index % len(facts), index // len(facts)
        fact = facts[rank][row]
        count = len(fact["captions"])
        picture_rows.append(images[rank][row])
        caption_rows.append(texts[rank][starts[rank] : starts[rank] + count])
        starts[rank] += count
        owners += [index] * count
        keys.append(fact["key"])
        captions += fact["captions"]
        labels.append(fact["labels"])
    return Embedded(torch.stack(picture_rows), torch.cat(caption_rows), torch.tensor(owners), keys, captions, labels)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
