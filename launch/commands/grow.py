"""`treering grow`: grows a commit offline, and writes the recipe that continues its training."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from ..errors import RecipeError, show
from ..recipe.overrides import parse_override


def grow_offline(commit: str, to: list[str], shrink: list[str], options: list[str], out: str) -> dict[str, Any]:
    """Grow `commit` to the sizes `to` (and `shrink`), each `path=size`, into `out`, and write its recipe.

    `out` is a new run folder, or the URL of a store. `options` are `key=value` of a stage: samples, width_init,
    depth_init and so on. Raises RecipeError, SpecError, StoreError.
    """
    from ...training.growth.offline import grow_commit
    from ...training.logging.counting import counting
    from ...training.stages import GrowthConfig
    from ..recipe.load import dump_recipe, left_open

    if not to and not shrink:
        raise RecipeError("nothing to grow; say what, as in --to image.depth=12")
    chosen = dict(_values(options))
    known = ("samples", *GrowthConfig.model_fields)
    for key in chosen:
        if key not in known:
            raise RecipeError(f"{show(key)} is not an option of growth; known are {', '.join(known)}")
    samples = chosen.pop("samples", None)
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise RecipeError(f"samples = {show(samples)} is not a valid budget; give a whole number, as in samples=40000")
    stage = {"grow": dict(_values(to)), "shrink": dict(_values(shrink)), **chosen}
    remote = "://" in out
    grown = grow_commit(commit, stage, out if remote else str(Path(out) / "commits"), samples, counting)
    recipe = grown.recipe.model_copy(
        update={"checkpoint": grown.recipe.checkpoint.model_copy(update={"to": out if remote else None})}
    )
    file = Path(f"{_last(out)}.yaml") if remote else Path(out) / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    folder = ["--out", f"runs/{_last(out)}-trained"] if recipe.init_from else [] if remote else ["--out", out]
    return {
        "commit": grown.url,
        "recipe": str(file),
        "continue": ["treering", "train", str(file), *folder, *left_open(recipe)],
    } | {key: grown.event[key] for key in ("from", "to", "operators", "parameters_before", "parameters_after")}


def _last(out: str) -> str:
    """The name of the last folder of a path or URL."""
    return PurePath(out if "://" in out else Path(out).resolve()).name or "grown"


def _values(texts: list[str]) -> list[tuple[str, Any]]:
    """Parse texts of one or more comma-separated `path=value`."""
    parts = [part for text in texts for part in _split(text)]
    return [tuple(parse_override(part)) for part in parts]


def _split(text: str) -> list[str]:
    """Split at the commas before another `key=`; commas inside a value stay."""
    parts: list[str] = []
    for piece in text.split(","):
        if parts and "=" not in piece:
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts
