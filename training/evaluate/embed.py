"""Runs the model over an evaluation set once, distributed over all ranks.

The set is divided into batches; rank i mod world embeds batch i, and every rank ends with all embeddings in index
order. A batch therefore holds the same samples at any number of ranks, and every score is bit-identical, also when the
set does not divide evenly. Only one batch of pictures is in memory at a time; all embeddings are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.evaluation_sets import Pictures
from ...data.ledger import LedgerEntry
from ...data.samples.clip_tokenizer import TextTokenizer
from ...data.samples.sample import Sample
from ...data.shards.parallel import Progress, silent
from ...models.model import Model
from ..world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """The embeddings of an evaluation set, the same on every rank; n pictures, m captions, e channels."""

    images: Tensor
    """float [n, e], unit rows"""
    texts: Tensor
    """float [m, e], unit rows"""
    owners: Tensor
    """int64 [m]: index of the picture that each caption belongs to"""
    numbers: list[int]
    """the pictures' indices in the set"""
    captions: list[str]
    labels: list[dict[str, str]]
    """of each picture"""
    bad: list[dict[str, Any]]
    """ledger entries of the samples that could not be used"""
    keys: list[str] = field(default_factory=list)
    """of each picture"""
    modalities: dict[str, Tensor] = field(default_factory=dict)
    """float [n, e], unit rows: embeddings of other modalities by tower, if the set has them"""


@torch.no_grad()
def embed(model: Model, data: Pictures, batch: int, world: World, progress: Progress = silent) -> Embedded:
    """Embed every usable sample and all its captions. All ranks call it together; `progress` counts samples."""
    images, texts, facts, bad = [], [], [], []
    modalities: dict[str, list[Tensor]] = {name: [] for name in data.columns}
    for numbers in own_batches(range(len(data)), batch, world, progress):
        samples, unusable = read(data, numbers)
        bad += unusable
        if not samples:
            continue
        images.append(embed_pictures(model, list(samples.values()), world))
        for name, rows in modalities.items():
            rows.append(embed_modality(model, name, list(samples.values()), world))
        captions = [c for s in samples.values() for c in s.captions]
        texts.append(embed_captions(model, data.tokenizer, captions, batch, world))
        facts += [
            {"number": number, "key": s.key, "captions": list(s.captions), "labels": s.labels}
            for number, s in samples.items()
        ]
    none = torch.zeros(0, model.spec.embed_dim)
    image_rows = _gathered_rows(torch.cat([none, *images]), world)
    text_rows = _gathered_rows(torch.cat([none, *texts]), world)
    others = {name: _gathered_rows(torch.cat([none, *rows]), world) for name, rows in modalities.items()}
    all_bad = sorted((entry for rank in world.objects(bad) for entry in rank), key=lambda e: e["number"])
    unnumbered = [{name: value for name, value in entry.items() if name != "number"} for entry in all_bad]
    all_facts = [fact for rank in world.objects(facts) for fact in rank]
    return _assemble(image_rows, text_rows, others, all_facts, unnumbered)


def read(data: Pictures, numbers: Sequence[int]) -> tuple[dict[int, Sample], list[dict[str, Any]]]:
    """The usable samples among `numbers`, by number, and ledger entries for the others."""
    found = {number: data.sample(number) for number in numbers}
    samples = {number: sample for number, sample in found.items() if isinstance(sample, Sample)}
    bad = [{"number": n, **asdict(entry)} for n, entry in found.items() if isinstance(entry, LedgerEntry)]
    return samples, bad


def pixels(samples: Iterable[Sample], world: World) -> Tensor:
    """The samples' pictures, uint8 [b, 3, resolution, resolution], on the rank's device."""
    return torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).to(world.device)


def embed_pictures(model: Model, samples: Sequence[Sample], world: World) -> Tensor:
    """Unit embeddings [b, e] of the samples' pictures, on the CPU in fp32."""
    with model.computing():
        pooled = model.embed_images(pixels(samples, world)).pooled
    return F.normalize(pooled.float(), dim=-1).cpu()


