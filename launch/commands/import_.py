"""`treering import`: writes open_clip weights as a commit, and the recipe that continues their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecipeError, safe_text, show


def import_weights(source: str, to: str, data: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Read `source` into the new run folder `to`, or the URL of a store, and write its recipe.

    Raises RecipeError, InterchangeError, DataError, StoreError.
    """
    from ...models.flops import parameters
    from ...models.interchange.files import open_weights
    from ...models.interchange.open_clip_files import PREFIX
    from ...training.logging.counting import counting, waiting
    from ...training.starting.import_weights import import_commit, notes
    from ..recipe.load import dump_recipe, left_open

    if not source.startswith(PREFIX):
        raise RecipeError(
            f"{show(source, 200)} cannot be imported; write {PREFIX}ARCHITECTURE/TAG, {PREFIX}ARCHITECTURE=FILE or "
            f"{PREFIX}local-dir:FOLDER"
        )
    with waiting(f"reading {safe_text(source)}"):
        weights = open_weights(source)
    remote = "://" in to
    url, recipe = import_commit(weights, to if remote else str(Path(to) / "commits"), data, tokenizer, counting)
    file = Path(f"{recipe.name}-imported.yaml") if remote else Path(to) / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    asked = (
        [] if data else ["the recipe names no data yet: set data.train in it or as in the next line, or give --data"]
    )
    return {
        "source": source,
        "weights": weights.file,
        "commit": url,
        "parameters": parameters(weights.spec),
        "recipe": str(file),
        "continue": ["treering", "train", str(file), "--out", f"runs/{recipe.name}-trained", *left_open(recipe)],
        "notes": [*notes(weights), *asked],
    }
