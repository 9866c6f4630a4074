"""`treering data batch`: the samples of a global batch, and the rank that reads each."""

from __future__ import annotations

from ..errors import RecipeError
from ..recipe.load import read_recipe


def keys_by_rank(name: str, overrides: list[str], step: int, world: int) -> list[list[str]]:
    """The keys of the samples in global batch `step`, one list per rank of `world` ranks. Raises RecipeError or
    DataError."""
    recipe = read_recipe(name, overrides).recipe
    try:
        recipe.check_world(world)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if step >= recipe.total_steps:
        last = recipe.total_steps - 1
        raise RecipeError(f"--step {step} is beyond the end of the run; its batches are numbered 0 to {last}")
    from ...data.loading.loader import Loader

    spec = recipe.specs()[0]
    loader = Loader(recipe.data, spec.image.resolution, spec.text.context, recipe.seed, mixtures=recipe.mixtures())
    keys = loader.keys(step)
    per_rank = len(keys) // world
    return [keys[rank * per_rank : (rank + 1) * per_rank] for rank in range(world)]
