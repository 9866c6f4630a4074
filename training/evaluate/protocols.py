"""The protocols of a suite: each turns pictures, texts and a model into scores.

A `Bench` is a model on its ranks with everything needed to read a set; a protocol is a function of it. All ranks take
part and get the same scores. A suite counts every sample: a sample that cannot be used is an error, because a score on
the remaining ones could not be compared with published figures.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...data.config import CacheConfig
from ...data.errors import DataError, shown
from ...data.evaluation_sets import CLASS, FilePictures, Form, Pictures, ShardPictures, open_pictures
from ...data.loading.loader import EvaluationSet
from ...data.samples.clip_tokenizer import TextTokenizer
from ...data.samples.tokenizer import open_tokenizer
from ...data.shards.parallel import Progress, silent
from ...data.storage.files import shown_url
from ...models.model import Model
from ..logging.counting import Counting, no_counting
from ..world import World
from . import probes, prompts, retrieval, zero_shot
from .captioning import bleu, check_installed, ciders, write_captions
from .config import Captioning, EvalConfig, Geometry, KnnProbe, LinearProbe, Pairs, Retrieval, SuiteConfig, ZeroShot
from .embed import Embedded, embed, embed_prompts
from .embedding_cache import Content, EmbeddingCache
from .geometry import geometry
from .outcome import Evaluation
from .reliability import calibration_error, calibration_interval


@dataclass
class Bench:
    """A model under evaluation, and how to read sets for it."""

    model: Model
    world: World
    batch: int
    tokenizer: str = "clip"
    cache: CacheConfig | None = None
    embeddings: EmbeddingCache | None = None
    """the embedding cache; None: no caching, as for a model in training"""
    counting: Counting = no_counting
    """shows the progress of what takes long"""
    contents: dict[str, str] = field(default_factory=dict)
    """what identifies the samples of each set that was opened, by its URL"""
    _embedded: dict[str, Embedded] = field(default_factory=dict)

    def open(self, url: str, form: Form) -> FilePictures | ShardPictures:
        """Open the set at `url` with the model's image size, context and resizing. Raises DataError, also if ranks see
        different samples."""
        spec, image = self.model.spec, self.model.spec.image
        with self._opening(url) as progress:
            data = open_pictures(
                url,
                form,
                image.resolution,
                spec.text.context,
                self.tokenizer,
                self.cache,
                resize=image.resize,
                interpolation=image.interpolation,
                progress=progress,
            )
        self._check_ranks(data)
        return data

    def _check_ranks(self, data: Pictures) -> None:
        """Every rank embeds a part of a set, by the numbers of its samples. Raises DataError on all of them."""
        self.contents[data.url] = data.contents
        rows = self.world.objects([socket.gethostname(), len(data), data.contents])
        other = next((rank for rank, row in enumerate(rows) if row[1:] != rows[0][1:]), None)
        if other is not None:
            raise DataError(
                f"{shown_url(data.url)} is not the same everywhere: {rows[0][1]:,} samples for process 0 on "
                f"{rows[0][0]}, {rows[other][1]:,} for process {other} on {rows[other][0]}; copy the data again"
            )

    def own_set(self, url: str, columns: Collection[str] | None = None, context: int | None = None) -> EvaluationSet:
        """The run's evaluation data, with those of `columns` that it has (default: those of the modality towers) and
        captions of at most `context` tokens (default: the model's). Raises DataError, SpecError."""
        spec, image = self.model.spec, self.model.spec.image
        with self._opening(url) as progress:
            samples = EvaluationSet(
                url,
                image.resolution,
                context or spec.text.context,
                self.cache,
                self.tokenizer,
                resize=image.resize,
                interpolation=image.interpolation,
                columns=spec.modalities if columns is None else sorted(columns),
                progress=progress,
            )
        spec.check_samples(samples.vectors.shapes)
        self._check_ranks(samples)
        return samples

    def _opening(self, url: str) -> AbstractContextManager[Progress]:
        return self.counting(f"{shown_url(url)}: shards indexed")

    def embedded(self, data: Pictures) -> Embedded:
        """The embeddings of a set, computed once."""
        if data.identity not in self._embedded:
            self._embedded[data.identity] = self._fetched(data)
        return self._embedded[data.identity]

    def prompts(self, tokenizer: TextTokenizer, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [len(texts), e] of prompts."""

        def make() -> Content:
            with self.counting("prompts embedded") as progress:
                rows = embed_prompts(self.model, tokenizer, texts, self.batch, self.world, progress)
            return {"texts": rows}, None

        return self.cached(["texts", list(texts)], make)[0]["texts"]

    def captions(self, data: Pictures, how: Captioning) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Every usable sample with its generated caption, and ledger entries for the others."""

        def make() -> Content:
            with self.counting(f"{shown_url(data.url)}: pictures captioned") as progress:
                return {}, write_captions(
                    self.model, data, how.decoding, how.max_tokens, self.batch, self.world, progress
                )

        rows, bad = self.cached(["captions", data.identity, how.decoding, how.max_tokens], make)[1]
        return rows, bad

    def _fetched(self, data: Pictures) -> Embedded:
        def make() -> Content:
            with self.counting(f"{shown_url(data.url)}: samples embedded") as progress:
                found = embed(self.model, data, self.batch, self.world, progress)
            rest = {name: getattr(found, name) for name in ("numbers", "captions", "labels", "bad", "keys")}
            return {"images": found.images, "texts": found.texts, "owners": found.owners, **found.modalities}, rest

        tensors, rest = self.cached(["set", data.identity, list(data.columns)], make)
        modalities = {name: tensors[name] for name in data.columns}
        return Embedded(tensors["images"], tensors["texts"], tensors["owners"], modalities=modalities, **rest)

    def cached(self, made_from: list[Any], make: Callable[[], Content]) -> Content:
        """What `make` computes, from the embedding cache if it was computed before."""
        if self.embeddings is None:
            content: Content = make()
            return content
        return self.embeddings.fetch([*made_from, open_tokenizer(self.tokenizer).identity, self.batch], make)


def check_suites(config: EvalConfig) -> None:
    """Raises DataError if the files of a suite are not valid; needs no model, so it runs before training starts."""
    if "captioning" in config.built_in:
        check_installed(Captioning().metrics)
    for suite in config.own:
        _check(suite)


def _check(suite: SuiteConfig) -> None:
    protocol, data = suite.protocol, suite.data
    if isinstance(protocol, Captioning):
        check_installed(protocol.metrics)
    opened = open_pictures(data.source, _form(suite), 1, 77)
    if data.train is not None:
        trained = open_pictures(data.train, _form(suite), 1, 77)
        if trained.known_labels and opened.known_labels:
            _train_classes(suite, trained.known_labels, opened.known_labels)
    if isinstance(protocol, ZeroShot):
        names = prompts.class_names(protocol)
        if opened.known_labels:
            names = prompts.numbered(opened.known_labels, names, data.source, protocol.classes).names
        if names is not None:
            prompts.prompts_of(protocol, names)
            if protocol.broader is not None:
                prompts.levels(protocol.broader, names)


def run(suite: SuiteConfig, bench: Bench, found: Evaluation) -> None:
    """Add the scores of a suite, each called `name/score`. Raises DataError."""
    data = bench.open(suite.data.source, _form(suite))
    protocol = suite.protocol
    trained = f", trained on {shown_url(suite.data.train)}" if suite.data.train else ""
    found.data[suite.name] = shown_url(suite.data.source) + trained
    if isinstance(protocol, Captioning):
        rows, bad = bench.captions(data, protocol)
        _refuse_bad(data, bad)
        found.sizes[suite.name] = len(rows)
        add_captioning(suite.name, rows, protocol.metrics, found)
        return
    embedded = bench.embedded(data)
    _refuse_bad(data, embedded.bad)
    note_unfinished(suite.name, embedded, found)
    found.sizes[suite.name] = len(embedded.numbers)
    if isinstance(protocol, ZeroShot):
        _add_zero_shot(suite, protocol, data, embedded, bench, found)
    elif isinstance(protocol, LinearProbe | KnnProbe):
        _add_probe(suite, protocol, embedded, bench, found)
    elif isinstance(protocol, Retrieval):
        add_retrieval(suite.name, embedded, found)
    elif isinstance(protocol, Geometry):
        add_geometry(suite.name, embedded, found)
    else:
        _add_pairs(suite.name, embedded, found)


def note_unfinished(name: str, data: Embedded, found: Evaluation) -> None:
    """Say how many embeddings of a set are not finite; in every protocol they are wrong."""
    for what, rows in {"pictures": data.images, "texts": data.texts, **data.modalities}.items():
        broken = int((~rows.isfinite().all(1)).sum())
        if broken:
            found.notes.append(
                f"{name}: the embeddings of {broken:,} of {len(rows):,} {what} are not finite and count as wrong; "
                f"the model's weights may be damaged"
            )


def add_retrieval(name: str, data: Embedded, found: Evaluation) -> None:
    """Add recall in both directions, for pictures and other modalities. Equal captions are one."""
    captions = retrieval.distinct(data.captions)
    found.notes += captions.note(name, "captions")
    texts, words = data.texts[captions.first_u], [data.captions[i] for i in captions.first_u]
    pairs = (data.owners, captions.number_m)
    chance = retrieval.chance(len(data.images), *pairs)
    for what, rows in {"image": data.images, **data.modalities}.items():
        of_rows, of_texts = retrieval.ranks(rows, texts, *pairs)
        for k in retrieval.CUTS:
            found.add(f"{name}/{what}_to_text@{k}", of_rows < k, data.keys, chance[f"image_to_text@{k}"])
            key, by_chance = f"{name}/text_to_{what}@{k}", chance[f"text_to_image@{k}"]
            found.add(key, of_texts < k, words, by_chance, data.owners[captions.first_u])
        found.sizes[f"{name}/text_to_{what}"] = len(rows)
    found.sizes[name] = len(words)


def add_geometry(name: str, data: Embedded, found: Evaluation) -> None:
    """Add modality gap, alignment and uniformity."""
    figures = geometry(data.images, data.texts, data.owners)
    near_m = (data.images[data.owners].double() - data.texts.double()).square().sum(1)
    for key, value in figures.items():
        if key == "alignment":
            found.add(f"{name}/{key}", near_m, data.captions, group_n=data.owners)
        else:
            found.put(f"{name}/{key}", value)


def add_captioning(name: str, rows: Sequence[dict[str, Any]], metrics: Sequence[str], found: Evaluation) -> None:
    """Add BLEU and CIDEr of generated captions."""
    texts, references = [row["written"] for row in rows], [row["true"] for row in rows]
    if "bleu" in metrics:
        score, within = bleu(texts, references)
        found.put(f"{name}/bleu", score, within)
    if "cider" in metrics:
        found.add(f"{name}/cider", ciders(texts, references), [row["key"] for row in rows])


def _add_zero_shot(
    suite: SuiteConfig, protocol: ZeroShot, data: Pictures, embedded: Embedded, bench: Bench, found: Evaluation
) -> None:
    labels = [label[CLASS] for label in embedded.labels]
    numbered = prompts.numbered(labels, prompts.class_names(protocol), suite.data.source, protocol.classes)
    found.notes += [f"{suite.name}: {numbered.note}"] if numbered.note else []
    names, label_n, equal = zero_shot.merged(numbered.names, numbered.label_n)
    found.notes += equal.note(suite.name, "class names")
    given = prompts.prompts_of(protocol, names)
    prompt_pe = bench.prompts(data.tokenizer, given.texts)
    class_ce = zero_shot.weighted_embeddings(prompt_pe, given.class_p, given.weight_p, len(names))
    name, keys, classes = suite.name, embedded.keys, len(names)
    rival_n = zero_shot.rivals(embedded.images, class_ce, label_n)
    right_n = rival_n == 0
    found.add(f"{name}/accuracy@1", right_n, keys, 1 / classes)
    if classes > 5:
        found.add(f"{name}/accuracy@5", rival_n < 5, keys, 5 / classes)
    # Weight each sample so that the mean over samples equals the mean over classes of their recalls.
    count_c = torch.bincount(label_n, minlength=classes)
    weight_n = len(label_n) / (int((count_c > 0).sum()) * count_c[label_n].double())
    found.add(f"{name}/mean_per_class", right_n * weight_n, keys, 1 / classes)
    probability_nc = (bench.model.scale().detach().cpu() * embedded.images @ class_ce.T).softmax(1)
    if probability_nc.isfinite().all():
        error, within = calibration_error(probability_nc, label_n), calibration_interval(probability_nc, label_n)
        found.put(f"{name}/calibration_error", error, within)
    else:
        found.put(f"{name}/calibration_error", float("nan"))
    if protocol.broader is not None:
        nearest_n = zero_shot.nearest(embedded.images, class_ce)
        for level, broader in enumerate(prompts.levels(protocol.broader, names), 1):
            number = {each: i for i, each in enumerate(sorted(set(broader)))}
            group_c = torch.tensor([number[each] for each in broader])
            guess = torch.bincount(group_c)[group_c[label_n]].double().mean().item() / classes
            right_n = (group_c[nearest_n] == group_c[label_n]) & (nearest_n >= 0)
            found.add(f"{name}/broader_{level}", right_n, keys, guess)


def _add_probe(
    suite: SuiteConfig, protocol: LinearProbe | KnnProbe, test: Embedded, bench: Bench, found: Evaluation
) -> None:
    assert suite.data.train is not None
    data = bench.open(suite.data.train, _form(suite))
    train = bench.embedded(data)
    _refuse_bad(data, train.bad)
    train_labels, test_labels = ([label[CLASS] for label in each.labels] for each in (train, test))
    names = _train_classes(suite, train_labels, test_labels)
    number = {name: i for i, name in enumerate(names)}
    label_n = torch.tensor([number[label] for label in train_labels])
    note_unfinished(f"{suite.name} (data.train)", train, found)
    predicted: list[int] = []
    if bench.world.is_first:  # fit once: it takes the longest, and fits on two machines may differ in the last bit
        with bench.counting(f"{suite.name}: fits of the probe") as progress:
            predicted = _predicted(protocol, train.images, label_n, test.images, progress).tolist()
    predicted = bench.world.first(predicted)
    right_n = torch.tensor(predicted) == torch.tensor([number[label] for label in test_labels])
    found.add(f"{suite.name}/accuracy@1", right_n, test.keys, 1 / len(names))


def _predicted(
    protocol: LinearProbe | KnnProbe,
    train_ne: Tensor,
    label_n: Tensor,
    test_qe: Tensor,
    progress: Progress = silent,
) -> Tensor:
    """int64 [q]: the class that a probe gives each test picture; -1 for one whose embedding is not finite, and for all
    if those of fewer than two classes are in the training set."""
    fine_n, fine_q = train_ne.isfinite().all(1), test_qe.isfinite().all(1)
    train_ne, label_n = train_ne[fine_n], label_n[fine_n]
    found_q = torch.full((len(test_qe),), -1)
    if len(label_n.unique()) > 1 and fine_q.any():
        if isinstance(protocol, LinearProbe):
            found_q[fine_q] = probes.linear(train_ne, label_n, test_qe[fine_q], progress=progress).predicted
        else:
            near = (protocol.neighbours, protocol.temperature)
            found_q[fine_q] = probes.nearest_neighbours(train_ne, label_n, test_qe[fine_q], *near)
    return found_q


def _train_classes(suite: SuiteConfig, train: Sequence[str], test: Sequence[str]) -> list[str]:
    names = sorted(set(train))
    if len(names) < 2:
        raise DataError(f"{suite.data.train} has one class, {shown(names[0])}; a probe needs two or more; add another")
    unknown = next((label for label in test if label not in set(names)), None)
    if unknown is not None:
        raise DataError(
            f"{suite.data.source} has the class {shown(unknown)}, which has no picture in {suite.data.train}; add some "
            f"there, or remove the class"
        )
    return names


def _add_pairs(name: str, data: Embedded, found: Evaluation) -> None:
    """Captions are in pairs: the true one, then the swapped one. A tie counts as wrong."""
    number_m = retrieval.distinct(data.captions).number_m.unflatten(0, (-1, 2))
    equal = int((number_m[:, 0] == number_m[:, 1]).sum())
    if equal:
        found.notes.append(f"{name}: in {equal} of {len(number_m)} pairs both captions are equal, which count as wrong")
    near_m = (data.images[data.owners] * data.texts).sum(1).unflatten(0, (-1, 2))
    names = [f"{true} / {wrong}" for true, wrong in zip(data.captions[::2], data.captions[1::2], strict=True)]
    found.add(f"{name}/accuracy", near_m[:, 0] > near_m[:, 1], names, 0.5)


def _form(suite: SuiteConfig) -> Form:
    protocol, data = suite.protocol, suite.data
    if isinstance(protocol, Pairs):
        return Form("swap", data.images, data.label, protocol.swapped)
    need = "class" if isinstance(protocol, ZeroShot | LinearProbe | KnnProbe) else "captions"
    return Form("class" if need == "class" else "captions", data.images, data.label)


def _refuse_bad(data: Pictures, bad: Sequence[dict[str, Any]]) -> None:
    if bad:
        first = bad[0]
        raise DataError(
            f"{len(bad)} of the {len(data)} samples of {shown_url(data.url)} cannot be used, but a suite counts all: "
            f"{shown(first['key'])} in {shown_url(first['shard'])}: {first['reason']}; repair or remove it"
        )