def embed_modality(model: Model, name: str, samples: Sequence[Sample], world: World) -> Tensor:
    """Unit embeddings [b, e] of the samples' arrays in column `name`, on the CPU in fp32."""
    arrays = torch.from_numpy(np.stack([s.columns[name] for s in samples])).to(world.device)
    with model.computing():
        pooled = model.modalities[name](arrays).pooled
    return F.normalize(pooled.float(), dim=-1).cpu()


def embed_captions(
    model: Model,
    tokenizer: TextTokenizer,
    captions: Sequence[str],
    batch: int,
    world: World,
    progress: Progress = silent,
) -> Tensor:
    """Unit embeddings [len(captions), e] of texts, on the CPU in fp32; this rank embeds all of them, as
    `progress(done, total)` counts."""
    rows = [torch.zeros(0, model.spec.embed_dim)]
    for number, some in enumerate(_chunks(captions, batch), 1):
        ids = [tokenizer.encode(caption, model.spec.text.context) for caption in some]
        tokens = torch.tensor([i for one in ids for i in one], device=world.device)
        lengths = torch.tensor([len(one) for one in ids], device=world.device)
        with model.computing():
            pooled = model.embed_texts(tokens, lengths).pooled
        rows.append(F.normalize(pooled.float(), dim=-1).cpu())
        progress(min(len(captions), number * batch), len(captions))
    return torch.cat(rows)


@torch.no_grad()
def embed_prompts(
    model: Model,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    batch: int,
    world: World,
    progress: Progress = silent,
) -> Tensor:
    """Unit embeddings [len(texts), e] of texts. The work is distributed over the ranks; each returns all rows."""
    own, rows = [], []
    for some in own_batches(range(len(texts)), batch, world, progress):
        own.append(some)
        rows.append(embed_captions(model, tokenizer, [texts[n] for n in some], batch, world))
    gathered = _gathered_rows(torch.cat([torch.zeros(0, model.spec.embed_dim), *rows]), world)
    order = [n for rank in world.objects([n for some in own for n in some]) for n in rank]
    return gathered[torch.tensor(order, dtype=torch.int64).argsort()]


def own_batches(items: Sequence[T], size: int, world: World, progress: Progress = silent) -> Iterator[list[T]]:
    """This rank's batches: every `world.size`-th one, beginning with number `world.rank`; `progress(done, total)`
    counts the items of all ranks, as far as this one can tell."""
    for number, batch in enumerate(islice(_chunks(items, size), world.rank, None, world.size), 1):
        yield batch
        progress(min(len(items), number * size * world.size), len(items))


def _gathered_rows(own: Tensor, world: World) -> Tensor:
    """The rows of all ranks, in rank order. Ranks may have different numbers of rows: pad to the largest, then trim."""
    counts = world.objects(len(own))
    padded = torch.cat([own, own.new_zeros(max(counts) - len(own), own.shape[1])])
    gathered = world.gather(padded.to(world.device)).cpu().unflatten(0, (world.size, -1))
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def _assemble(
    images: Tensor, texts: Tensor, modalities: dict[str, Tensor], facts: list[dict[str, Any]], bad: list[dict[str, Any]]
) -> Embedded:
    """Restore index order: `facts` and the rows are in rank order."""
    counts = [len(fact["captions"]) for fact in facts]
    starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    order = sorted(range(len(facts)), key=lambda row: facts[row]["number"])
    caption_rows = [starts[row] + i for row in order for i in range(counts[row])]
    owners = [index for index, row in enumerate(order) for _ in range(counts[row])]
    return Embedded(
        images=images[order],
        texts=texts[caption_rows],
        owners=torch.tensor(owners, dtype=torch.int64),
        numbers=[facts[row]["number"] for row in order],
        captions=[caption for row in order for caption in facts[row]["captions"]],
        labels=[facts[row]["labels"] for row in order],
        bad=bad,
        modalities={name: rows[order] for name, rows in modalities.items()},
        keys=[facts[row]["key"] for row in order],
    )


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
