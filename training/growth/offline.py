"""Grows a commit without its run: from one store to another, tensor by tensor.

The result is the commit that the run would have written if its recipe had contained the growth. The recipe in its
manifest has the growth as a stage, so training continues from it with that recipe, and the lineage names the source.
Of weights that no run has trained yet the recipe has the grown model, and a run begins with them.
At most one part of the old commit and one of the new are in memory at a time; a part is at most 64 MiB, or one tensor.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ...data.shards.parallel import Progress, silent
from ...models.flops import parameters
from ...models.growth.operator import GrownState, source_of
from ...models.growth.plan import changes
from ...models.spec import ModelSpec, SpecError
from ...models.wording import first_mistake
from ..checkpoint.commits import Commits, find_commit
from ..checkpoint.config import InitFromConfig
from ..checkpoint.manifest import Commit, Manifest
from ..checkpoint.serialize import SerializedPart
from ..checkpoint.snapshot import commit_name
from ..checkpoint.store import Store, StoreError
from ..checkpoint.validation import recipe_of
from ..checkpoint.writer import PART_BYTES, CommitPart
from ..health.divergence import Health
from ..logging.counting import Counting, no_counting
from ..recipe import Recipe
from ..stages import GrowthConfig, StageConfig, faded
from ..state import Event, RunState
from .grow import described, grown_rates, planned, tensor_shapes

_GROWTH = {"grow", "shrink", *GrowthConfig.model_fields}
"""fields of a stage that say how the model is resized before it"""


@dataclass(frozen=True)
class GrownCommit:
    """The result of growing a commit."""

    url: str
    recipe: Recipe
    """the recipe with which training continues"""
    event: dict[str, Any]
    """the record of the growth in the lineage"""


def grow_commit(
    source: str, stage: dict[str, Any], out: str, samples: int | None = None, counting: Counting = no_counting
) -> GrownCommit:
    """Grow the commit at URL `source` (or the newest one of a run) into a new store at URL `out`.

    `stage` has fields of a `StageConfig`: `grow`, `shrink` and their options. With `samples` it becomes the run's last
    stage, of that length; without, it takes the remaining samples of the commit's stage. For a commit of imported
    weights (step 0) it becomes the first stage. `counting` shows the progress. Raises SpecError if the growth is not
    possible, StoreError if the new store has commits already or cannot be used.
    """
    begun = time.monotonic()
    commit = find_commit(source)
    state = commit.manifest.state
    before = recipe_of(commit).settled(state.decisions)
    recipe, number = with_stage(before, state, stage, samples)
    old, new = commit.manifest.spec, recipe.specs()[number]
    if old == new:
        raise SpecError(f"{commit.url} has these sizes already; name a size that changes")
    how = recipe.stages[number]
    if not state.step:
        recipe = _untrained(recipe, new)
    with counting(f"{commit.name}: parts read") as progress:
        old_state = OldState(commit, in_turn=how.inherit == "ema", progress=progress)
    operators = planned(old, new, recipe.seed, how, lambda kind, name: old_state[f"{kind}/{name}"])
    # In the order of the old parts, so that each part is read once.
    names = sorted(tensor_shapes(new), key=lambda name: (old_state.part_number(source_of(operators, name)), name))
    fade = faded(before.stages, state.stage, state.samples, before.data.batch)
    rates = grown_rates(operators, state.multipliers, fade, old, new, recipe.optimizer)
    commits = _empty_store(out)
    attempt = commits.claim_attempt(f"grown from {commit.url}")
    name = commit_name(state.step, attempt)
    kept = [f"{k}/{n}" for k in old_state.kinds for n in names if recipe.optimizer.keeps(k, n)]
    with counting(f"{name}: tensors grown") as progress:
        parts = tuple(_written(commits.store, name, GrownState(operators, old_state, kept), progress))
    detail = _sizes(old, new) | {
        "operators": described(operators),
        "logit_difference": None,
        "seconds": time.monotonic() - begun,
        "source": commit.url,
        "seed": recipe.seed,
        "multipliers": len(rates),
    }
    following = state.model_copy(
        update={
            "stage": number,
            "attempt": attempt,
            "multipliers": rates,
            "window": (),
            "trials": (),
            "health": Health(healthy_step=state.step),
            "applied": 0 if how.moments == "reset" else state.applied,
            "lineage": (*state.lineage, Event(event="grow", step=state.step, samples=state.samples, detail=detail)),
        }
    )
    written, run = recipe.model_dump(mode="json"), commits.run or ""
    commits.seal(name, Manifest(spec=new, state=following, recipe=written, reason="growth", parts=parts, run=run))
    url = f"{commits.store.url}/{name}"
    # A commit at step 0 belongs to no run, so nothing can be resumed: start from its weights instead.
    start = {} if state.step else {"init_from": InitFromConfig(commit=url)}
    return GrownCommit(url, recipe.model_copy(update=start), detail)


def _sizes(old: ModelSpec, new: ModelSpec) -> dict[str, Any]:
    """What a growth changes of a spec, for the lineage."""
    changed = changes(old, new)
    return {
        "from": {path: sizes[0] for path, sizes in changed.items()},
        "to": {path: sizes[1] for path, sizes in changed.items()},
        "parameters_before": parameters(old),
        "parameters_after": parameters(new),
    }


def _empty_store(url: str) -> Commits:
    commits = Commits(Store(url))
    if commits.names():
        raise StoreError(f"{url} has commits already; give an empty folder or prefix")
    return commits


def _untrained(recipe: Recipe, spec: ModelSpec) -> Recipe:
    """The recipe of weights that were grown before any training: simply that of the grown model."""
    fields = recipe.stages[0].model_dump(mode="json")
    begins = StageConfig.model_validate({key: value for key, value in fields.items() if key not in _GROWTH})
    return recipe.model_copy(update={"model": spec, "stages": (begins, *recipe.stages[1:])})


def with_stage(recipe: Recipe, state: RunState, stage: dict[str, Any], samples: int | None) -> tuple[Recipe, int]:
    """The recipe with its current stage ended at `state` and a new stage after it, and the number of the new stage.

    Without `samples` the new stage takes the remaining samples of the current one, and later stages follow. With
    `samples` it is the last stage. A new captioner adds its objective; a modality tower also adds its data column.
    """
    batch, now = recipe.data.batch, recipe.stages[state.stage]
    if not state.step:
        first = {**now.model_dump(mode="json"), **stage} | ({"samples": samples} if samples else {})
        return _with_stages(recipe, [first, *recipe.model_dump(mode="json")["stages"][1:]], first), 0
    done = state.samples - batch * sum(s.steps(batch) for s in recipe.stages[: state.stage])
    left = batch * now.steps(batch) - done
    if not done:
        raise SpecError("this commit has not trained since it grew; grow the commit before it to all sizes at once")
    if not (samples or left):
        raise SpecError(
            f"this commit is at the end of its stage; give the length of the next one: samples={now.samples}"
        )
    following = {"samples": samples or left, **stage}
    stages = recipe.model_dump(mode="json")["stages"]
    later = [] if samples else stages[state.stage + 1 :]
    stages = [*stages[: state.stage], {**stages[state.stage], "samples": done}, following, *later]
    return _with_stages(recipe, stages, following), state.stage + 1


def _with_stages(recipe: Recipe, stages: list[dict[str, Any]], new: dict[str, Any]) -> Recipe:
    """The recipe with `stages`, of which `new` is the added one. Raises SpecError if they are not valid."""
    tree = recipe.model_dump(mode="json") | {"stages": stages}
    try:
        StageConfig.model_validate(new)
        spec = recipe.model
        for stage in stages:
            spec = StageConfig.model_validate(stage).resized(spec)
        _complete(tree, spec)
        _outlasts_warmup(recipe, stages, new)
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise SpecError(first_mistake(error)) from None


def _outlasts_warmup(recipe: Recipe, stages: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Raises SpecError if the run would end while its learning rate still rises."""
    batch, warmup = recipe.data.batch, recipe.schedule.warmup
    its, total = (sum(-(-stage["samples"] // batch) * batch for stage in some) for some in ([new], stages))
    if total <= warmup:
        raise SpecError(
            f"samples = {new['samples']} ends the run before its schedule.warmup = {warmup} does; give "
            f"samples={warmup + 1 - (total - its)} or more, or leave it out and set both in the recipe that is written"
        )


def _complete(tree: dict[str, Any], spec: ModelSpec) -> None:
    """Add to the recipe `tree`, in place, what the parts of the last stage's `spec` need.

    A captioner needs its objective; a modality tower its data column and, if no term reads it, a contrastive term with
    the text. Terms for parts that `spec` does not have are removed.
    """
    objectives, towers = tree["objectives"], set(spec.modalities)
    objectives["caption"] = (objectives.get("caption") or {}) if spec.captioner else None
    known = towers | {"image", "text"}
    terms = [term for term in objectives.get("modalities", []) if known.issuperset(term["between"])]
    trained = {name for term in terms for name in term["between"]}
    objectives["modalities"] = terms + [{"between": [name, "text"]} for name in sorted(towers - trained)]
    tree["data"]["columns"] |= dict.fromkeys(towers, "npy")


class OldState(Mapping[str, Tensor]):
    """The tensors of a commit by `kind/name`, read and verified one part at a time; one part is kept in memory."""

    def __init__(self, commit: Commit, in_turn: bool = False, progress: Progress = silent) -> None:
        """`in_turn`: two kinds will be read alternately, so the previous part is kept as well. `progress(done, total)`
        counts the parts, each of which is looked at."""
        self._commit, self._in_turn = commit, in_turn
        self._part: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        self._parts: dict[str, int] = {}
        for number in range(len(commit.manifest.parts)):
            self._parts.update(dict.fromkeys(self._load(number), number))
            progress(number + 1, len(commit.manifest.parts))

    def _load(self, number: int) -> Iterable[str]:
        part = self._commit.manifest.parts[number]
        self._part = {}  # release it before reading the next one
        found = {f"{part.kind}/{name}": tensor for name, tensor in self._commit.pieces(part).items()}
        if part.ranges:
            # An engine that shards its state writes flat ranges: read all tensors of the kind at once.
            found = self._commit.tensors(part.kind)
        self._part = found
        return found

    @property
    def kinds(self) -> list[str]:
        """The kinds of state in the commit: weights, moments."""
        return list(dict.fromkeys(part.kind for part in self._commit.manifest.parts))

    def part_number(self, name: str) -> int:
        """Number of the part that holds the weight `name`."""
        return self._parts[f"model/{name}"]

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._part and self._in_turn:
            self._part, self._before = self._before, self._part
        if path not in self._part:
            self._load(self._parts[path])
        return self._part[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _written(store: Store, name: str, state: Mapping[str, Tensor], progress: Progress = silent) -> Iterator[CommitPart]:
    """Write the tensors in order, in parts of one kind each, and yield the parts' manifest entries; `progress(done,
    total)` counts tensors."""
    chunk: dict[str, Tensor] = {}
    kind, size, number = "", 0, 0
    for done, path in enumerate(state):
        progress(done, len(state))
        other, _, tensor_name = path.partition("/")
        tensor = state[path].clone(memory_format=torch.contiguous_format)  # operators may return views
        if chunk and (other != kind or size + tensor.nbytes > PART_BYTES):
            yield _put(store, name, kind, number, chunk)
            number = number + 1 if other == kind else 0
            chunk, size = {}, 0
        kind, size = other, size + tensor.nbytes
        chunk[tensor_name] = tensor
    if chunk:
        yield _put(store, name, kind, number, chunk)


def _put(store: Store, name: str, kind: str, number: int, chunk: dict[str, Tensor]) -> CommitPart:
    data = SerializedPart(chunk).data()
    file = f"{kind}-00000-{number:05d}.safetensors"
    store.put(f"{name}/{file}", data)
    return CommitPart(
        file=file, kind=kind, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors=len(chunk)
    )
