"""`treering eval`: any commit, on any shards, without the run that made it."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from ..training.evaluate.config import EvalConfig, SuiteName
from ..training.recipe import Recipe
from .errors import RecipeError, clean, show


def evaluate_commit(url: str, suites: list[str] | None, data: str | None) -> dict[str, Any]:
    """Scores of the commit at `url` (or of the newest one of a run folder), with chance levels and sizes.

    What is not given comes from the commit's own recipe. Raises RecipeError, StoreError, DataError.
    """
    known = get_args(SuiteName)
    for suite in suites or ():
        if suite not in known:
            raise RecipeError(f"there is no suite {show(suite)}; there are {', '.join(known)}")
    from ..models.model import build
    from ..training.commits import find_commit
    from ..training.evaluate.suites import evaluate
    from ..training.world import World

    commit = find_commit(url)
    try:
        recipe = Recipe.model_validate(commit.manifest.recipe)
    except ValidationError as error:  # written by another version
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"the recipe of {clean(commit.url)} cannot be used here: {clean(reason)}") from None
    config = EvalConfig.model_validate(
        recipe.eval.model_dump() | {"suites": suites or recipe.eval.suites, "examples": 0}
    )
    if not config.suites:
        raise RecipeError(
            f"the recipe of {clean(commit.url)} names no suites; give some, as in --suite {','.join(known)}"
        )
    model = build(commit.manifest.spec, recipe.seed)
    kind = "ema" if recipe.optimizer.ema else "model"
    weights = {name.removeprefix(f"{kind}/"): tensor for name, tensor in commit.tensors(kind).items()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    world = World.join()
    source = data or recipe.evaluation_source
    found = evaluate(model.to(world.device), config, source, world, recipe.data.cache, recipe.data.tokenizer)
    step, samples = commit.manifest.state.step, commit.manifest.state.samples
    return {
        "commit": commit.url,
        "step": step,
        "samples": samples,
        "data": source,
        "scores": found.scores,
        "chance": found.chance,
        "sizes": found.sizes,
    }
