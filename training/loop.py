"""One run, start to end: next batch, step, log, maybe evaluate, maybe commit, maybe grow.

Everything between two steps happens in one order (log, evaluate, commit, then grow into the next stage), and a commit
comes last. So whenever a run is killed, the same command continues from a commit and repeats exactly what came after.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.ledger import entries_of
from ..data.loading.loader import Loader
from ..data.samples.sample import Batch
from ..models.spec import ModelSpec
from .checkpoint.commits import Commits
from .checkpoint.store import Store
from .device import device_name, repeating
from .engines.automatic_micro_batches import find_pieces, recorded_pieces
from .engines.base import Engine, StepResult
from .engines.build import build_engine
from .engines.device_prefetch import Feed
from .engines.micro_batches import cut
from .evaluations import Evaluations
from .growth.grow import grow
from .growth.plateau import slopes
from .growth.search import search
from .health.degenerate import nothing_to_learn
from .health.divergence import Health
from .health.signals import StopRequest
from .health.watchdog import Watchdog
from .logging.profiler import Profile
from .logging.run_log import RunLog, Summary
from .logging.throughput import ThroughputMeter
from .objectives.base import Inputs, load_states, states
from .objectives.terms import advance, build_objectives
from .recipe import Recipe
from .run_plan import RunPlan
from .starting.begin import Beginning, Begun, begin
from .starting.rollback import roll_back
from .starting.same_data import check_same_data, open_together
from .state import Decision, Event, RolledBack, Trial
from .tally import Tally, fold
from .uploads import Uploads, reason_to_commit
from .world import World


def train(
    recipe: Recipe, out: Path, beginning: Beginning | None = None, lost: Callable[[], str | None] = lambda: None
) -> Summary:
    """Run the recipe in folder `out`, or continue it if its store has a commit. Every process of the run calls this.

    `lost` says why this attempt must end at once, as another has begun; None while it need not.
    Raises DataError, StoreError or TrainingError.
    """
    with repeating(recipe.engine.deterministic):
        world = World.join(recipe.watchdog.of_collectives)
        try:
            with StopRequest() as stop, Watchdog(recipe.watchdog, out, world, lost) as watch:
                beginning = beginning or Beginning()
                while isinstance(end := _attempt(recipe, out, world, stop, watch, beginning), RolledBack):
                    beginning = Beginning(beginning.imports, back=end)
                return end
        finally:
            world.leave()


def _attempt(
    recipe: Recipe, out: Path, world: World, stop: StopRequest, watch: Watchdog, beginning: Beginning
) -> Summary | RolledBack:
    """Run from the newest commit to the end, or to a rollback."""
    with Run(recipe, out, world, stop, watch, beginning) as run:
        try:
            for stage in range(run.state.stage, len(recipe.stages)):
                run.enter(stage)
                if run.stopping:
                    return run.summary(finished=False)
                for batch in run.batches():
                    run.step(batch)
                    run.decide()
                    run.agree()
                    run.log()
                    run.evaluate()
                    run.commit()
                    if run.stopping:
                        return run.summary(finished=False)
            return run.finish()
        except RolledBack as end:
            return end.with_traceback(None)  # the traceback holds the loader and its processes


class Run:
    """The state of a run between two steps, and what is done there."""

    def __init__(
        self, recipe: Recipe, out: Path, world: World, stop: StopRequest, watch: Watchdog, beginning: Beginning
    ) -> None:
        recipe.check_world(world.size)
        recipe.check_tokenizer()
        self.recipe, self.out, self.world, self.stop, self.watch = recipe, out, world, stop, watch
        self.tally = Tally(world)
        self.commits = Commits(Store(recipe.commits_url(out)))
        self.display = RunLog(recipe, out, world)
        self.uploads = Uploads(self.commits, world, self.display, recipe.checkpoint.patience, watch)
        self.evaluations = Evaluations(recipe, world, self.display, watch)
        self.stopping = self._clock_due = False
        self._bad: list[dict[str, Any]] = []
        self._pieces, self._settled = recipe.engine.pieces or 1, -1
        """pieces of a batch, and the stage they were found for"""
        self._committed = -1
        """the step of the latest commit of this attempt"""
        self._looked = False
        """whether a batch was looked at for what it can teach, which the first log line does"""
        self._feed = Feed(world, recipe.seed)
        self.profile = Profile(out if recipe.log.profile else None, world.rank, world.device)
        self.lr = 0.0
        self.inputs: Inputs | None = None
        self.result: StepResult | None = None
        """inputs and result of the latest step"""
        begun = time.monotonic()
        # The claim comes first: an attempt before this one that still runs commits no more once this one has looked.
        attempt = self.uploads.claim_attempt()
        found = begin(recipe, self.commits, world, self._build, self.display.warn, self.display.counting)
        self.engine, self.state = found.engine, found.state
        self.plan = RunPlan.of(recipe, self.state.decisions)
        self._record_start(found, attempt, beginning)
        self.loader = self._loader()
        self._begun, self._commit_time = begun, time.monotonic()
        self._resumed = ({"imports": beginning.imports, **found.seconds}, time.monotonic()) if found.commit else None
        self.meter = ThroughputMeter(self.state, world)
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

    def _record_start(self, begun: Begun, attempt: int, beginning: Beginning) -> None:
        """Write down how this attempt began: in the lineage, the records and on the terminal."""
        event, said = beginning.event(begun)
        detail = {"attempt": attempt, "hosts": self.world.hosts(), **said}
        if begun.commit:
            self.uploads.last, self.uploads.best = begun.commit.url, self.state.best
        if beginning.back:
            fresh = self.state.health.model_copy(update={"bad_steps": 0, "spiked": False})
            self.state = self.state.model_copy(update={"health": fresh})
        self._remember(event, {**detail, "changes": begun.changes} if begun.changes else detail, attempt=attempt)
        self.display.begin(self.state, said["commit"])
        self.display.event(
            event,
            self.state,
            world=self.world.size,
            device=device_name(self.world.device),
            attention=self.engine.attention,
            seconds={"imports": beginning.imports, **begun.seconds},
            **detail,
        )

    def _build(self, spec: ModelSpec) -> Engine:
        recipe = self.recipe
        objectives = build_objectives(recipe.objectives, spec, recipe.seed)
        engine = build_engine(spec, objectives, recipe.engine, recipe.optimizer, self.world, recipe.seed)
        engine.take_pieces(self._pieces)
        return engine

    def _loader(self) -> Loader:
        """The loader of the stage, with the samples that are already known to be bad."""
        recipe, world = self.recipe, self.world
        sees, mixtures = self.plan.sees(self.state.stage), self.plan.mixtures(self.state)
        with self.display.counting("shards read") as progress:
            make = partial(Loader, recipe.data, *sees, recipe.seed, world.rank, world.size, mixtures, progress)
            loader, data = open_together(world, recipe, make)
        check_same_data(recipe, self.state, data, self.commits.store.url)
        self.state = self.state.model_copy(update={"data": tuple(data), "tokenizer": loader.tokenizer.identity})
        self.plan.specs[-1].check_samples(loader.columns)
        loader.check_bad(entries_of(world.first(self.display.known_bad())))
        return loader

    def _remember(self, event: str, detail: dict[str, Any], **changes: Any) -> None:
        """Add to the lineage."""
        state = self.state
        line = Event(event=event, step=state.step, samples=state.samples, world=self.world.size, detail=detail)
        self.state = state.model_copy(update={"lineage": (*state.lineage, line), **changes})
        self.display.lineage(self.state)

    # One step

    def enter(self, stage: int) -> None:
        """Enter a stage, growing the model if it changes; stops before it if asked to during its search."""
        if stage == self.state.stage:
            return
        self._fold()
        seen = self.plan.sees(self.state.stage)
        if self.plan.stages[stage].search and not self._search(stage):
            return
        if self.plan.specs[stage] != self.engine.model.spec:
            self.watch.at("grow", self.state.step)
            with contextlib.closing(self.loader.batches(self.state.cursor)) as batches:
                probe = replace(cut(self._inputs(next(batches)), self._pieces)[0], patches=None)
            plan, how = self.plan, self.plan.stages[stage]
            fade = plan.fade(self.state)
            learned = states(self.engine.objectives)
            self.engine, growth = grow(self.engine, self._build, plan.specs[stage], probe, self.recipe.seed, how, fade)
            load_states(self.engine.objectives, learned)
            self._remember("grow", growth.json())
            self.display.event("grow", self.state, **growth.json())
        health = self.state.health
        if not health.bad_steps:  # in the middle of a spike the usual losses are still those before it
            health = Health(healthy_step=self.state.step)
        self.state = self.state.model_copy(update={"stage": stage, "window": (), "trials": (), "health": health})
        if self.plan.sees(stage) != seen:
            self.loader = self._loader()

    def _search(self, stage: int) -> bool:
        """Choose what a stage grows into, by short trials from here; returns False if the run stops before it has."""
        begun = time.monotonic()
        alive = partial(self.watch.at, "search", self.state.step)
        state, shown = self.state, self.display.counting
        choice = search(self.engine, self._build, self.recipe, state, stage, self._feed, alive, self._tried, shown)
        self.loader = self._loader()  # it has opened the sources anew: are they the same still?
        if choice is None:
            return False
        spent, seconds = self.state.flops + choice.spent, time.monotonic() - begun
        self._decide(Decision(stage=stage, grow=choice.sizes), "search", choice.json(), flops=spent)
        self.display.event("search", self.state, **choice.json(), seconds=seconds)
        self.meter.exclude_time(seconds)
        self.meter.exclude_flops(choice.spent)
        return True

    def _tried(self, trial: Trial) -> bool:
        """Keep a finished trial, and commit if it is time to; returns whether the search goes on."""
        self.state = self.state.model_copy(update={"trials": (*self.state.trials, trial)})
        self.agree()
        if self.stopping or self._clock_due:
            self._commit("signal" if self.stopping else "interval")
        return not self.stopping

    def _decide(self, made: Decision, event: str, detail: dict[str, Any], **changes: Any) -> None:
        """Record a decision and continue by it."""
        self._remember(event, detail, decisions=(*self.state.decisions, made), **changes)
        self.plan = RunPlan.of(self.recipe, self.state.decisions)

    def batches(self) -> Iterator[Batch]:
        """This rank's part of every remaining global batch of the stage."""
        if self.state.step >= self.plan.ends[self.state.stage]:
            return
        with contextlib.closing(self.loader.batches(self.state.cursor)) as batches:
            while self.state.step < self.plan.ends[self.state.stage]:
                self.watch.at("data", self.state.step)
                begun = time.monotonic()
                batch = next(batches)
                self.meter.add_wait(time.monotonic() - begun)
                self._settle_pieces(batch)
                yield batch

    def _settle_pieces(self, batch: Batch) -> None:
        """For `engine.micro_batches: auto`, once a stage: as many pieces as the run found for it on as many devices of
        this kind, else as it finds now, before the first step."""
        stage = self.state.stage
        if self.recipe.engine.pieces is not None or self._settled == stage:
            return
        self._settled = stage
        pieces = recorded_pieces(self.state.lineage, stage, self.world)
        if pieces is None:
            self.watch.at("micro_batches", self.state.step)
            begun = time.monotonic()
            found = find_pieces(self.engine, self._inputs(batch), self.plan.sees(stage)[1], stage)
            self._remember("micro_batches", found)
            self.display.event("micro_batches", self.state, **found, seconds=time.monotonic() - begun)
            self.meter.exclude_time(time.monotonic() - begun)
            pieces = int(found["pieces"])
        self._pieces = pieces
        self.engine.take_pieces(pieces)

    def _inputs(self, batch: Batch) -> Inputs:
        keep, patches = self.plan.stages[self.state.stage].patch_keep, self.engine.model.spec.image.grid**2
        return self._feed(batch, self.state.samples, keep, patches)

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        state, size = self.state, self.recipe.data.batch
        self.watch.at("step", state.step, batch.keys)
        self.lr = self.plan.learning_rate(state)
        advance(self.engine.objectives, self.recipe.objectives, state.samples / self.recipe.total_samples)
        self.inputs = self._inputs(batch)
        self.result = self.engine.step(self.inputs, self.lr, self.plan.fade(state))
        self.profile.step()
        self.tally.add(self.result, {o.name: o.weight for o in self.engine.objectives}, len(batch.tokens))
        self.state = state.model_copy(update={"step": state.step + 1, "samples": state.samples + size})
        self._bad += [{"step": self.state.step, **asdict(entry)} for entry in batch.bad]
        self.meter.add_captions(batch)
        if self._resumed:
            self._say_resumed(*self._resumed)

    def _say_resumed(self, seconds: dict[str, float], ready: float) -> None:
        """Log once how long each part of a resume took, up to the first step, which this synchronises with."""
        assert self.result
        self.result.grad_norm.item()
        self.display.resumed({**seconds, "first step": time.monotonic() - ready})
        self._resumed = None

    # The step edge

    def _fold(self) -> None:
        """Count what the steps since the last call took and gave."""
        reads_tokens = any("tokens" in objective.needs for objective in self.engine.objectives)
        patches = None if self.inputs is None or self.inputs.patches is None else self.inputs.patches.shape[1]
        self.state = fold(self.tally.take(), self.state, self.plan, patches, reads_tokens)

    def decide(self) -> None:
        """End the stage here if its plateau rule says so; the rule is applied once per window."""
        rule, size = self.plan.stages[self.state.stage].plateau, self.recipe.data.batch
        if rule is None or len(self.state.window) + len(self.tally) < rule.steps(size):
            return
        self._fold()
        state = self.state
        if len(state.window) < rule.steps(size) or state.step >= self.plan.ends[state.stage]:
            return
        spec, following = self.plan.specs[state.stage : state.stage + 2]
        found = slopes(state.window, spec, following, size, state.flops, rule.exponent)
        self.state = state.model_copy(update={"window": ()})
        self.display.event("plateau", self.state, **found.json(), ended=found.flat)
        if found.flat:
            begun = self.plan.ends[state.stage - 1] * size if state.stage else 0
            self._decide(Decision(stage=state.stage, samples=state.samples - begun), "plateau", found.json())
            self.loader = self._loader()  # mixtures change with the stages

    def agree(self) -> None:
        """Agree with the other ranks on what happens at this edge: a stop, a commit by the clock, bad samples."""
        world, clock = self.world, self.recipe.checkpoint.every_seconds
        due = clock is not None and time.monotonic() - self._commit_time >= clock
        due = (due or self.uploads.retry_due) and not self.uploads.in_progress
        asked = (self.stop.requested, due and world.is_first, bool(self._bad), self.uploads.busy)
        self.stopping, self._clock_due, bad, busy = world.any(*asked)
        if not busy:
            self.meter.exclude_time(self.uploads.advance())
            self._recall_best()
        if bad:
            entries = [entry for rank in world.objects(self._bad) for entry in rank]
            self._bad = []
            self.display.bad(entries)
            self.loader.check_bad(entries_of(entries))

    def log(self) -> None:
        """Write a log line if one is due, and go back if the run is ill. Raises RolledBack."""
        if self.state.step % self.recipe.log.every == 0 or self.plan.is_over(self.state):
            self._write_line()
            if self.state.health.bad_steps >= self.recipe.recovery.bad_steps:
                self.uploads.finish()
                roll_back(self.recipe, self.state, self.commits, self.world)

    def _write_line(self) -> None:
        """Read the step's figures from the device (which synchronises) and log them."""
        self._fold()
        assert self.result
        assert self.inputs
        figures = self.engine.figures(self.result)
        self._warn(figures, self.inputs)
        self.state = self.state.model_copy(update={"skipped": figures["skipped"]})
        figures |= {"lr": self.lr, "passes": self.loader.coverage(self.state.cursor)}
        figures |= self.meter.line(self.state, self.recipe.data.batch)
        if self.recipe.log.gradient_norms:
            figures["gradient_norms"] = self.engine.gradient_norms(self.inputs)
        self.display.step(self.state, **figures)

    def _warn(self, figures: dict[str, Any], inputs: Inputs) -> None:
        """Show what is wrong with the steps since the last line."""
        warn = self.display.warn
        if not self._looked:
            self._looked, measured = True, (figures["loss"], figures["grad_norm"])
            if why := nothing_to_learn(inputs, self.engine.objectives, *measured, self.world):
                warn(why)
        if short := self.engine.recomputing.shortage():
            warn(short)
        steps, new = self.meter.since(self.state, figures["skipped"])
        if new:
            warn(f"{new} of the last {steps} steps had a gradient that is not finite and were skipped")

    def evaluate(self) -> None:
        """Evaluate if the cadence or the end of the run asks for it."""
        if self.evaluations.due(self.plan, self.state):
            self._evaluate()

    def _evaluate(self) -> None:
        begun = time.monotonic()
        self.state = self.evaluations.run(self.engine, self.state)
        self.meter.exclude_time(time.monotonic() - begun)

    def commit(self) -> None:
        """Commit if it is due: at the end, before a growth, after a signal, with the best score, or by the interval."""
        asked = self.stopping, self.evaluations.is_best, self._clock_due
        if reason := reason_to_commit(self.plan, self.state, *asked):
            self._commit(reason)

    def _recall_best(self) -> None:
        """Take back the best score if its commit failed: the next good one is to be kept."""
        if self.uploads.lost_best and not self.evaluations.is_best:
            self.state = self.state.model_copy(update={"best": self.uploads.best})
        self.uploads.lost_best = False

    def _commit(self, reason: str) -> None:
        """Commit; it is waited for where training does not just go on."""
        self.watch.at("commit", self.state.step)
        begun = time.monotonic()
        self.uploads.finish()  # at most one is in progress
        self._recall_best()
        self._fold()
        self.uploads.commit(partial(self._begin_commit, reason), self.state, reason)
        self.evaluations.is_best = False
        self._commit_time = time.monotonic()
        self.meter.exclude_time(self._commit_time - begun)

    def _begin_commit(self, reason: str) -> None:
        """Take a snapshot and begin to upload it."""
        if self._committed == self.state.step:  # in a search, or it failed: an attempt makes one commit a step
            self.state = self.state.model_copy(update={"attempt": self.uploads.claim_attempt()})
        self._committed = self.state.step
        self.state = self.state.model_copy(update={**self.engine.counters(), "seconds": self._seconds()})
        scores = self.evaluations.of_step(self.state.step)
        self.uploads.begin(self.engine, self.state, self.recipe, reason, scores)

    # The end

    def _seconds(self) -> float:
        """Wall-clock time of all attempts up to now."""
        return self._seconds_before + time.monotonic() - self._begun

    def finish(self) -> Summary:
        """Finish a run that has used its whole budget. Started again, it only writes the report."""
        if self.evaluations.lacking:
            self.evaluations.recall(self.state)
        if self.evaluations.lacking:  # a new run folder for an existing commit
            self._evaluate()
        self.display.event("end", self.state, seconds=self._seconds())
        return self.summary(finished=True)

    def summary(self, finished: bool) -> Summary:
        """The result of the run, after writing its report."""
        self.watch.at("end", self.state.step)
        report = self.display.report()
        self.world.barrier()  # the launcher ends all processes when the first one exits
        scores, board = self.evaluations, self.out / "tensorboard"
        return Summary(finished, scores.scores, scores.chance, self.uploads.last, report, board, self._seconds())
