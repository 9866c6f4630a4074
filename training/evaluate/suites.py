"""Suites: named evaluations of a model on one set of shards, with the chance level beside every score.

Zero-shot tasks come with the data: every label that a sample's metadata carries (`"labels": {"role": "pilot"}`) is
one task, and its classes are the values found. Prompts are the recipe's templates for that label.
"""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...data.config import CacheConfig, DataError
from ...data.loader import EvaluationSet
from ...data.record import Sample
from ...models.model import Model
from ..world import World
from . import retrieval, zero_shot
from .config import EvalConfig
from .embed import Embedded, embed, embed_captions
from .generate import write


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; rates are fractions from 0 to 1."""

    scores: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """captions of a retrieval, classes of a task"""
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bad: list[dict[str, Any]] = field(default_factory=list)
    """ledger entries of evaluation samples that could not be used"""

    def json(self) -> dict[str, Any]:
        """As a plain object."""
        return asdict(self)


def evaluate(
    model: Model,
    config: EvalConfig,
    url: str,
    world: World,
    cache: CacheConfig | None = None,
    tokenizer: str = "clip",
) -> Evaluation:
    """Run the configured suites on the shards at `url`, read through `cache`, with the run's `tokenizer`; every rank
    takes part and gets the same result.

    Raises DataError if the shards cannot be read, or carry no labels for a zero-shot suite, SpecError if a further
    tower cannot read what they hold for it.
    """
    spec = model.spec
    samples = EvaluationSet(url, spec.image.resolution, spec.text.context, cache, tokenizer, spec.further)
    spec.check_samples(samples.vectors.shapes)
    data = embed(model, samples, config.batch, world)
    if not data.numbers:
        raise DataError(f"none of the {len(samples)} samples of {url} can be used: {data.bad[0]['reason']}")
    found = Evaluation(bad=data.bad)
    if "retrieval" in config.suites:
        found.scores.update(_prefixed("retrieval", retrieval.recalls(data.images, data.texts, data.owners)))
        found.chance.update(_prefixed("retrieval", retrieval.chance(len(data.images), data.owners)))
        found.sizes["retrieval"] = len(data.captions)
        for name, rows in data.further.items():
            found.scores.update(_prefixed("retrieval", retrieval.recalls(rows, data.texts, data.owners, name)))
            found.chance.update(_prefixed("retrieval", retrieval.chance(len(rows), data.owners, name)))
    if "zero_shot" in config.suites:
        _zero_shot(model, config, samples, data, world, found)
    if config.examples and world.is_first:
        found.examples.update(_examples(model, config, samples, data, world))
    return found


def _prefixed(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": score for name, score in scores.items()}


@torch.no_grad()
def _zero_shot(
    model: Model, config: EvalConfig, samples: EvaluationSet, data: Embedded, world: World, found: Evaluation
) -> None:
    """One accuracy per label that the data carries."""
    tasks = sorted({label for labels in data.labels for label in labels})
    if not tasks:
        raise DataError(
            f"eval.suites has zero_shot, but no sample of {samples.source.url} has labels; "
            'add "labels": {...} to the .json of its samples, or drop the suite'
        )
    for task in tasks:
        rows = torch.tensor([i for i, labels in enumerate(data.labels) if task in labels])
        classes, numbers = zero_shot.label_numbers([data.labels[i][task] for i in rows])
        texts = zero_shot.prompts(classes, config.templates.get(task, ("{}",)))
        prompt_ce = embed_captions(model, samples.tokenizer, texts, config.batch, world)
        class_ce = zero_shot.class_embeddings(prompt_ce, len(classes))
        found.scores[f"zero_shot/{task}"] = zero_shot.accuracy(data.images[rows], class_ce, numbers)
        found.chance[f"zero_shot/{task}"] = 1 / len(classes)
        found.sizes[f"zero_shot/{task}"] = len(classes)


def _examples(
    model: Model, config: EvalConfig, samples: EvaluationSet, data: Embedded, world: World
) -> dict[str, list[dict[str, Any]]]:
    """Pictures spread evenly over the set, with their nearest captions and what the captioner writes."""
    count = config.examples
    chosen = list(range(0, len(data.numbers), max(1, len(data.numbers) // count)))[:count]
    pictures = [s for index in chosen if isinstance(s := samples.sample(data.numbers[index]), Sample)]
    shown: dict[str, list[dict[str, Any]]] = {"retrieval": [], "captions": []}
    for index, sample in zip(chosen, pictures, strict=True):
        near = (data.images[index] @ data.texts.T).topk(min(5, len(data.captions)))
        nearest = [
            {"caption": data.captions[j], "score": score, "correct": int(data.owners[j]) == index}
            for score, j in zip(near.values.tolist(), near.indices.tolist(), strict=True)
        ]
        shown["retrieval"].append(
            {"key": sample.key, "image": _data_url(sample.image), "caption": sample.captions[0], "nearest": nearest}
        )
    if model.captioner is not None:
        tokenizer = samples.tokenizer
        pixels = torch.stack([torch.from_numpy(s.image) for s in pictures]).permute(0, 3, 1, 2).to(world.device)
        longest = min(model.spec.text.context, 40)
        written = write(config.writing, model, pixels, tokenizer.START, tokenizer.END, longest)
        for sample, ids in zip(pictures, written, strict=True):
            row = {"key": sample.key, "image": _data_url(sample.image), "true": list(sample.captions)}
            shown["captions"].append(row | {"generated": tokenizer.decode(ids)})
    return shown


def _data_url(pixels: Any) -> str:
    """A uint8 [h, w, 3] picture as a PNG data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
