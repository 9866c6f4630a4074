"""`treering eval`: evaluates any commit, or open_clip weights, on any shards, without the run that wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...data.config import SourceConfig
from ...data.units import counted
from ...models.wording import first_mistake, what_is_wrong
from ...training.evaluate.config import BUILT_IN, EvalConfig
from ...training.recipe import Recipe
from ..errors import RecipeError, safe_text
from ..run_folder import is_first_process

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from torch import Tensor

    from ...data.shards.parallel import Progress
    from ...models.model import Model
    from ...models.spec import ModelSpec
    from ...training.evaluate.outcome import Evaluation
    from ...training.logging.counting import Counting
    from ...training.state import RunState
    from ...training.world import World

_WITHOUT_DATA = "samples://emoji"
_TEXT_KINDS = frozenset({"txt", "json"})


@dataclass(frozen=True)
class OpenedModel:
    """A model to evaluate, and the recipe with the defaults for its evaluation."""

    url: str
    spec: ModelSpec
    recipe: Recipe
    weights: Callable[[Progress], Mapping[str, Tensor]]
    """reads the tensors, by name; progress(done, total) counts parts"""
    identity: Callable[[], str]
    """a key of these weights for the embedding cache: other weights at the same `url` have another one"""
    state: RunState | None = None
    """that of the run; None for weights of no run"""

    @property
    def step(self) -> int:
        """Optimizer steps of the run."""
        return self.state.step if self.state else 0

    @property
    def samples(self) -> int:
        """Samples that the run has trained on."""
        return self.state.samples if self.state else 0


def evaluation_parts(found: Mapping[str, Any]) -> Iterator[Text | Table]:
    """What the terminal shows of the result of `evaluate_commit`, part by part."""
    from rich.text import Text

    from ...training.report.losses import held_out_text
    from ...training.report.sections import made_on
    from ..worker import score_table

    yield Text(f"{found['commit']} ({counted(found['samples'], 'sample')})")
    if found["data"]:
        yield Text(made_on(found["data"]))
    yield from (Text(f"note: {note}") for note in found["notes"])
    if held_out := found["held_out"]:
        of = f"{counted(held_out['samples'], 'sample')} of {held_out['data']} in batches of {held_out['batch']:,}"
        yield Text(f"{held_out_text(held_out)}, on {of}")
    if found["scores"]:
        yield score_table(found["scores"], found["chance"], found["intervals"])


def evaluate_commit(url: str, suites: list[str] | None, data: str | None) -> dict[str, Any]:
    """Evaluate the model at `url`: scores with chance levels, 95% intervals and sizes. `url` is a commit, a run folder
    (its newest commit), or `open_clip:...` as for `treering import`.

    `suites` and `data` default to those of the model's recipe. Raises RecipeError, StoreError, DataError,
    InterchangeError.
    """
    config = parse_suites(suites) if suites else None
    from ...training.world import World

    opened = open_model(url)
    wanted, source = evaluation_of(opened, config, data)
    world = World.join()
    try:
        found = evaluate_opened(opened, wanted, source, world)
    finally:
        world.leave()
    return {
        "commit": opened.url,
        "step": opened.step,
        "samples": opened.samples,
        "data": found.data,
        "notes": found.notes,
        "held_out": found.held_out and found.held_out.json(),
        "scores": found.scores,
        "intervals": found.intervals,
        "chance": found.chance,
        "sizes": found.sizes,
    }


def parse_suites(names: list[str]) -> EvalConfig:
    """The suites with these names (built-in ones and YAML files), checked as far as that needs no model.
    Raises RecipeError, DataError."""
    try:
        config = EvalConfig.model_validate({"suites": names})
    except ValidationError as error:
        raise RecipeError(f"--suite: {safe_text(what_is_wrong(error.errors()))}") from None
    if config.own:
        _check_suites(config)
    return config


def _check_suites(config: EvalConfig) -> None:
    from ...training.evaluate.protocols import check_suites
    from ...training.logging.counting import waiting

    with waiting("opening the data of the suites") if is_first_process() else nullcontext():
        check_suites(config)


def evaluation_of(opened: OpenedModel, config: EvalConfig | None, data: str | None) -> tuple[EvalConfig, str]:
    """The suites and the source of shards to evaluate a model on: `config` and `data`, or else those of its recipe.
    Raises RecipeError, DataError."""
    recipe, shown = opened.recipe, safe_text(opened.url)
    given = {"examples": 0} if config is None else {"examples": 0, "suites": config.suites}
    wanted = recipe.eval.model_copy(update=given)
    if config is not None and not data and not wanted.built_in:  # nothing is asked of the run's own data
        wanted = wanted.model_copy(update={"held_out": 0})
    source = data or recipe.evaluation_source
    if not (wanted.suites or (source and wanted.held_out and opened.state)):
        known = ",".join(BUILT_IN)
        raise RecipeError(f"the recipe of {shown} has no suites; give some, as in --suite {known}")
    if wanted.built_in and not source:
        raise RecipeError(f"the recipe of {shown} has no data to evaluate on; give some with --data")
    if wanted.needs_captioner and opened.spec.captioner is None:
        raise RecipeError(f"the model of {shown} has no captioner; remove the captioning suite")
    from ...training.evaluate.suites import check_shards

    if wanted.built_in:
        check_shards(source)
    _check_suites(wanted)
    return wanted, source


def evaluate_opened(opened: OpenedModel, config: EvalConfig, source: str, world: World) -> Evaluation:
    """Evaluate a model, reading its embeddings from the cache where possible and caching new ones."""
    from ...training.evaluate.embedding_cache import EmbeddingCache
    from ...training.evaluate.suites import evaluate
    from ...training.held_out import Terms
    from ...training.logging.counting import counting, no_counting

    show = counting if world.is_first else no_counting
    recipe, model = opened.recipe, _model(opened, show).to(world.device)
    embeddings = EmbeddingCache(opened.identity(), world)
    terms = Terms.of(recipe, opened.state, opened.state.objectives) if opened.state else None
    cache, tokenizer = recipe.data.cache, recipe.data.tokenizer
    return evaluate(model, config, source, world, cache, tokenizer, embeddings, show, terms)


def compare_commits(new: str, old: str, data: str | None, texts: int) -> dict[str, Any]:
    """Compatibility of the commit at URL `new` with the one at `old`: recalls, flips, and queries of the new model on
    a gallery of the old one through a map learned from up to `texts` captions of the training sources.

    Raises RecipeError, StoreError, DataError.
    """
    from ...data.loading.loader import EvaluationSet
    from ...training.evaluate.compatibility import compatibility
    from ...training.evaluate.embed import embed, embed_captions
    from ...training.logging.counting import counting, no_counting
    from ...training.world import World

    pair = [open_model(url) for url in (old, new)]
    recipe = pair[1].recipe
    source = data or recipe.evaluation_source
    if not source:
        raise RecipeError(f"the recipe of {safe_text(pair[1].url)} has no data to evaluate on; give some with --data")
    world, found = World.join(), []
    show = counting if world.is_first else no_counting
    with show("captions read") as progress:
        captions = _captions(recipe, texts, progress)
    for each in pair:
        of = each.recipe
        model, size = _model(each, show).to(world.device), of.eval.batch
        spec = model.spec
        image, context = spec.image, spec.text.context
        samples = EvaluationSet(
            source,
            image.resolution,
            context,
            of.data.cache,
            of.data.tokenizer,
            resize=image.resize,
            interpolation=image.interpolation,
        )
        with show("captions embedded") as progress:
            rows = embed_captions(model, samples.tokenizer, captions, size, world, progress)
        with show(f"{safe_text(each.url)}: samples embedded") as progress:
            found.append((embed(model, samples, size, world, progress), rows))
    (old_data, old_rows), (new_data, new_rows) = found
    try:
        outcome = compatibility(old_data, new_data, old_rows, new_rows)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    urls = {"old": pair[0].url, "new": pair[1].url}
    return {**urls, "data": source, "texts": len(captions), **outcome.json()}


def _captions(recipe: Recipe, count: int, progress: Progress) -> list[str]:
    """About `count` captions of the training sources, equally many from each; no picture is read."""
    from ...data.errors import BadSample
    from ...data.order import stream
    from ...data.samples.captions import read_texts
    from ...data.shards.source import open_source

    sources = [open_source(each.source) for each in recipe.data.train]
    found = []
    for number, source in enumerate(sources):
        drawn = stream(recipe.seed, "compatibility", number).permutation(len(source))[: -(-count // len(sources))]
        for i in drawn.tolist():
            with suppress(BadSample):
                found.append(read_texts(source.record(i, _TEXT_KINDS).fields).captions[0].text)
                progress(len(found), count)
    return found


def compatibility_table(compared: Mapping[str, Any]) -> Table:
    """A table of the recalls of each pairing of old and new model, with the flips below."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", *compared["scores"], box=None, pad_edge=False)
    for name in compared["scores"]["old"]:
        table.add_row(Text(name), *(f"{scores[name]:.1%}" for scores in compared["scores"].values()))
    for name, flips in compared["flips"].items():
        changes = f"{flips['negative_flips']:.1%} lost, {flips['positive_flips']:.1%} won, p = {flips['p_value']:.2g}"
        table.add_row(Text(f"{name}@1"), Text(changes))
    return table


