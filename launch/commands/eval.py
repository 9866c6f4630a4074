"""`treering eval`: any commit, or weights of open_clip's, on any shards, without the run that made it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...training.evaluate.config import BUILT_IN, EvalConfig
from ...training.recipe import Recipe
from ..errors import RecipeError, safe_text

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from ...models.model import Model
    from ...models.spec import ModelSpec
    from ...training.evaluate.outcome import Evaluation
    from ...training.world import World

_TEXT_KINDS = frozenset({"txt", "json"})


@dataclass(frozen=True)
class Opened:
    """A model to be evaluated, and the recipe that says how where the command does not."""

    url: str
    spec: ModelSpec
    recipe: Recipe
    weights: Callable[[], Mapping[str, Tensor]]
    """by name; read when they are asked for"""
    identity: Callable[[], str]
    """what tells these weights from any others that `url` may name later"""
    step: int = 0
    samples: int = 0


def evaluate_commit(url: str, suites: list[str] | None, data: str | None) -> dict[str, Any]:
    """Scores of the model at `url`, with chance levels, intervals and sizes. A model is a commit, the newest one of a
    run folder, or `open_clip:...` as for `treering import`.

    What is not given comes from the commit's own recipe. Raises RecipeError, StoreError, DataError, InterchangeError.
    """
    config = suites_of(suites) if suites else None
    from ...training.world import World

    opened = opened_model(url)
    wanted, source = asked(opened, config, data)
    world = World.join()
    try:
        found = scored(opened, wanted, source, world)
    finally:
        world.leave()
    return {
        "commit": opened.url,
        "step": opened.step,
        "samples": opened.samples,
        "data": source,
        "scores": found.scores,
        "intervals": found.intervals,
        "chance": found.chance,
        "sizes": found.sizes,
    }


def suites_of(names: list[str]) -> EvalConfig:
    """The suites that are named, by built-in names and YAML files; looked at as far as no model is needed.
    Raises RecipeError, DataError."""
    try:
        config = EvalConfig.model_validate({"suites": names})
    except ValidationError as error:
        raise RecipeError(safe_text(error.errors()[0]["msg"].removeprefix("Value error, "))) from None
    if config.own:
        from ...training.evaluate.protocols import check_suites

        check_suites(config)
    return config


def asked(opened: Opened, config: EvalConfig | None, data: str | None) -> tuple[EvalConfig, str]:
    """How a model is to be evaluated and on which shards: by `config` and `data`, the rest by its own recipe.
    Raises RecipeError, DataError."""
    recipe, shown = opened.recipe, safe_text(opened.url)
    given = {"examples": 0} if config is None else {"examples": 0, "suites": config.suites}
    wanted = recipe.eval.model_copy(update=given)
    if not wanted.suites:
        known = ",".join(BUILT_IN)
        raise RecipeError(f"the recipe of {shown} names no suites; give some, as in --suite {known}")
    source = data or recipe.evaluation_source
    if wanted.built_in and not source:
        raise RecipeError(f"the recipe of {shown} names no data to evaluate on; give some with --data")
    if wanted.needs_captioner and opened.spec.captioner is None:
        raise RecipeError(f"the model of {shown} has no captioner; leave the captioning suite out")
    from ...training.evaluate.protocols import check_suites

    check_suites(wanted)
    return wanted, source


def scored(opened: Opened, config: EvalConfig, source: str, world: World) -> Evaluation:
    """The evaluation of a model; embeddings of it that are kept are taken, and new ones kept."""
    from ...training.evaluate.embedding_cache import EmbeddingCache
    from ...training.evaluate.suites import evaluate

    recipe, model = opened.recipe, _model(opened).to(world.device)
    embeddings = EmbeddingCache(opened.identity(), world)
    return evaluate(model, config, source, world, recipe.data.cache, recipe.data.tokenizer, embeddings)


def compare_commits(new: str, old: str, data: str | None, texts: int) -> dict[str, Any]:
    """How the commit at URL `new` serves where the one at `old` did: recalls, flips, and new queries on an old gallery
    through a map learnt from up to `texts` captions of the training sources.

    Raises RecipeError, StoreError, DataError.
    """
    from ...data.loading.loader import EvaluationSet
    from ...training.evaluate.compatibility import compatibility
    from ...training.evaluate.embed import embed, embed_captions
    from ...training.world import World

    pair = [opened_model(url) for url in (old, new)]
    recipe = pair[1].recipe
    source = data or recipe.evaluation_source
    if not source:
        raise RecipeError(f"the recipe of {safe_text(pair[1].url)} names no data to evaluate on; give some with --data")
    captions = _captions(recipe, texts)
    world, found = World.join(), []
    for each in pair:
        of = each.recipe
        model, size = _model(each).to(world.device), of.eval.batch
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
        rows = embed_captions(model, samples.tokenizer, captions, size, world)
        found.append((embed(model, samples, size, world), rows))
    (old_data, old_rows), (new_data, new_rows) = found
    try:
        outcome = compatibility(old_data, new_data, old_rows, new_rows)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    urls = {"old": pair[0].url, "new": pair[1].url}
    return {**urls, "data": source, "texts": len(captions), **outcome.json()}


def _captions(recipe: Recipe, count: int) -> list[str]:
    """About `count` captions of the training sources, as many of each; no picture is read."""
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
    return found


def compatibility_table(compared: Mapping[str, Any]) -> Table:
    """Recalls of each pairing beside the old model's, and flips below."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", *compared["scores"], box=None, pad_edge=False)
    for name in compared["scores"]["old"]:
        table.add_row(Text(name), *(f"{scores[name]:.1%}" for scores in compared["scores"].values()))
    for name, flips in compared["flips"].items():
        said = f"{flips['negative_flips']:.1%} lost, {flips['positive_flips']:.1%} won, p = {flips['p_value']:.2g}"
        table.add_row(Text(f"{name}@1"), Text(said))
    return table


