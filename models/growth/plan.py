"""From two specs to the operators that lead from one to the other.

A plan is the difference of two specs: width first, then the joint space, positions and tables, depth last, so that new
blocks are copies of blocks that are wide already. A change that no operator can make is refused here, before anything
runs. An operator that does not keep the function says so (`preserves`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..parts import parts
from ..spec import ModelSpec, SpecError, TowerSpec
from .depth import Depth, Drop, kept_blocks
from .embed_dim import GrowEmbedDim, TruncateEmbedDim
from .experts import MoreExperts, Upcycle
from .heads import HeadDim
from .inherit import Inherit, InheritAverage
from .new_captioner import NewCaptioner
from .new_part import NewPart
from .operator import Operator, Read
from .options import DepthInit, DropBlocks, InheritFrom, WidthInit
from .patch import Patch
from .positions import Context, Resolution
from .vocabulary import Vocabulary
from .width import Truncate, Widen

_ONLY_GROWS = ("text.vocabulary",)


def changes(old: ModelSpec, new: ModelSpec) -> dict[str, tuple[int | float, int | float]]:
    """Every size that differs, by dotted path: (before, after), 0 for a part that is new.

    Raises SpecError for a difference that no operator can make.
    """
    before, after = old.sizes(), new.sizes()
    for tower, a, b in _both(old, new):
        before[f"{tower}.head_dim"], after[f"{tower}.head_dim"] = a.head_width, b.head_width
        if b.head_width < a.head_width:
            raise SpecError(
                f"{tower}.heads = {b.heads} at {tower}.width = {b.width} makes heads of {b.head_width} "
                f"channels, and a head keeps its {a.head_width}; set {tower}.heads: {b.width // a.head_width}, "
                f"or begin with a model that has {tower}.head_dim: {a.head_width}"
            )
    _check_samples(old, new)
    gone = {part.name for part in parts(old)} - {part.name for part in parts(new)}
    if gone:
        raise SpecError(f"shrink: {', '.join(sorted(gone))} is missing, and no part can be removed; give its sizes")
    paths = [*before, *(path for path in after if path not in before)]
    changed = {p: (before.get(p, 0), after.get(p, 0)) for p in paths if before.get(p, 0) != after.get(p, 0)}
    for tower, a, b in _both(old, new):
        if a.experts > b.experts or (a.experts > 1 and a.experts_per_token > b.experts_per_token):
            raise SpecError(
                f"shrink: {tower}.experts = {b.experts} with experts_per_token = {b.experts_per_token}: "
                f"a mixture only grows; leave it at {a.experts} with experts_per_token = {a.experts_per_token}, or more"
            )
    for path in _ONLY_GROWS:
        if path in changed and changed[path][1] < changed[path][0]:
            raise SpecError(f"shrink: {path} = {changed[path][1]}: it only grows; leave it at {changed[path][0]}")
    if "embed_dim" in changed and old.image.pool == "attention":
        raise SpecError(
            f"grow: embed_dim = {new.embed_dim}: it is also the width of the attention pooler, whose norms "
            f"would change the function; leave it at {old.embed_dim}"
        )
    if "text.context" in changed and old.text.padded:
        raise SpecError(
            f"grow: text.context = {new.text.context}: this text tower pads every text to the context and attends to "
            f"the padding, so its function would change; leave it at {old.text.context}"
        )
    if "image.patch" in changed and new.image.grid < old.image.grid and new.image.resolution >= old.image.resolution:
        raise SpecError(
            f"grow: image.patch = {new.image.patch} leaves {new.image.grid} patches a side of {old.image.grid}; "
            f"set image.resolution: {old.image.grid * new.image.patch} with it"
        )
    return changed


def _check_samples(old: ModelSpec, new: ModelSpec) -> None:
    """Raise SpecError if a tower of another modality would have to read samples of another shape."""
    for name, a in old.modalities.items():
        b = new.modalities.get(name, a)
        if (a.frames, a.features) != (b.frames, b.features):
            raise SpecError(
                f"modalities.{name} with frames = {b.frames} and features = {b.features} does not fit the samples "
                f"of its data column, which do not change; leave them at {a.frames} and {a.features}"
            )


def _both(old: ModelSpec, new: ModelSpec) -> list[tuple[str, TowerSpec, TowerSpec]]:
    """The towers that both specs have: path of their sizes, before and after."""
    after = new.towers()
    return [(name, a, after[name]) for name, a in old.towers().items() if name in after]


def check_tokens(old: ModelSpec, new: ModelSpec, token_init: Sequence[Sequence[int]]) -> None:
    """Raise SpecError unless `token_init` has for each new row of the token table the old rows it is the mean of."""
    more = new.text.vocabulary - old.text.vocabulary
    if token_init and len(token_init) != more:
        raise SpecError(
            f"token_init has {len(token_init)} entries for {more} new rows of text.vocabulary; "
            f"give one list of ids for each, or leave token_init out"
        )
    if not all(ids and all(0 <= i < old.text.vocabulary for i in ids) for ids in token_init):
        raise SpecError(
            f"token_init has a list that is empty or names an id that is not below {old.text.vocabulary}; "
            f"each new row is the mean of some old ones"
        )


def plan_growth(
    old: ModelSpec,
    new: ModelSpec,
    seed: int = 0,
    width_init: WidthInit = "noise",
    depth_init: DepthInit = "zero",
    token_init: Sequence[Sequence[int]] = (),
    drop_blocks: DropBlocks = "last",
    inherit: InheritFrom = 1.0,
    read: Read | None = None,
) -> list[Operator]:
    """The operators from `old` to `new`, in the order they are applied; empty if the specs are equal.

    `seed` is that of every random draw. `token_init` has for each new row of the token table the rows it is the mean
    of, `inherit` is the fraction of the inherited weights, or `ema` to take new entries from the running average, and
    `read` reads the old model for `drop_blocks: smallest`. Raises SpecError for a change that cannot be made.
    """
    changed = changes(old, new)
    check_tokens(old, new, token_init)
    if not changed:
        return []
    operators: list[Operator] = _units(old, new, width_init, seed)
    if new.embed_dim > old.embed_dim:
        operators.append(GrowEmbedDim(old.embed_dim, new.embed_dim, seed))
    elif new.embed_dim < old.embed_dim:
        operators.append(TruncateEmbedDim(old.embed_dim, new.embed_dim))
    if old.text.context != new.text.context:
        operators.append(Context(old.text.context, new.text.context))
    if old.image.grid != new.image.grid:
        operators.append(Resolution(old.image.grid, new.image.grid))
    if old.image.patch != new.image.patch:
        operators.append(Patch(old.image.patch, new.image.patch))
    if old.text.vocabulary != new.text.vocabulary:
        operators.append(Vocabulary(old.text.vocabulary, new.text.vocabulary, tuple(map(tuple, token_init))))
    operators += _blocks(old, new, depth_init, drop_blocks, read)
    operators += _new_parts(old, new, seed)
    if inherit == "ema":
        operators.append(InheritAverage(old, new, tuple(each for each in operators if isinstance(each, Depth))))
    elif inherit != 1.0:
        operators.append(Inherit(old, new, inherit, seed))
    return operators


def _units(old: ModelSpec, new: ModelSpec, width_init: WidthInit, seed: int) -> list[Operator]:
    """Channels, heads, hidden units and experts of all towers."""
    operators: list[Operator] = []
    for tower, a, b in _both(old, new):
        axes = (
            ("width", a.width, b.width, 1),
            ("heads", a.heads, b.heads, a.head_width),
            ("mlp_width", a.mlp_width, b.mlp_width, 1),
        )
        operators += [Widen(f"{tower}.{axis}", m, n, unit, width_init, seed, new) for axis, m, n, unit in axes if m < n]
        operators += [Truncate(f"{tower}.{axis}", m, n, unit, new) for axis, m, n, unit in axes if m > n]
        if b.experts > a.experts == 1:
            operators.append(Upcycle(tower, b.experts, b.width, seed))
        elif a.experts > 1 and (a.experts, a.experts_per_token) != (b.experts, b.experts_per_token):
            operators.append(
                MoreExperts(tower, a.experts, b.experts, (a.experts_per_token, b.experts_per_token), width_init, seed)
            )
        if b.head_width > a.head_width:
            operators.append(HeadDim(f"{tower}.heads", a.head_width, b.head_width, b.heads, width_init, seed, new))
    return operators


def _blocks(
    old: ModelSpec, new: ModelSpec, depth_init: DepthInit, drop_blocks: DropBlocks, read: Read | None
) -> list[Operator]:
    """Depths of the parts that both models have."""
    after = {part.name: part for part in parts(new)}
    operators: list[Operator] = []
    for part in parts(old):
        field, small, large = f"{part.name}.depth", part.depth, after[part.name].depth
        if small < large:
            operators.append(Depth(field, part.stack, small, large, depth_init))
        elif small > large:
            kept = kept_blocks(part.stack, small, large, drop_blocks, part.tower.experts, read)
            operators.append(Drop(field, part.stack, small, tuple(kept)))
    return operators


def _new_parts(old: ModelSpec, new: ModelSpec, seed: int) -> list[Operator]:
    """Parts that only the new model has."""
    there = {part.name for part in parts(old)}
    added = [part.name for part in parts(new) if part.name not in there]
    return [NewCaptioner(new, seed) if name == "captioner" else NewPart(new, name, seed) for name in added]
