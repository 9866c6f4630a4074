"""Templates: sentences with a place for the name of a class, for training on labels and for zero-shot prompts.

`{}` (open_clip) or `{c}` (CLIP_benchmark) stands for the class; other braces are plain text, in templates and in names.
"""

from __future__ import annotations

from collections.abc import Sequence


def filled(template: str, name: str) -> str:
    """The template with a class's name in its place."""
    return template.replace("{c}", "{}").replace("{}", name)


def check_templates(templates: Sequence[str], where: str) -> None:
    """Raises ValueError unless every template has a place for the class."""
    if not templates:
        raise ValueError(f"{where} is empty; write one template per line, with {{}} for the class")
    wrong = next((each for each in templates if "{}" not in each and "{c}" not in each), None)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong!r} has no place for the class; write {{}} or {{c}} in it")