def opened_model(url: str) -> Opened:
    """What lies at `url`: a commit and its recipe, or weights of open_clip's and the recipe an import would give them.

    Raises RecipeError, StoreError, InterchangeError.
    """
    from ...models.interchange.open_clip_files import PREFIX
    from ...training.checkpoint.commits import find_commit

    if url.startswith(PREFIX):
        return _opened_weights(url)
    commit = find_commit(url)
    manifest = commit.manifest
    try:
        recipe = Recipe.model_validate(manifest.recipe)
    except ValidationError as error:  # written by another version
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"the recipe of {safe_text(commit.url)} cannot be used here: {safe_text(reason)}") from None

    def weights() -> dict[str, Tensor]:
        kind = "ema" if recipe.optimizer.ema else "model"
        return {name.removeprefix(f"{kind}/"): tensor for name, tensor in commit.tensors(kind).items()}

    def identity() -> str:
        return f"{commit.url} {' '.join(part.sha256 for part in manifest.parts)}"

    state = manifest.state
    return Opened(commit.url, manifest.spec, recipe, weights, identity, state.step, state.samples)


def _opened_weights(source: str) -> Opened:
    """Weights of open_clip's, without writing a commit of them."""
    from hashlib import file_digest

    from ...models.interchange.files import open_weights
    from ...training.starting.import_weights import checked_tokenizer, recipe_for

    found = open_weights(source)
    if theirs := found.tokenizer.get("hf_tokenizer_name"):
        raise RecipeError(
            f"{safe_text(source)} reads the tokens of {safe_text(str(theirs))}; import it with its tokenizer.json, "
            f"treering import {safe_text(source)} --tokenizer FILE, and evaluate that"
        )
    checked_tokenizer(found, None)

    def identity() -> str:
        with Path(found.file).open("rb") as file:
            return f"{source} {file_digest(file, 'sha256').hexdigest()}"

    return Opened(source, found.spec, recipe_for(found, "samples://emoji", "clip"), lambda: found.tensors, identity)


def _model(opened: Opened) -> Model:
    """What is evaluated: the weights, or their average if the commit keeps one."""
    from ...models.model import build

    model, weights = build(opened.spec, opened.recipe.seed), opened.weights()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return model
