"""From two specs to the operators that lead from one to the other.

A plan is the difference of two specs: width first, then the joint space and positions, depth last, so that new blocks
are copies of blocks that are wide already. A change that no operator can make is refused here, before anything runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..spec import ModelSpec, SpecError, check_whole_factor

if TYPE_CHECKING:  # the operators need torch, reading a recipe does not
    from .rules import Operator

Copies = Literal["noise", "duplicate"]
"""what new channels, heads and hidden units are: copies told apart by noise, or plain copies, which stay alike"""

STACKS = {
    "image.depth": "image.transformer.blocks",
    "text.depth": "text.transformer.blocks",
    "caption.depth": "captioner.transformer.blocks",
}
GROWS = (
    *(f"{tower}.{size}" for tower in ("image", "text") for size in ("width", "heads", "mlp_ratio")),
    "embed_dim",
    "text.context",
    "image.resolution",
    *STACKS,
)


def changes(old: ModelSpec, new: ModelSpec) -> dict[str, tuple[int | float, int | float]]:
    """Every size that differs, by dotted path: (before, after). Raises SpecError for one that no operator grows."""
    before, after = old.sizes(), new.sizes()
    changed = {path: (before[path], after[path]) for path in before if before[path] != after.get(path)}
    for path, (small, large) in changed.items():
        if path not in GROWS:
            raise SpecError(f"grow: {path} = {large}: it cannot grow from {small} yet; what can: {', '.join(GROWS)}")
        if path.endswith(".width"):
            check_whole_factor(path, int(small), int(large))
    for tower, a, b in (("image", old.image, new.image), ("text", old.text, new.text)):
        size = a.attention_width // a.heads
        if b.attention_width != b.heads * size:
            raise SpecError(
                f"grow: {tower}.heads = {b.heads} at {tower}.width = {b.width} makes heads of "
                f"{b.attention_width // b.heads} channels, and a head keeps its {size}; "
                f"set {tower}.heads: {b.width // size}, or begin with a model that has {tower}.head_dim: {size}"
            )
    return changed


def plan_growth(old: ModelSpec, new: ModelSpec, seed: int = 0, copies: Copies = "noise") -> list[Operator]:
    """The operators from `old` to `new`, in the order they are applied; empty if the specs are equal.

    `seed` is that of every random draw. Raises SpecError for a change that cannot be made.
    """
    changed = changes(old, new)
    if not changed:
        return []
    from .depth import Depth
    from .joint import Joint
    from .positions import Context, Resolution
    from .width import Widen

    operators: list[Operator] = []
    for tower, a, b in (("image", old.image, new.image), ("text", old.text, new.text)):
        head = a.attention_width // a.heads
        axes = (
            ("width", a.width, b.width, 1),
            ("heads", a.heads, b.heads, head),
            ("mlp_width", a.mlp_width, b.mlp_width, 1),
        )
        operators += [Widen(f"{tower}.{axis}", m, n, unit, copies, seed) for axis, m, n, unit in axes if m != n]
    if old.embed_dim != new.embed_dim:
        operators.append(Joint(old.embed_dim, new.embed_dim, seed))
    if old.text.context != new.text.context:
        operators.append(Context(old.text.context, new.text.context))
    if old.image.grid != new.image.grid:
        operators.append(Resolution(old.image.grid, new.image.grid))
    depths = ((path, *changed[path]) for path in STACKS if path in changed)
    return operators + [Depth(path, STACKS[path], int(small), int(large)) for path, small, large in depths]
