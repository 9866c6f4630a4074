"""Reads recipes: YAML and overrides in, a checked `Recipe` out, with the origin of every value.

The one idea: overrides change the *tree* that was read, and only the result is checked, so a recipe with overrides is
equivalent to the same recipe written out. A value's origin is the recipe line or the override that set it, or else a
default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import ValidationError

from ...data.storage.credentials import holds_secret
from ...data.units import counted
from ...training.recipe import Recipe
from ..errors import RecipeError as RecipeError
from ..errors import safe_text, show
from .messages import error_messages
from .overrides import apply_override, dotted, parse_override, secret_found
from .yaml_lines import Path, read_yaml, write_scalar, write_yaml

BUNDLED = FilePath(__file__).parents[1] / "recipes"
LARGEST = 1 << 20
_OPEN = "\n  train: []"


@dataclass(frozen=True)
class Origin:
    """Where a value comes from; `line` (from 1) is set for kind recipe only."""

    kind: Literal["default", "recipe", "override"]
    line: int | None = None

    def __str__(self) -> str:
        return f"line {self.line}" if self.kind == "recipe" else self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True)
class ResolvedRecipe:
    """A checked recipe, the file it was read from, and the origin of every value by its dotted path."""

    recipe: Recipe
    file: FilePath
    origins: dict[str, Origin]

    @property
    def text(self) -> str:
        """The recipe with all values, as YAML that reads back equal."""
        return dump_recipe(self.recipe)

    def headline(self) -> str:
        """One comment line: name, stages, samples and steps."""
        recipe = self.recipe
        return (
            f"# {recipe.name}: {counted(len(recipe.stages), 'stage')}, {counted(recipe.total_samples, 'sample')}, "
            f"{counted(recipe.total_steps, 'step')} of {recipe.data.batch}"
        )

    def annotated(self) -> str:
        """The recipe with all values, one per line with its origin as a comment; a valid recipe."""
        lines = list(_lines(self.recipe.model_dump(mode="json"), (), ""))
        width = min(72, max(len(line) for line, _ in lines))
        return "\n".join(
            line if path is None else f"{line:<{width}}  # {self.origins[dotted(path)]}" for line, path in lines
        )


def bundled_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def read_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> ResolvedRecipe:
    """Read a bundled recipe by its name, or any by its path, and apply `key=value` overrides.

    Raises RecipeError, which lists everything that is wrong, on one screen.
    """
    parsed = [parse_override(text) for text in overrides]
    file, text = _open(name_or_path)
    try:
        tree, lines = read_yaml(text)
        if not isinstance(tree, dict):
            what = "is empty" if tree is None else f"holds {show(tree)}"
            raise RecipeError(f"{what}; a recipe has the keys name, data, model, stages; see `treering explain emoji`")
        origins: dict[Path, Origin] = {path: Origin("recipe", line) for path, line in lines.items()}
        for override in parsed:
            _note(origins, apply_override(tree, override), override.value)
        _refuse_secrets(tree, origins)
        recipe = _check(tree, origins)
    except RecipeError as error:
        label = f"the recipe {name_or_path}" if file.parent == BUNDLED else safe_text(str(file))
        raise RecipeError(f"{label}: {error}") from None
    return ResolvedRecipe(recipe, file, _leaf_origins(recipe, tree, origins))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all values, as YAML that reads back equal; a comment says what is left to be filled in."""
    text = write_yaml(recipe.model_dump(mode="json"))
    return text.replace(_OPEN, f'{_OPEN}  # to be filled in: your shards, as in [{{source: "shards/*.tar"}}]', 1)


def left_open(recipe: Recipe) -> list[str]:
    """Overrides for what a recipe leaves to be filled in, with names to be replaced."""
    return [] if recipe.data.train else ["data.train=[{source: YOUR-SHARDS/*.tar}]"]


def _open(name_or_path: str) -> tuple[FilePath, str]:
    """The file of a bundled name or a path, and its text."""
    names = bundled_names()
    file = BUNDLED / f"{name_or_path}.yaml" if name_or_path in names else FilePath(name_or_path)
    remedy = f"give the path of a YAML file, or one of the bundled recipes: {', '.join(names)}"
    try:
        if file.is_dir():
            raise RecipeError(f"{show(name_or_path, 200)} is a folder; {remedy}")
        if not file.exists():
            raise RecipeError(f"the recipe {show(name_or_path, 200)} does not exist; {remedy}")
        if not file.is_file():
            raise RecipeError(f"{show(name_or_path, 200)} is not a regular file; {remedy}")
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(
            f"the recipe {show(name_or_path, 200)} cannot be read ({safe_text(str(reason))}); {remedy}"
        ) from None
    if len(content) > LARGEST:
        raise RecipeError(f"{show(name_or_path, 200)} is larger than 1 MiB, the limit for a recipe; {remedy}")
    try:
        return file, content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecipeError(f"{show(name_or_path, 200)}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def _note(origins: dict[Path, Origin], path: Path, value: Any) -> None:
    """Record that an override set `value` at `path`, replacing the origins below it."""
    for old in [p for p in origins if p[: len(path)] == path]:
        del origins[old]
    for inside in _paths(value, path):
        origins[inside] = Origin("override")


def _paths(value: Any, path: Path) -> Iterator[Path]:
    """The path of `value` and of everything inside it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _refuse_secrets(tree: Any, origins: dict[Path, Origin]) -> None:
    for path in _paths(tree, ()):
        value = tree
        for key in path:
            value = value[key]
        written = (value if isinstance(value, str) else "", str(path[-1]) if path else "")
        if any(holds_secret(text) for text in written):
            raise RecipeError(secret_found(f"{dotted(path)} ({origins.get(path, DEFAULT)})"))


def _check(tree: Any, origins: dict[Path, Origin]) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree)
        recipe.data.check_train()
        recipe.check_tokenizer()
    except ValidationError as error:
        wrong = error_messages(error, tree, {path: str(origin) for path, origin in origins.items()})
        raise RecipeError(wrong if "\n" not in wrong else "cannot run\n  " + wrong.replace("\n", "\n  ")) from None
    except ValueError as error:
        raise RecipeError(safe_text(str(error))) from None
    return recipe


def _leaf_origins(recipe: Recipe, tree: Any, origins: dict[Path, Origin]) -> dict[str, Origin]:
    """The origin of every value of the checked recipe.

    A value may be nested deeper in the recipe than in the tree: `every: 2min` becomes a list of one. Its origin is then
    that of the value it came from; but fields that a block does not set are defaults.
    """
    blocks = {path[:-1] for path in origins if path}

    def origin(path: Path) -> Origin:
        for length in range(len(path), 0, -1):
            if path[:length] in origins:
                is_default = length < len(path) and path[:length] in blocks
                return DEFAULT if is_default else origins[path[:length]]
        return DEFAULT

    dump = recipe.model_dump(mode="json")
    return {dotted(path): origin(path) for _, path in _lines(dump, (), "") if path is not None}


def _lines(value: Any, path: Path, indent: str) -> Iterator[tuple[str, Path | None]]:
    """The lines of `value` in YAML block style, each with the path of the value it ends in, or None."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        head = f"{indent}-" if isinstance(key, int) else f"{indent}{write_scalar(key)}:"
        here = (*path, key)
        if not (isinstance(item, dict | list) and item):
            yield f"{head} {write_scalar(item)}", here
        elif isinstance(key, int):  # the first line of an item follows its dash
            (first, at), *others = _lines(item, here, indent + "  ")
            yield f"{head} {first.lstrip()}", at
            yield from others
        else:
            yield head, None
            yield from _lines(item, here, indent + "  ")