def open_model(url: str) -> OpenedModel:
    """The model at `url`: a commit with its recipe, or open_clip weights with the recipe that an import would write.

    Raises RecipeError, StoreError, InterchangeError.
    """
    from ...models.interchange.open_clip_files import PREFIX
    from ...training.checkpoint.commits import find_commit

    if url.startswith(PREFIX):
        return _opened_weights(url)
    commit = find_commit(url)
    manifest = commit.manifest
    try:
        recipe = _with_data(Recipe.model_validate(manifest.recipe))
    except ValidationError as error:  # written by another version
        reason = f"the recipe of {commit.url} cannot be used here: {first_mistake(error)}"
        raise RecipeError(f"{safe_text(reason)}; use the release that wrote it") from None

    def weights(progress: Progress) -> dict[str, Tensor]:
        kind = "ema" if any(part.kind == "ema" for part in manifest.parts) else "model"
        found = commit.tensors(kind, progress=progress)
        return {name.removeprefix(f"{kind}/"): tensor for name, tensor in found.items()}

    def identity() -> str:
        return f"{commit.url} {' '.join(part.sha256 for part in manifest.parts)}"

    return OpenedModel(commit.url, manifest.spec, recipe, weights, identity, manifest.state)


def _with_data(recipe: Recipe) -> Recipe:
    """A recipe whose data are still to be filled in is evaluated on the emoji, as open_clip weights are."""
    if recipe.data.train:
        return recipe
    emoji = (SourceConfig(source=_WITHOUT_DATA),)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": emoji})})


