"""Arguments that several commands share (recipe, overrides, --json), and printing one JSON object."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A bundled recipe by its name, or the path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override values of the recipe: optimizer.lr=3e-4, stages.0.samples=320, model.captioner=null.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(content: Any) -> None:
    """Print `content` as one JSON object, in ASCII."""
    print(json.dumps(content, ensure_ascii=True, indent=1))
