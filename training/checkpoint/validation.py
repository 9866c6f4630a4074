"""Whether a commit is what it says: its name, its counters, its recipe, its spec and its parts must fit together.

Checksums show that bytes are those that somebody wrote, not that they make sense. Everything that reads a commit, its
own run, another run, an evaluation or an export, asks here first, so that nothing after this has to expect a manifest
that contradicts itself. Work is bounded by what the commit really holds: sizes are compared before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf, isfinite, prod

from pydantic import ValidationError

from ...data.units import counted
from ...models.flops import parameters
from ...models.model import empty
from ...models.parts import parts
from ...models.spec import ModelSpec
from ...models.wording import first_mistake
from ..engines.optimizer import MOMENTS
from ..objectives.base import load_states
from ..objectives.terms import build_objectives
from ..recipe import Recipe
from ..run_plan import RunPlan
from ..state import RunState
from .manifest import Commit, Manifest
from .snapshot import commit_name
from .store import StoreError
from .writer import CommitPart

REASONS = ("interval", "growth", "best", "signal", "end", "import")
_KINDS = ("model", *MOMENTS, "ema")
_MOST_BLOCKS = 10_000

Shapes = dict[str, tuple[int, ...]]


def recipe_of(commit: Commit) -> Recipe:
    """The recipe in a commit. Raises StoreError for one that this release cannot use."""
    try:
        return Recipe.model_validate(commit.manifest.recipe)
    except ValidationError as error:
        raise StoreError(
            f"the recipe of {commit.url} cannot be used here ({first_mistake(error)}); use the release that wrote "
            f"it, and the packages that its objectives come from"
        ) from None


def checked(name: str, manifest: Manifest) -> Shapes:
    """The shapes of a commit's parameters by name. Raises ValueError with what does not fit."""
    for problem in _problems(name, manifest):
        raise ValueError(problem)
    return shapes_of(manifest.spec)


def shapes_of(spec: ModelSpec) -> Shapes:
    """Shapes of the parameters of a model, by name; nothing is allocated."""
    return {name: tuple(parameter.shape) for name, parameter in empty(spec).named_parameters()}


def _problems(name: str, manifest: Manifest) -> Iterator[str]:
    """What does not fit, in the order of what later checks rely on."""
    state, spec = manifest.state, manifest.spec
    if commit_name(state.step, state.attempt) != name:
        yield f"it is called {name}, and its state is that of {commit_name(state.step, state.attempt)}"
    if manifest.reason not in REASONS:
        yield f"its reason {manifest.reason[:40]!r} is not one of {', '.join(REASONS)}"
    yield from _counters(state)
    blocks = sum(part.depth for part in parts(spec))
    held = sum(part.bytes for part in manifest.parts if part.kind == "model")
    if blocks > _MOST_BLOCKS or parameters(spec) > held:
        yield f"its spec has {parameters(spec):,} parameters in {blocks:,} blocks, and its weights {held:,} bytes"
    recipe = _recipe(manifest)
    if recipe is not None:
        yield from _of_the_recipe(recipe, manifest)
    shapes = shapes_of(spec)
    wrong = next((n for n, shape in manifest.shapes.items() if shape != shapes.get(n)), None)
    if wrong is not None:
        yield f"it gives {wrong[:80]!r} the shape {str(list(manifest.shapes[wrong]))[:80]}, which its spec does not"
    unknown = next((n for n in state.multipliers if n not in shapes), None)
    if unknown is not None:
        yield f"its model has no parameter {unknown[:80]!r}"
    yield from _of_the_parts(manifest, shapes, recipe)


def _counters(state: RunState) -> Iterator[str]:
    """Counters that cannot be."""
    health = state.health
    for name in ("step", "samples", "stage", "applied", "skipped", "attempt", "flops", "seconds"):
        if not 0 <= getattr(state, name) < inf:
            yield f"state.{name} = {getattr(state, name)}"
    for name, value in (("applied", state.applied), ("skipped", state.skipped), ("healthy_step", health.healthy_step)):
        if not 0 <= value <= state.step:
            yield f"{name} = {value} at step {state.step}"
    if health.bad_steps < 0:
        yield f"state.health.bad_steps = {health.bad_steps}"
    wrong = next((n for n, rate in state.multipliers.items() if not (rate > 0 and isfinite(rate))), None)
    if wrong is not None:
        yield f"state.multipliers has {state.multipliers[wrong]} for {wrong[:80]!r}"
    for event in state.lineage:
        numbers = [event.detail.get(key, 0) for key in _COUNTS.get(event.event, ())]
        if not 0 <= event.step <= state.step or not all(type(number) is int and number >= 0 for number in numbers):
            yield f"its lineage has {event.event[:40]!r} at step {event.step} with {str(numbers)[:60]}"
        if event.event == "rollback" and not {"batches", "times"} <= event.detail.keys():
            yield "its lineage has a rollback that does not say how many batches it skipped"


