"""`treering eval`: any commit, on any shards, without the run that made it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from ...training.evaluate.config import BUILT_IN, EvalConfig
from ...training.recipe import Recipe
from ..errors import RecipeError, clean

if TYPE_CHECKING:
    from rich.table import Table

    from ...models.model import Model
    from ...training.checkpoint.manifest import Commit
    from ...training.evaluate.outcome import Evaluation
    from ...training.world import World

Opened: TypeAlias = "tuple[Commit, Recipe]"
"""a commit, and the recipe it was made by"""
_TEXT_KINDS = frozenset({"txt", "json"})


def evaluate_commit(url: str, suites: list[str] | None, data: str | None) -> dict[str, Any]:
    """Scores of the commit at `url` (or of the newest one of a run folder), with chance levels, intervals and sizes.

    What is not given comes from the commit's own recipe. Raises RecipeError, StoreError, DataError.
    """
    config = suites_of(suites) if suites else None
    from ...training.world import World

    opened = opened_commit(url)
    wanted, source = asked(opened, config, data)
    world = World.join()
    try:
        found = scored(opened, wanted, source, world)
    finally:
        world.leave()
    state = opened[0].manifest.state
    return {
        "commit": opened[0].url,
        "step": state.step,
        "samples": state.samples,
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
        raise RecipeError(clean(error.errors()[0]["msg"].removeprefix("Value error, "))) from None
    if config.own:
        from ...training.evaluate.protocols import check_suites

        check_suites(config)
    return config


def asked(opened: Opened, config: EvalConfig | None, data: str | None) -> tuple[EvalConfig, str]:
    """How a commit is to be evaluated and on which shards: by `config` and `data`, the rest by its own recipe.
    Raises RecipeError, DataError."""
    commit, recipe = opened
    given = {"examples": 0} if config is None else {"examples": 0, "suites": config.suites}
    wanted = recipe.eval.model_copy(update=given)
    if not wanted.suites:
        known = ",".join(BUILT_IN)
        raise RecipeError(f"the recipe of {clean(commit.url)} names no suites; give some, as in --suite {known}")
    source = data or recipe.evaluation_source
    if wanted.built_in and not source:
        raise RecipeError(f"the recipe of {clean(commit.url)} names no data to evaluate on; give some with --data")
    if wanted.needs_captioner and commit.manifest.spec.caption is None:
        raise RecipeError(f"the model of {clean(commit.url)} has no captioner; leave the captioning suite out")
    from ...training.evaluate.protocols import check_suites

    check_suites(wanted)
    return wanted, source


def scored(opened: Opened, config: EvalConfig, source: str, world: World) -> Evaluation:
    """The evaluation of a commit; embeddings of it that are kept are taken, and new ones kept."""
    from ...training.evaluate.embedding_cache import Kept
    from ...training.evaluate.suites import evaluate

    commit, recipe = opened
    model = _model(commit, recipe).to(world.device)
    kept = Kept(commit_identity(commit), world)
    return evaluate(model, config, source, world, recipe.data.cache, recipe.data.tokenizer, kept)


def commit_identity(commit: Commit) -> str:
    """A commit by where it lies and the checksums of its parts: another one in its place has another."""
    return f"{commit.url} {' '.join(part.sha256 for part in commit.manifest.parts)}"


def compare_commits(new: str, old: str, data: str | None, texts: int) -> dict[str, Any]:
    """How the commit at URL `new` serves where the one at `old` did: recalls, flips, and new queries on an old gallery
    through a map learnt from up to `texts` captions of the training sources.

    Raises RecipeError, StoreError, DataError.
    """
    from ...data.loading.loader import EvaluationSet
    from ...training.evaluate.compatibility import compatibility
    from ...training.evaluate.embed import embed, embed_captions
    from ...training.world import World

    pair = [opened_commit(url) for url in (old, new)]
    recipe = pair[1][1]
    source = data or recipe.evaluation_source
    if not source:
        raise RecipeError(f"the recipe of {clean(pair[1][0].url)} names no data to evaluate on; give some with --data")
    captions = _captions(recipe, texts)
    world, found = World.join(), []
    for commit, of in pair:
        model, size = _model(commit, of).to(world.device), of.eval.batch
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
    urls = {"old": pair[0][0].url, "new": pair[1][0].url}
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


def opened_commit(url: str) -> Opened:
    """A commit and its recipe."""
    from ...training.checkpoint.commits import find_commit

    commit = find_commit(url)
    try:
        return commit, Recipe.model_validate(commit.manifest.recipe)
    except ValidationError as error:  # written by another version
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"the recipe of {clean(commit.url)} cannot be used here: {clean(reason)}") from None


def _model(commit: Commit, recipe: Recipe) -> Model:
    """What a commit evaluates: its weights, or their average if it keeps one."""
    from ...models.model import build

    model = build(commit.manifest.spec, recipe.seed)
    kind = "ema" if recipe.optimizer.ema else "model"
    weights = {name.removeprefix(f"{kind}/"): tensor for name, tensor in commit.tensors(kind).items()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return model