def _opened_weights(source: str) -> OpenedModel:
    """Open open_clip weights without writing a commit."""
    from hashlib import file_digest

    from ...models.interchange.files import open_weights
    from ...training.logging.counting import waiting
    from ...training.starting.import_weights import checked_tokenizer, recipe_for

    with waiting(f"reading {safe_text(source)}") if is_first_process() else nullcontext():
        found = open_weights(source)
    if theirs := found.tokenizer.get("hf_tokenizer_name"):
        raise RecipeError(
            f"{safe_text(source)} uses the tokenizer {safe_text(str(theirs))}; import it with its tokenizer.json, "
            f"treering import {safe_text(source)} --tokenizer FILE, and evaluate the commit"
        )
    checked_tokenizer(found, None)

    def identity() -> str:
        shown = waiting(f"reading {safe_text(source)}") if is_first_process() else nullcontext()
        with shown, Path(found.file).open("rb") as file:
            return f"{source} {file_digest(file, 'sha256').hexdigest()}"

    recipe = recipe_for(found, _WITHOUT_DATA, "clip")
    return OpenedModel(source, found.spec, recipe, lambda _: found.tensors, identity)


def _model(opened: OpenedModel, counting: Counting) -> Model:
    """The model with its weights, or with their average if the commit has one."""
    from ...models.model import build

    with counting(f"{safe_text(opened.url)}: parts read") as progress:
        weights = opened.weights(progress)
    model = build(opened.spec, opened.recipe.seed)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    model.in_bf16 = opened.recipe.engine.precision == "bf16"  # as the run evaluates it
    return model