_COUNTS = {"rollback": ("batches", "times"), "micro_batches": ("stage", "pieces"), "resume": ("attempt",)}
"""numbers in the details of events that a run reads again"""


def _recipe(manifest: Manifest) -> Recipe | None:
    """The recipe, if this release can read it (`recipe_of` and the resume say so where not); the engine may be any."""
    try:
        return Recipe.model_validate({key: value for key, value in manifest.recipe.items() if key != "engine"})
    except ValidationError:
        return None


def _of_the_recipe(recipe: Recipe, manifest: Manifest) -> Iterator[str]:
    """What the recipe contradicts."""
    state, count = manifest.state, len(recipe.stages)
    if state.samples != state.step * recipe.data.batch:
        yield f"it has {counted(state.samples, 'sample')} at step {state.step:,}, and batches of {recipe.data.batch:,}"
    if state.stage >= count or not all(0 <= made.stage < count for made in state.decisions):
        yield f"it is in stage {state.stage} of a recipe of {count} stages, or has decided on one that there is not"
        return
    plan = RunPlan.of(recipe, state.decisions)
    begin, end = (plan.ends[state.stage - 1] if state.stage else 0), plan.ends[state.stage]
    if not begin <= state.step <= end:
        yield f"it is at step {state.step:,} of stage {state.stage}, which goes from {begin:,} to {end:,}"
    if plan.specs[state.stage] != manifest.spec:
        yield f"its model is not that of stage {state.stage} of its recipe"
    objectives = {objective.name: objective for objective in build_objectives(recipe.objectives)}
    unknown = sorted(state.objectives.keys() - objectives)
    if unknown:
        yield f"it has a state of the objective {unknown[0][:80]!r}, which its recipe does not have"
    try:
        load_states(objectives.values(), state.objectives)
    except Exception as error:  # whatever an objective does with a state that is not its own
        yield f"the state of an objective cannot be loaded ({type(error).__name__})"


def _of_the_parts(manifest: Manifest, shapes: Shapes, recipe: Recipe | None) -> Iterator[str]:
    """Parts that do not hold every tensor of the spec exactly once."""
    files = [part.file for part in manifest.parts]
    kinds = {part.kind for part in manifest.parts}
    if len(set(files)) != len(files) or not all(part.file.startswith(f"{part.kind}-") for part in manifest.parts):
        yield "its parts are named twice, or for another kind"
    if unknown := sorted(kinds - set(_KINDS)):
        yield f"it has parts of the unknown kind {unknown[0][:40]!r}"
    needed = {"model"}
    if recipe is not None and (manifest.state.step or kinds != {"model"}):
        needed |= set(recipe.optimizer.kinds)
    if lacking := sorted(needed - kinds):
        yield f"it has no {lacking[0]}"
    for kind in sorted(kinds):
        keeps = [n for n in shapes if recipe is None or recipe.optimizer.keeps(kind, n)]
        some = [part for part in manifest.parts if part.kind == kind]
        ranged, problem = _ranges(some, shapes, manifest.shapes)
        whole = sum(part.tensors - len(part.ranges) for part in some)
        if problem:
            yield f"{kind}: {problem}"
        elif whole + ranged != len(keeps) and (recipe is not None or kind == "model"):
            yield f"its parts hold {whole + ranged} tensors of {kind} instead of {len(keeps)}"


def _ranges(some: list[CommitPart], shapes: Shapes, said: Mapping[str, tuple[int, ...]]) -> tuple[int, str | None]:
    """The number of tensors that parts of one kind hold in ranges, and what is wrong with these."""
    found: dict[str, list[tuple[int, int]]] = {}
    for part in some:
        if part.bytes < 0 or part.tensors < len(part.ranges):
            return 0, f"{part.file} has {part.bytes} bytes and {part.tensors} tensors"
        for name, place in part.ranges.items():
            found.setdefault(name, []).append(place)
    for name, places in found.items():
        if name not in shapes or name not in said:
            return 0, f"{name[:80]!r} is not a parameter of its spec, or has no shape"
        end = 0
        for start, length in sorted(places):
            if start != end or length < 0:
                return 0, f"the ranges of {name} do not follow one another"
            end = start + length
        if end != prod(shapes[name]):
            return 0, f"the ranges of {name} do not cover it"
    return len(found), None
