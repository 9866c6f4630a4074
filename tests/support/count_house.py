"""Counts the structure of a checkout: `python -m tests.support.count_house [FOLDER]`.

Prints one figure a line: sizes of folders and functions, imports between modules, circles, imports against
launch -> training -> models, data, and public names that are defined twice.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

ROOMS = {"launch": 3, "training": 2, "models": 1, "data": 1}


def parsed(root: Path) -> dict[str, tuple[Path, ast.Module]]:
    """Every product module by its dotted name below the package."""
    paths = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    names = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: (path, ast.parse(path.read_text(encoding="utf-8"))) for name, path in names.items()}


def arrows(modules: dict[str, tuple[Path, ast.Module]]) -> dict[str, set[str]]:
    """Which modules each imports, anywhere in it."""
    found: dict[str, set[str]] = {}
    for name, (path, tree) in modules.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *((node.module or "").split(".") if node.module else [])])
                for alias in node.names:
                    found[name] |= {f"{base}.{alias.name}"} & modules.keys() or {base} & modules.keys()
        found[name].discard(name)
    return found


def in_circles(graph: dict[str, set[str]]) -> int:
    """Modules that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        rest = list(graph[start])
        while rest:
            if (each := rest.pop()) not in seen:
                seen.add(each)
                rest += graph[each]
        return seen

    return sum(name in reached(name) for name in graph)


def count(root: Path) -> dict[str, float | str]:
    """The figures of a checkout."""
    modules = parsed(root)
    graph = arrows(modules)
    sizes = Counter(path.parent for path, _ in modules.values() if path.name != "__init__.py")
    folder, most = sizes.most_common(1)[0]
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for _, tree in modules.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    homes: dict[str, set[str]] = defaultdict(set)
    for name, (_, tree) in modules.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(name)
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, (path, _) in modules.items()}
    code = sum(
        len({n for node in ast.walk(tree) if isinstance(node, ast.stmt) for n in (node.lineno,)})
        for _, tree in modules.values()
    )
    return {
        "modules": len(modules),
        "largest folder": f"{folder.relative_to(root)} ({most})",
        "arrows": sum(map(len, graph.values())),
        "modules in circles": in_circles(graph),
        "arrows against the order": sum(
            ROOMS[a] <= ROOMS[b]
            for name, others in graph.items()
            for other in others
            if (a := name.split(".")[0]) != (b := other.split(".")[0])
        ),
        "functions": len(lengths),
        "functions over 60 lines": sum(length > 60 for length in lengths),
        "median function": median(lengths),
        "longest function": max(lengths),
        "class names that mean two things": sum(len(where) > 1 for where in homes.values()),
        "lines": sum(lines.values()),
        "statements": code,
        "largest file": max(lines.values()),
    }


if __name__ == "__main__":
    for figure, value in count(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()).items():
        print(f"{figure:34} {value}")
