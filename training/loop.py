"""One run, start to end: next batch, step, log, maybe evaluate, maybe commit, maybe grow.

Everything that happens at a step edge happens in one order (log, evaluate, commit, then grow on the way into the next
stage), and a commit is the last thing of an edge. So whatever moment a run is killed at, the same command continues
from a commit and does again exactly what came after it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ..data.ledger import LedgerEntry
from ..data.loading.loader import Loader
from ..data.order import Mixture
from ..data.samples.sample import Batch
from ..models.flops import training_flops
from ..models.spec import ModelSpec
from .checkpoint.commits import Commits
from .checkpoint.manifest import Commit
from .checkpoint.store import Store
from .device import describe
from .engines.automatic_micro_batches import fewest_pieces
from .engines.base import Engine, StepResult
from .engines.build import build_engine
from .engines.device_prefetch import Feed
from .engines.layout import Layout
from .engines.micro_batches import cut
from .evaluate.suites import evaluate
from .growth.grow import grow
from .growth.plateau import Tally, slopes
from .growth.search import search
from .health.divergence import Health
from .health.signals import StopRequest
from .health.watchdog import Watchdog
from .logging.profiler import Profile
from .logging.run_log import Display
from .logging.throughput import Meter
from .objectives.base import Inputs, load_states, states
from .objectives.terms import advance, build_objectives
from .recipe import Recipe
from .sample_rng import kept
from .stages import faded, rewarmed, steady_from
from .starting.init_from import begin_with, open_origin
from .starting.resume import check_same_run, newest_intact
from .starting.rollback import roll_back
from .state import Decision, Event, RolledBack, RunState, TrainingError
from .uploads import Uploads
from .world import World


@dataclass(frozen=True)
class Summary:
    """What a run leaves, for the last lines of the command."""

    finished: bool
    scores: dict[str, float]
    chance: dict[str, float]
    commit: str | None
    report: Path
    tensorboard: Path
    seconds: float


@dataclass(frozen=True)
class Beginning:
    """How an attempt came about, for the records."""

    imports: float = 0.0
    """seconds spent before the run"""
    before: str | None = None
    """how the attempt before this one ended"""
    back: RolledBack | None = None
    """where this one had to go back"""


def train(
    recipe: Recipe, out: Path, beginning: Beginning | None = None, lost: Callable[[], str | None] = lambda: None
) -> Summary:
    """Run the recipe in folder `out`, or continue it if its store has a commit. Every process of the run calls this.

    `lost` says why this attempt must end at once, as another has begun; None while it need not.
    Raises DataError, StoreError or TrainingError.
    """
    world = World.join()
    try:
        with StopRequest() as stop, Watchdog(recipe.watchdog, out, world, lost) as watch:
            beginning = beginning or Beginning()
            while isinstance(end := _live(recipe, out, world, stop, watch, beginning), RolledBack):
                beginning = Beginning(beginning.imports, back=end)
            return end
    finally:
        world.leave()


def _live(
    recipe: Recipe, out: Path, world: World, stop: StopRequest, watch: Watchdog, beginning: Beginning
) -> Summary | RolledBack:
    """From the newest commit to the end of the run, or to where it has to go back."""
    with Run(recipe, out, world, stop, watch, beginning) as run:
        try:
            for stage in range(run.state.stage, len(recipe.stages)):
                run.enter(stage)
                for batch in run.batches():
                    run.step(batch)
                    run.decide()
                    run.log()
                    run.evaluate()
                    run.commit()
                    if run.stopping:
                        return run.summary(finished=False)
            return run.finish()
        except RolledBack as end:
            return end.with_traceback(None)  # which holds the loader and its processes


class Run:
    """The state of a run between two step edges, and what is done at them."""

    engine: Engine

    def __init__(
        self, recipe: Recipe, out: Path, world: World, stop: StopRequest, watch: Watchdog, beginning: Beginning
    ) -> None:
        recipe.check_world(world.size)
        recipe.check_tokenizer()
        self.recipe, self.out, self.world, self.stop, self.watch = recipe, out, world, stop, watch
        self.tally = Tally(world)
        self.commits = Commits(Store(recipe.commits_url(out)))
        self.display = Display(recipe, out, world)
        self.uploads = Uploads(self.commits, world, self.display)
        self._take_up(RunState())
        self.stopping = False
        self.scores: dict[str, float] = {}
        self.chance: dict[str, float] = {}
        self._bad: list[dict[str, Any]] = []
        self._preparing = 0.0
        self._changes: list[str] = []
        self._pieces, self._settled = recipe.engine.pieces or 1, -1
        """pieces of a batch, and the stage they were found for"""
        self._scored = -1
        """the step of the latest evaluation"""
        self._feed = Feed(world.device)
        self.profile = Profile(out if recipe.log.profile else None, world.rank, world.device)
        self._begun = time.monotonic()
        self._start(beginning)
        self._commit_time = time.monotonic()
        self.meter = Meter(self.state, world)
        self._seconds_before = self.state.seconds

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.profile.close()
        self.display.close()
        self.uploads.give_up()
        self.engine.close()
        del self.engine  # it holds the process group, which is left next

    # Starting

    def _take_up(self, state: RunState) -> None:
        """Go on from a state, by the recipe as far as it is decided there."""
        self.state = state
        self.plan = self.recipe.settled(state.decisions)
        self.specs = self.plan.specs()
        self.ends = list(accumulate(stage.steps(self.plan.data.batch) for stage in self.plan.stages))

    def _start(self, beginning: Beginning) -> None:
        """Claim the place; take up the newest commit, or initialise, or begin with another run's; say so.

        The claim comes first: an attempt before this one that still runs commits no more once this one has looked.
        """
        who = f"{describe(self.world.device)} x {self.world.size}"
        attempt = self.world.objects(self.commits.claim_attempt(who) if self.world.is_first else 0)[0]
        clock = [time.monotonic()]
        names = self.world.objects(self.commits.names() if self.world.is_first else [])[0]
        clock.append(time.monotonic())
        found = newest_intact(self.commits, names, self._prepare, self.display.warn, self.world)
        clock.append(time.monotonic())
        if found:
            commit, tensors = found
            self.engine.load_logical_state(tensors, self.state.applied, self.state.skipped, self.state.multipliers)
            load_states(self.engine.objectives, self.state.objectives)
            self.uploads.last = commit.url
        else:
            origin = open_origin(self.recipe) if self.recipe.init_from else None
            self._take_up(RunState())
            self.engine = self._build(origin.manifest.spec if origin else self.specs[0])
            if origin:
                self._take_up(begin_with(self.recipe, origin, self.engine))
        hosts = self.world.hosts()
        event = "resume" if found else "start"
        detail: dict[str, Any] = {"attempt": attempt, "hosts": hosts, "commit": found[0].name if found else None}
        if beginning.before:
            detail["before"] = beginning.before
        if back := beginning.back:
            event = "rollback"
            detail |= {"batches": back.cursor - self.state.cursor, "times": back.times, "reason": back.reason}
            fresh = self.state.health.model_copy(update={"ill": 0, "leapt": False})
            self.state = self.state.model_copy(update={"health": fresh})
        self._remember(event, {**detail, "changes": self._changes} if self._changes else detail, attempt=attempt)
        seconds = {
            "imports": beginning.imports,
            "find": clock[1] - clock[0],
            "read": clock[2] - clock[1] - self._preparing,
            "build": time.monotonic() - clock[2] + self._preparing,
        }
        self.display.begin(self.state, found[0].name if found else None)
        self.display.event(
            event,
            self.state,
            world=self.world.size,
            device=describe(self.world.device),
            attention=self.engine.attention,
            seconds=seconds,
            **detail,
        )
        self.loader = self._loader()
        self._resumed = (seconds, time.monotonic()) if found else None

    def _prepare(self, commit: Commit) -> Layout | None:
        """Build the engine for a commit of this very run; what of the commit's tensors it holds here."""
        begun = time.monotonic()
        self._changes = check_same_run(self.recipe, commit)
        self._take_up(commit.manifest.state)
        self.engine = self._build(self.specs[self.state.stage])
        self.engine.expect(self.state.multipliers)
        self._preparing += time.monotonic() - begun
        return self.engine.layout

    def _build(self, spec: ModelSpec) -> Engine:
        recipe = self.recipe
        objectives = build_objectives(recipe.objectives, spec, recipe.seed)
        engine = build_engine(spec, objectives, recipe.engine, recipe.optimizer, self.world, recipe.seed)
        engine.take_pieces(self._pieces)
        return engine

    def _loader(self) -> Loader:
        """The stream as the stage sees it; it knows which samples are bad already."""
        recipe, world = self.recipe, self.world
        loader = Loader(recipe.data, *self._seen(), recipe.seed, world.rank, world.size, self._mixtures())
        self.specs[-1].check_samples(loader.columns)
        loader.check_bad(_entries(world.objects(self.display.known_bad())[0]))
        return loader

    def _seen(self) -> tuple[int, int]:
        """Resolution of the pictures and most tokens of a caption in the stage."""
        spec = self.engine.model.spec
        return spec.image.resolution, self.plan.stages[self.state.stage].longest(spec)

    def _mixtures(self) -> list[Mixture]:
        """The mixtures by the number of the global batch they begin at: the step, and what was passed over before."""
        return [Mixture(m.step + self.state.passed(before=m.step), m.weights) for m in self.plan.mixtures()]

    def _remember(self, event: str, detail: dict[str, Any], **changes: Any) -> None:
        """Add to the lineage."""
        state = self.state
        line = Event(event=event, step=state.step, samples=state.samples, world=self.world.size, detail=detail)
        self.state = state.model_copy(update={"lineage": (*state.lineage, line), **changes})
        self.display.lineage(self.state)

    # One step

    def enter(self, stage: int) -> None:
        """Make the model of a stage, growing the one there is."""
        if stage == self.state.stage:
            return
        self._fold()
        seen = self._seen()
        if self.plan.stages[stage].search:
            self._search(stage)
        if self.specs[stage] != self.engine.model.spec:
            self.watch.at("grow", self.state.step)
            with contextlib.closing(self.loader.batches(self.state.cursor)) as batches:
                probe = replace(cut(self._inputs(next(batches)), self._pieces)[0], patches=None)
            recipe, how = self.plan, self.plan.stages[stage]
            fade = faded(recipe.stages, self.state.stage, self.state.samples, recipe.data.batch)
            learned = states(self.engine.objectives)
            self.engine, growth = grow(self.engine, self._build, self.specs[stage], probe, recipe.seed, how, fade)
            load_states(self.engine.objectives, learned)
            self._remember("grow", growth.json())
            self.display.event("grow", self.state, **growth.json())
        self.state = self.state.model_copy(
            update={"stage": stage, "window": (), "health": Health(well=self.state.step)}
        )
        if self._seen() != seen:
            self.loader = self._loader()

    def _search(self, stage: int) -> None:
        """Decide what a stage grows into, by trials from here."""
        begun = time.monotonic()
        choice = search(self.engine, self._build, self.recipe, self.state, stage, self._inputs)
        spent, seconds = self.state.flops + choice.spent, time.monotonic() - begun
        self._decide(Decision(stage=stage, grow=choice.sizes), "search", choice.json(), flops=spent)
        self.display.event("search", self.state, **choice.json(), seconds=seconds)
        self.meter.pause(seconds)
        self.meter.aside(choice.spent)

    def _decide(self, made: Decision, event: str, detail: dict[str, Any], **changes: Any) -> None:
        """Go on by a decision."""
        self._remember(event, detail, decisions=(*self.state.decisions, made), **changes)
        self._take_up(self.state)

    def batches(self) -> Iterator[Batch]:
        """This rank's part of every global batch that is left of the stage."""
        if self.state.step >= self.ends[self.state.stage]:
            return
        with contextlib.closing(self.loader.batches(self.state.cursor)) as batches:
            while self.state.step < self.ends[self.state.stage]:
                self.watch.at("data", self.state.step)
                begun = time.monotonic()
                batch = next(batches)
                self.meter.waited(time.monotonic() - begun)
                self._settle_pieces(batch)
                yield batch

    def _settle_pieces(self, batch: Batch) -> None:
        """For `engine.micro_batches: auto`, once a stage: as many pieces as the run found for it on as many devices of
        this kind, else as it finds now, before the first step."""
        stage = self.state.stage
        if self.recipe.engine.pieces is not None or self._settled == stage:
            return
        self._settled, here = stage, {"stage": stage, "device": describe(self.world.device)}
        found = [
            event.detail["pieces"]
            for event in self.state.lineage
            if event.event == "micro_batches"
            and event.world == self.world.size
            and here.items() <= event.detail.items()
        ]
        if not found:
            self.watch.at("micro_batches", self.state.step)
            begun = time.monotonic()
            found = [fewest_pieces(self.engine, self._inputs(batch), self._seen()[1])]
            detail = {**here, "pieces": found[-1], "pairs": -(-len(batch.lengths) // found[-1])}
            self._remember("micro_batches", detail)
            self.display.event("micro_batches", self.state, **detail, seconds=time.monotonic() - begun)
            self.meter.pause(time.monotonic() - begun)
        self._pieces = found[-1]
        self.engine.take_pieces(self._pieces)

    def _inputs(self, batch: Batch) -> Inputs:
        pairs = len(batch.lengths)
        numbers = torch.arange(pairs) + (self.state.samples + self.world.rank * pairs)
        tensors = (batch.images, batch.tokens, batch.lengths, batch.caption_ids, batch.image_ids, numbers)
        columns = batch.columns
        images, tokens, lengths, caption_ids, image_ids, numbers, *moved = self._feed([*tensors, *columns.values()])
        inputs = Inputs(images, tokens, lengths, caption_ids, image_ids, numbers, host_lengths=batch.lengths)
        if columns:
            inputs = replace(inputs, columns=dict(zip(columns, moved, strict=True)))
        share, of = self.recipe.stages[self.state.stage].patch_keep, self.engine.model.spec.image.grid**2
        if share < 1:
            inputs = replace(inputs, patches=kept(self.recipe.seed, "image/patches", numbers, of, share))
        return inputs

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        state, size = self.state, self.recipe.data.batch
        stages, place = self.plan.stages, (state.stage, state.samples, size)
        self.watch.at("step", state.step, batch.keys)
        self.lr = self.recipe.optimizer.lr * self.recipe.schedule.factor(state.samples, size, self.recipe.total_samples)
        self.lr *= rewarmed(stages, *place)
        advance(self.engine.objectives, self.recipe.objectives, state.samples / self.recipe.total_samples)
        self.inputs = self._inputs(batch)
        self.result: StepResult = self.engine.step(self.inputs, self.lr, faded(stages, *place))
        self.profile.step()
        shares = torch.stack([o.weight * self.result.losses[o.name] for o in self.engine.objectives])
        self.tally.add(shares.sum(), len(batch.tokens))
        self.state = state.model_copy(update={"step": state.step + 1, "samples": state.samples + size})
        self._bad += [{"step": self.state.step, **asdict(entry)} for entry in batch.bad]
        self.meter.saw(batch)
        if self._resumed:
            self._say_resumed(*self._resumed)

    def _say_resumed(self, seconds: dict[str, float], ready: float) -> None:
        """Once in an attempt that continues: how long each part of it took, up to the first step, which is waited
        for."""
        self.result.grad_norm.item()
        self.display.resumed({**seconds, "first step": time.monotonic() - ready})
        self._resumed = None

    # The step edge

    def _fold(self) -> None:
        """Count the FLOPs of the steps taken, and keep their losses where a rule measures them."""
        state, size, spec = self.state, self.recipe.data.batch, self.engine.model.spec
        flops, window = state.flops, list(state.window)
        stages, samples = self.plan.stages, state.samples - len(self.tally) * size
        steady = steady_from(stages, state.stage, size, self.plan.schedule.warmup)
        read = any("tokens" in objective.needs for objective in self.engine.objectives)
        patches = None if not len(self.tally) or self.inputs.patches is None else self.inputs.patches.shape[1]
        for loss, tokens in self.tally.take():
            flops += size * training_flops(spec, tokens / size, patches, read)
            if stages[state.stage].plateau and samples >= steady:
                window.append((loss, tokens / size))
            samples += size
        self.state = state.model_copy(update={"flops": flops, "window": tuple(window)})

    def decide(self) -> None:
        """End the stage here if its plateau rule says so; the rule looks once in a window."""
        rule, size = self.plan.stages[self.state.stage].plateau, self.recipe.data.batch
        if rule is None or len(self.state.window) + len(self.tally) < rule.steps(size):
            return
        self._fold()
        state = self.state
        if len(state.window) < rule.steps(size) or state.step >= self.ends[state.stage]:
            return
        spec, following = self.specs[state.stage : state.stage + 2]
        found = slopes(state.window, spec, following, size, state.flops, rule.exponent)
        self.state = state.model_copy(update={"window": ()})
        self.display.event("plateau", self.state, **found.json(), ended=found.flat)
        if found.flat:
            begun = self.ends[state.stage - 1] * size if state.stage else 0
            self._decide(Decision(stage=state.stage, samples=state.samples - begun), "plateau", found.json())
            self.loader = self._loader()  # mixtures change with the stages

    def log(self) -> None:
        """Agree on what happens at this edge; write a log line if one is due."""
        world, state = self.world, self.state
        clock = self.recipe.checkpoint.every_seconds
        due = clock is not None and not self.uploads.under_way and time.monotonic() - self._commit_time >= clock
        asked = (self.stop.requested, due and world.is_first, bool(self._bad), self.uploads.busy)
        self.stopping, self._clock_due, bad, busy = world.any(*asked)
        if not busy:
            self.meter.pause(self.uploads.advance())
        if bad:
            entries = [entry for rank in world.objects(self._bad) for entry in rank]
            self._bad = []
            self.display.bad(entries)
            self.loader.check_bad(_entries(entries))
        if state.step % self.recipe.log.every == 0 or state.step == self.ends[-1]:
            self._write_line()
            if self.state.health.ill >= self.recipe.recovery.bad_steps:
                self.uploads.finish()
                roll_back(self.recipe, self.state, self.commits, world)

    def _write_line(self) -> None:
        """Read the step's numbers back from the device (here, it is waited for) and write them down."""
        self._fold()
        state, result, recipe = self.state, self.result, self.recipe
        shares = self.world.sum(torch.stack(list(result.losses.values()))).tolist()
        losses = dict(zip(result.losses, shares, strict=True))
        skipped = self.engine.skipped
        steps, new = self.meter.since(state, skipped)
        loss = sum(o.weight * losses[o.name] for o in self.engine.objectives)
        health = state.health.after_line(recipe.recovery, state.step, steps, new, loss)
        self.state = state.model_copy(update={"skipped": skipped, "health": health})
        if short := self.engine.recomputing.shortage():
            self.display.warn(short)
        if new:
            self.display.warn(f"{new} of the last {steps} steps had a gradient that is not finite and were skipped")
        self.display.step(
            self.state,
            loss=loss,
            losses=losses,
            lr=self.lr,
            logit_scale=self.engine.scale(),
            grad_norm=result.grad_norm.item(),
            skipped=skipped,
            parameters=self.engine.parameters,
            passes=self.loader.coverage(state.cursor),
            **self.meter.line(self.state, recipe.data.batch),
            **self.engine.recomputing.figures(),
            **({"gradient_norms": self.engine.gradient_norms(self.inputs)} if self.recipe.log.gradient_norms else {}),
        )

    def evaluate(self) -> None:
        """Evaluate if the cadence or the end of the run asks for it."""
        state, every = self.state, self.recipe.eval.every
        due = every is not None and state.samples // every > (state.samples - self.recipe.data.batch) // every
        if self.recipe.eval.suites and (due or state.step == self.ends[-1]):
            self._evaluate()

    def _evaluate(self) -> None:
        self.watch.at("evaluate", self.state.step)
        begun = time.monotonic()
        recipe = self.recipe
        data = recipe.data
        with self.engine.whole_model() as model:
            found = evaluate(model, recipe.eval, recipe.evaluation_source, self.world, data.cache, data.tokenizer)
        self.scores, self.chance, self._scored = found.scores, found.chance, self.state.step
        best = recipe.checkpoint.keep_best
        if best and best not in found.scores:
            raise TrainingError(f"checkpoint.keep_best = {best!r} is no score; there are {', '.join(found.scores)}")
        self.display.evaluation(self.state, found, time.monotonic() - begun)
        self.meter.pause(time.monotonic() - begun)

    def commit(self) -> None:
        """Commit if anything asks for it: the end, a growth ahead, a signal, or the interval."""
        state, checkpoint = self.state, self.recipe.checkpoint
        every = checkpoint.every_samples
        stage_done = state.step == self.ends[state.stage]
        if state.step == self.ends[-1]:
            reason = "end"
        elif stage_done and self.specs[state.stage + 1] != self.specs[state.stage]:
            reason = "growth"
        elif self.stopping:
            reason = "signal"
        elif self._clock_due or (every and state.samples // every > (state.samples - self.recipe.data.batch) // every):
            reason = "interval"
        else:
            return
        self._commit(reason)

    def _commit(self, reason: str) -> None:
        """Take a snapshot and begin to upload it; only interval commits are not waited for."""
        self.watch.at("commit", self.state.step)
        begun = time.monotonic()
        self.uploads.finish()  # at most one is under way
        self._fold()
        self.state = self.state.model_copy(
            update={
                "applied": self.engine.applied,
                "skipped": self.engine.skipped,
                "multipliers": self.engine.multipliers,
                "objectives": states(self.engine.objectives),
                "seconds": self._seconds(),
            }
        )
        scores = self.scores if self._scored == self.state.step else None
        self.uploads.begin(self.engine, self.state, self.recipe, reason, scores)
        if reason != "interval":
            self.uploads.finish()
        self._commit_time = time.monotonic()
        self.meter.pause(self._commit_time - begun)

    # The end

    def _seconds(self) -> float:
        """Wall-clock time of all attempts up to now."""
        return self._seconds_before + time.monotonic() - self._begun

    def finish(self) -> Summary:
        """Close a run that has seen its whole budget. Run again, it only writes the report once more."""
        if self.recipe.eval.suites and not self.scores:
            self.scores, self.chance = self.world.objects(self.display.scores(self.state))[0]
        if self.recipe.eval.suites and not self.scores:  # the run folder is new, the commit is not
            self._evaluate()
        self.display.event("end", self.state, seconds=self._seconds())
        return self.summary(finished=True)

    def summary(self, finished: bool) -> Summary:
        """What the run has come to, with its report written."""
        self.watch.at("end", self.state.step)
        report = self.display.report()
        self.world.barrier()  # a launcher ends what is left when the first process ends: not before all is written
        return Summary(
            finished, self.scores, self.chance, self.uploads.last, report, self.out / "tensorboard", self._seconds()
        )


def _entries(rows: list[dict[str, Any]]) -> list[LedgerEntry]:
    """Lines of the ledger file as the loader's entries."""
    return [LedgerEntry(**{key: value for key, value in row.items() if key != "step"}) for row in rows]
