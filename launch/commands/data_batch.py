"""`treering data batch`: which samples are in a global batch, and who reads them."""

from __future__ import annotations

from ..errors import RecipeError
from ..recipe.load import read_recipe


def keys_by_rank(name: str, overrides: list[str], step: int, world: int) -> list[list[str]]:
    """The keys of global batch `step`, a list for each of `world` ranks. Raises RecipeError or DataError."""
    recipe = read_recipe(name, overrides).recipe
    try:
        recipe.check_world(world)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if step >= recipe.total_steps:
        last = recipe.total_steps - 1
        raise RecipeError(f"--step {step} is after the run's end; its batches have the numbers 0 to {last}")
    from ...data.loading.loader import Loader

    spec = recipe.specs()[0]
    loader = Loader(recipe.data, spec.image.resolution, spec.text.context, recipe.seed, mixtures=recipe.mixtures())
    keys = loader.keys(step)
    share = len(keys) // world
    return [keys[rank * share : (rank + 1) * share] for rank in range(world)]
