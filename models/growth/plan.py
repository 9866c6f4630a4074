"""From two specs to the operators that lead from one to the other.

A plan is the difference of two specs: every size that changed is one operator. A change that no operator can make is
refused here, before anything runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..spec import ModelSpec, SpecError

if TYPE_CHECKING:  # the operators need torch, reading a recipe does not
    from .rules import Operator

STACKS = {
    "image.depth": "image.transformer.blocks",
    "text.depth": "text.transformer.blocks",
    "caption.depth": "captioner.transformer.blocks",
}


def changes(old: ModelSpec, new: ModelSpec) -> dict[str, tuple[int | float, int | float]]:
    """Every size that differs, by dotted path: (before, after). Raises SpecError for one that no operator grows."""
    before, after = old.sizes(), new.sizes()
    changed = {path: (before[path], after[path]) for path in before if before[path] != after.get(path)}
    for path, (small, large) in changed.items():
        if path not in STACKS:
            raise SpecError(f"grow: {path} = {large}: it cannot grow from {small} yet; what can: {', '.join(STACKS)}")
    return changed


def plan_growth(old: ModelSpec, new: ModelSpec) -> list[Operator]:
    """The operators from `old` to `new`, in the order they are applied; empty if the specs are equal.

    Raises SpecError for a change that cannot be made.
    """
    changed = changes(old, new)
    if not changed:
        return []
    from .depth import Depth

    return [Depth(path, STACKS[path], int(small), int(large)) for path, (small, large) in changed.items()]
