"""The rooms: which module may import which, read off the source of every import, lazy and typing-only ones too."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("launch", "training", "models", "data")
ALLOWED = {"launch": {"training", "models", "data"}, "training": {"models", "data"}, "models": set(), "data": set()}
MOST = 16  # modules in a folder, beside its __init__


def modules() -> dict[str, Path]:
    """Every product module by its dotted name below the package."""
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(name: str, text: str, is_package: bool, known: set[str]) -> Iterator[str]:
    """The modules of `known` that a module's source imports anywhere in it."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("treering") for alias in node.names), f"{name}: import it relatively"
        if not isinstance(node, ast.ImportFrom) or not node.level:
            assert not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("treering"), name
            continue
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, *((node.module or "").split(".") if node.module else [])])
        for alias in node.names:
            yield from ({f"{base}.{alias.name}"} & known) or ({base} & known)


def graph() -> dict[str, set[str]]:
    found = modules()
    return {
        name: set(imported(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", set(found))) - {name}
        for name, path in found.items()
    }


def test_there_is_no_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if (room := name.split(".")[0]) != (theirs := other.split(".")[0]) and theirs not in ALLOWED[room]
    ]
    assert wrong == []


def test_a_folder_has_one_subject() -> None:
    sizes = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > MOST} == {}


def test_the_walk_sees_every_kind_of_import() -> None:
    """On a source with a plain, a typing-only and a lazy import, of a module and of a name in one."""
    text = (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom . import b\n"
        "if TYPE_CHECKING:\n    from .c import Name\ndef f():\n    from ..other.d import g\n"
    )
    known = {"room.a", "room.b", "room.c", "other.d"}
    assert set(imported("room.a", text, False, known)) == {"room.b", "room.c", "other.d"}
