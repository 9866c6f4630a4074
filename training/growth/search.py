"""Which sizes to grow to: short trials of candidates from the current state, on the newest data.

After GrowCLIP (Deng et al., ICCV 2023), whose code is not public, with the selection rule of AutoProg (Li et al., CVPR
2022): over all candidates the loss l is fitted as a power T^-w of the FLOPs per sample T, and the candidate with the
smallest l T^w wins, the one furthest below the loss expected at its cost. The current size is a candidate too. Each
candidate grows from the current state and trains on the same samples at the current learning rate. Its loss is the mean
over the second half of the samples, each batch scored before it is trained on. Only the record of the trials remains. A
finished trial belongs to the state of the run, which may commit and stop after each: a resumed run makes the others,
and chooses as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from math import exp, fsum, inf, isfinite, log
from typing import Any

from ...data.loading.loader import Loader
from ...data.order import stable_hash
from ...data.samples.sample import Batch
from ...data.shards.parallel import Progress
from ...models.flops import training_flops
from ...models.spec import ModelSpec, SpecError
from ..engines.base import Engine
from ..logging.counting import Counting, no_counting
from ..objectives.base import Inputs
from ..recipe import Recipe
from ..stages import GrowthConfig, faded
from ..state import Decision, RunState, Trial
from ..tally import Tally
from .grow import enlarged


@dataclass(frozen=True)
class Choice:
    """All trials and the winner."""

    trials: tuple[Trial, ...]
    scores: tuple[float, ...]
    """loss x (FLOPs per sample)^exponent of each trial; smaller is better"""
    exponent: float
    chosen: int
    """index of the winner"""

    @property
    def sizes(self) -> dict[str, int | float]:
        """The sizes of the winner."""
        return self.trials[self.chosen].sizes

    @property
    def spent(self) -> float:
        """FLOPs of all trials."""
        return fsum(trial.spent for trial in self.trials)

    def json(self) -> dict[str, Any]:
        """The record for metrics.jsonl and the lineage."""
        scored = zip(self.trials, self.scores, strict=True)
        rows = [
            trial.model_dump(exclude={"steps"}) | {"score": score if isfinite(score) else None}
            for trial, score in scored
        ]
        return {"candidates": rows, "chosen": self.sizes, "exponent": self.exponent, "flops": self.spent}


def search(
    engine: Engine,
    build: Callable[[ModelSpec], Engine],
    recipe: Recipe,
    state: RunState,
    stage: int,
    feed: Callable[[Batch, int, float, int], Inputs],
    alive: Callable[[], None],
    goes_on: Callable[[Trial], bool],
    counting: Counting = no_counting,
) -> Choice | None:
    """Try all candidates of `stage`, grown from `engine` at its position in the run. All ranks call it together.

    `feed` makes inputs of a batch, the samples before it, and what a candidate sees of its patches in that stage.
    Trials in `state` are not repeated. `alive` is called before every step. `goes_on` is given each new trial and
    says whether to go on; None is returned if not. `counting` shows the progress.
    """
    plan, world = recipe.settled(state.decisions), engine.world
    how, size = plan.stages[stage], plan.data.batch
    assert how.search
    steps = max(2, -(-how.search.samples // size))
    fade = faded(plan.stages, state.stage, state.samples, size)
    lr = plan.optimizer.lr * plan.schedule.factor(state.samples, size, plan.total_samples)
    seed, newest = stable_hash("search", plan.seed, stage), [plan.newest(stage)]
    trials = []
    for sizes, spec in how.candidates(engine.model.spec):
        if not _allows_later_stages(recipe, (*state.decisions, Decision(stage=stage, grow=sizes))):
            continue
        if made := [trial for trial in state.trials if trial.sizes == sizes and trial.steps == steps]:
            trials.append(made[0])
            continue
        alive()
        resolution, context = spec.image.resolution, how.longest(spec)
        loader = Loader(plan.data, resolution, context, seed, world.rank, world.size, newest)
        tried = ", ".join(f"{path} {value}" for path, value in sizes.items()) or "no growth"
        with closing(loader.batches(0)) as batches, counting(f"trial of {tried}: steps") as progress:
            numbered = zip(count(state.samples, size), _watched(islice(batches, steps), steps, alive, progress))
            inputs = (feed(batch, samples, how.patch_keep, spec.image.grid**2) for samples, batch in numbered)
            trials.append(run_trial(engine, build, (sizes, spec), inputs, size, lr, plan.seed, how, fade))
        if not goes_on(trials[-1]):
            return None
    return choose(trials)


def _watched(batches: Iterator[Batch], total: int, alive: Callable[[], None], progress: Progress) -> Iterator[Batch]:
    """The batches, with a sign of life before each is read and before it is trained on; `progress(done, total)` counts
    them."""
    for done, batch in enumerate(batches, 1):
        alive()
        yield batch
        progress(done, total)
        alive()


def _allows_later_stages(recipe: Recipe, decisions: Sequence[Decision]) -> bool:
    """Whether the recipe's later stages are still possible after `decisions`."""
    try:
        recipe.settled(decisions).specs()
    except SpecError:
        return False
    return True


def run_trial(
    engine: Engine,
    build: Callable[[ModelSpec], Engine],
    candidate: tuple[dict[str, int | float], ModelSpec],
    batches: Iterable[Inputs],
    size: int,
    lr: float,
    seed: int,
    how: GrowthConfig,
    fade: float,
) -> Trial:
    """Train a candidate grown from `engine` on `batches` (global batches of `size` pairs); `engine` is not changed."""
    sizes, spec = candidate
    larger, _ = enlarged(engine, build, spec, seed, how, fade)
    tally = Tally(engine.world)
    patches = None
    for inputs in batches:
        patches = None if inputs.patches is None else inputs.patches.shape[1]
        tally.add(larger.step(inputs, lr), {o.name: o.weight for o in larger.objectives}, len(inputs.tokens))
    parameters = larger.parameters
    larger.close()
    steps = tally.take()
    spent = [size * training_flops(spec, step.tokens / size, patches) for step in steps]
    scored = [step.loss for step in steps[len(steps) // 2 :]]
    return Trial(
        sizes=sizes,
        parameters=parameters,
        flops_per_sample=fsum(spent) / (size * len(spent)),
        loss=fsum(scored) / len(scored) if all(map(isfinite, scored)) else None,
        spent=fsum(spent),
        steps=len(steps),
    )


def choose(trials: Sequence[Trial]) -> Choice:
    """The best trial. With fewer than three different costs, or a loss of 0 or below, which a power never has, nothing
    can be fitted, and the lowest loss wins."""
    known = [(trial.flops_per_sample, trial.loss) for trial in trials if trial.loss is not None]
    exponent = 0.0
    if len({cost for cost, _ in known}) >= 3 and all(loss > 0 for _, loss in known):
        costs, losses = [log(cost) for cost, _ in known], [log(loss) for _, loss in known]
        mean, centre = fsum(losses) / len(known), fsum(costs) / len(known)
        rise = fsum((x - centre) * (y - mean) for x, y in zip(costs, losses, strict=True))
        exponent = max(0.0, -rise / fsum((x - centre) ** 2 for x in costs))
    scores = [
        inf if trial.loss is None else trial.loss * exp(exponent * log(trial.flops_per_sample)) for trial in trials
    ]
    return Choice(tuple(trials), tuple(scores), exponent, min(range(len(scores)), key=scores.__getitem__))
