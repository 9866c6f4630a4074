"""Runs the suites of a recipe one after another; every score comes with its chance level.

Built-in suites use one set, the run's evaluation data, which is embedded once. Zero-shot tasks are derived from it:
each label in the samples' metadata (`"labels": {"role": "pilot"}`) is one task, whose classes are the values that occur
and whose prompts are the recipe's templates for that label. Suites with separate data are in `protocols.py`.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.config import CacheConfig
from ...data.errors import DataError
from ...data.loading.loader import EvaluationSet
from ...data.samples.sample import Sample
from ...data.storage.files import shown_url
from ...models.model import Model
from ..held_out import Terms, add_held_out_loss
from ..logging.counting import Counting, no_counting
from ..world import World
from . import zero_shot
from .config import Captioning, EvalConfig
from .embed import Embedded, pixels
from .embedding_cache import EmbeddingCache
from .generate import write
from .outcome import Evaluation as Evaluation
from .protocols import Bench, add_captioning, add_geometry, add_retrieval, note_unfinished, run

_POINTS = 256  # pairs
_LONGEST, _MOST_TRUE = 1_000, 20  # of an example: characters of a caption, true captions of a picture


@torch.no_grad()
def evaluate(
    model: Model,
    config: EvalConfig,
    url: str,
    world: World,
    cache: CacheConfig | None = None,
    tokenizer: str = "clip",
    embeddings: EmbeddingCache | None = None,
    counting: Counting = no_counting,
    terms: Terms | None = None,
) -> Evaluation:
    """Run the configured suites. All ranks call it together, and each gets the same result.

    `url` names the shards for built-in suites and examples, read through `cache` with the run's `tokenizer`. Captioning
    is skipped while the model has no captioner. With `embeddings`, embeddings are read from and written to that cache.
    `counting` shows the progress of what takes long. With `terms`, the held-out loss is computed at `url` as well.

    Raises DataError if data cannot be read or used, or have no labels for the zero-shot suite; SpecError if a modality
    tower cannot read its column of the data.
    """
    bench = Bench(model, world, config.batch, tokenizer, cache, embeddings, counting)
    found = Evaluation()
    if config.built_in or (config.suites and config.examples and url):
        samples = bench.own_set(url)
        _built_in(bench, config, samples, found)
    if terms is not None and config.held_out and url:
        add_held_out_loss(bench, terms, url, config.held_out, found)
    for suite in config.own:
        if model.captioner is not None or not isinstance(suite.protocol, Captioning):
            run(suite, bench, found)
    found.contents = bench.contents
    return found


def check_shards(url: str) -> None:
    """Raises DataError if the data of the built-in suites are not shards but pictures in folders or a table."""
    place = Path(url)
    is_folder = place.is_dir() and not any(place.glob("*.tar*"))
    if is_folder or (place.is_file() and place.suffix in (".tsv", ".csv", ".jsonl")):
        what = "a folder of pictures" if is_folder else "a table"
        raise DataError(
            f"{shown_url(url)!r} is {what}, and the built-in suites read tar shards; pack it (treering data pack), or "
            f"put a suite of your own into a .yaml file, as in {{name: mine, data: {shown_url(url)}, "
            f"protocol: zero_shot}}, and name that file as the suite (docs/evaluation.md)"
        )


def _built_in(bench: Bench, config: EvalConfig, samples: EvaluationSet, found: Evaluation) -> None:
    data = bench.embedded(samples)
    if not data.numbers:
        raise DataError(
            f"none of the {len(samples)} samples of {shown_url(samples.url)} can be used: {data.bad[0]['reason']}; "
            f"repair them, or name other shards (--data, or eval.data in the recipe)"
        )
    found.bad.extend(data.bad)
    used = (*config.built_in, *(["examples"] if config.examples else []))
    found.data |= dict.fromkeys(used, shown_url(samples.url))
    note_unfinished("the evaluation data", data, found)
    if "retrieval" in config.built_in:
        add_retrieval("retrieval", data, found)
    if "zero_shot" in config.built_in:
        _zero_shot(bench, config, samples, data, found)
    if "geometry" in config.built_in:
        add_geometry("geometry", data, found)
        found.sizes["geometry"] = len(data.numbers)
    if "captioning" in config.built_in and bench.model.captioner is not None:
        how = Captioning(decoding=config.caption_decoding)
        rows, _ = bench.captions(samples, how)
        add_captioning("captioning", rows, how.metrics, found)
        found.sizes["captioning"] = len(rows)
    if config.examples and bench.world.is_first:
        found.examples.update(_examples(bench, config, samples, data))
        found.points = _points(data)


def _points(data: Embedded) -> tuple[Tensor, list[str]]:
    """Evenly spaced pairs of the set, for the TensorBoard projector, with a description of each row."""
    count = len(data.images)
    some = torch.arange(min(_POINTS, count)) * count // min(_POINTS, count)
    firsts = torch.searchsorted(data.owners, some)
    captions = [data.captions[i] for i in firsts.tolist()]
    names = [f"{kind}: {caption}" for kind in ("picture", "text") for caption in captions]
    return torch.cat([data.images[some], data.texts[firsts]]), names


def _zero_shot(bench: Bench, config: EvalConfig, samples: EvaluationSet, data: Embedded, found: Evaluation) -> None:
    """One accuracy for each label in the data."""
    tasks = sorted({label for labels in data.labels for label in labels})
    if not tasks:
        raise DataError(
            f"eval.suites has zero_shot, but no sample of {samples.url} has labels; "
            'add "labels": {...} to the .json of its samples, or drop the suite'
        )
    for task in tasks:
        rows = torch.tensor([i for i, labels in enumerate(data.labels) if task in labels])
        classes, numbers, equal = zero_shot.merged(*zero_shot.label_numbers([data.labels[i][task] for i in rows]))
        found.notes += equal.note(f"zero_shot/{task}", "class names")
        texts = zero_shot.prompts(classes, config.templates.get(task, ("{}",)))
        class_ce = zero_shot.class_embeddings(bench.prompts(samples.tokenizer, texts), len(classes))
        right_n = zero_shot.rivals(data.images[rows], class_ce, numbers) == 0
        found.add(f"zero_shot/{task}", right_n, [data.keys[i] for i in rows], 1 / len(classes))
        found.sizes[f"zero_shot/{task}"] = len(classes)


def _examples(
    bench: Bench, config: EvalConfig, samples: EvaluationSet, data: Embedded
) -> dict[str, list[dict[str, Any]]]:
    """Evenly spaced pictures of the set, with their nearest captions and the generated ones."""
    count, model = config.examples, bench.model
    chosen = list(range(0, len(data.numbers), max(1, len(data.numbers) // count)))[:count]
    pictures = [s for index in chosen if isinstance(s := samples.sample(data.numbers[index]), Sample)]
    shown: dict[str, list[dict[str, Any]]] = {"retrieval": [], "captions": []}
    for index, sample in zip(chosen, pictures, strict=True):
        near = (data.images[index] @ data.texts.T).nan_to_num(-1.0).topk(min(5, len(data.captions)))
        nearest = [
            {"caption": data.captions[j][:_LONGEST], "score": score, "correct": int(data.owners[j]) == index}
            for score, j in zip(near.values.tolist(), near.indices.tolist(), strict=True)
        ]
        caption = sample.captions[0][:_LONGEST]
        shown["retrieval"].append(
            {"key": sample.key, "image": _data_url(sample.image), "caption": caption, "nearest": nearest}
        )
    if model.captioner is not None:
        tokenizer = samples.tokenizer
        longest = min(model.spec.text.context, 40)
        images = pixels(pictures, bench.world)
        written = write(config.caption_decoding, model, images, tokenizer.START, tokenizer.END, longest)
        for sample, ids in zip(pictures, written, strict=True):
            true = [each[:_LONGEST] for each in sample.captions[:_MOST_TRUE]]
            row = {"key": sample.key, "image": _data_url(sample.image), "true": true}
            shown["captions"].append(row | {"generated": tokenizer.decode(ids)})
    return shown


def _data_url(pixels: Any) -> str:
    """A uint8 [h, w, 3] picture as a PNG data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
