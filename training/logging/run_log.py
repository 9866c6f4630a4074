"""One object for all output of a run: the run folder's records, TensorBoard, the terminal, the report.

Only rank 0 writes; on other ranks every method is a no-op, so the loop does not check its rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.shards.parallel import Progress as Report
from ...data.units import counted
from ..evaluate.comparing import bits, flips
from ..evaluate.suites import Evaluation
from ..objectives.terms import weights_at
from ..recipe import Recipe
from ..report import write_report
from ..report.losses import Term, gap_text, training_beside
from ..report.readable import counts_first
from ..state import RunState
from ..world import World
from .counting import no_counting
from .jsonl import RunRecords
from .progress import Progress
from .tensorboard import TensorBoardLog

_REPORTING = 0.01
"""most of a run's time that is spent on updating its report"""


@dataclass(frozen=True)
class Summary:
    """The result of a run, for the last lines of the command."""

    finished: bool
    scores: dict[str, float]
    chance: dict[str, float]
    commit: str | None
    report: Path
    tensorboard: Path
    seconds: float


class RunLog:
    """All output of a run, on rank 0."""

    def __init__(self, recipe: Recipe, out: Path, world: World) -> None:
        self.recipe, self.out = recipe, out
        self.on = world.is_first
        if self.on:
            self.records = RunRecords(out)
            self.progress = Progress(recipe.total_samples, len(recipe.stages))
            self._board: TensorBoardLog | None = None
            self._purge = 0
            self._bad = 0
            self._said: set[str] = set()
            """what evaluations of this attempt have warned of"""
            self._report_due = self._failure_due = 0.0
            self._waits = False
            """whether the latest warning of a failed commit said that the run waits for the store"""

    def begin(self, state: RunState, commit: str | None) -> None:
        """Truncate the records to `commit`, or clear them if it is None."""
        if not self.on:
            return
        if commit is None:
            self.records.clear()
        else:
            self.records.cut_back(state.step, state.cursor * self.recipe.data.batch)
            self.progress.note(f"continuing from {commit} at {counted(state.samples, 'sample')}")
            self._say_what_is_lacking(state)
        self._bad = len(self.known_bad())
        self._purge = state.samples + 1

    def _say_what_is_lacking(self, state: RunState) -> None:
        """Warn if the records end before the step that the run continues from."""
        begun = [event.step for event in state.lineage if event.event == "from"][-1:] or [0]
        last, every = self.records.last_step(begun[0]), self.recipe.log.every
        if last // every < state.step // every:
            self.warn(
                f"{self.records.metrics.path} lacks steps {last + 1:,} to {state.step:,}: another run folder has their "
                f"lines, since a run there committed them to the same store"
            )

    def resumed(self, seconds: Mapping[str, float]) -> None:
        """Show how long each part of a resume took, in seconds."""
        if self.on:
            parts = ", ".join(f"{part} {spent:.1f}" for part, spent in seconds.items())
            self.progress.note(f"continued in {sum(seconds.values()):.1f} s: {parts}")

    def known_bad(self) -> list[dict[str, Any]]:
        """The ledger's rows so far."""
        return self.records.ledger.rows() if self.on else []

    def warn(self, message: str) -> None:
        """Show a warning to the user."""
        if self.on:
            self.progress.note(f"warning: {message}")

    def event(self, event: str, state: RunState, **detail: Any) -> None:
        """Write an event line, and show a note for the events that a user wants to see."""
        if not self.on:
            return
        row = self.records.event(event, state.step, state.samples, **detail)
        if event in ("start", "resume"):
            self.progress.note("kernels: " + "; ".join(f"{what} by {how}" for what, how in row["attention"].items()))
        elif event == "grow":
            self._open_board().growth(row)
            sizes = ", ".join(f"{path} {row['from'][path]} -> {size}" for path, size in row["to"].items())
            before, after = row["parameters_before"] / 1e6, row["parameters_after"] / 1e6
            difference = row["logit_difference"]
            moved = "not compared (other inputs)" if difference is None else f"moved by {difference:.1e}"
            self.progress.note(f"grew {sizes}: {before:.1f} M -> {after:.1f} M parameters, logits {moved}")
        elif event == "rollback":
            self.warn(f"{row['reason']}; went back to {row['commit']}; skipping {counted(row['batches'], 'batch')}")
        elif event == "search":
            chosen = ", ".join(f"{path} {size}" for path, size in row["chosen"].items()) or "no growth"
            self.progress.note(
                f"tried {counted(len(row['candidates']), 'candidate')} for {row['flops']:.1e} FLOPs: {chosen}"
            )
        elif event == "micro_batches":
            self.progress.note(f"micro-batches: {row['pieces']} of {row['pairs']} pairs fit in memory")
        elif event == "plateau":
            outcome = "the stage ends" if row["ended"] else "the stage continues"
            self.progress.note(f"loss per FLOP falls by {row['slope']:.1e}, expected {row['expected']:.1e}: {outcome}")
        elif event == "end" and self._board:  # None if a finished run was started again: nothing new to write
            self._board.end(self.recipe.model_dump(mode="json"), (self.scores(state) or ({},))[0])
        elif event == "commit_failed":
            self._warn_of_failed_commit(f"no commit of step {state.step}: {row['error']}", row["then"])
        elif event == "commit":
            self._failure_due, self._waits = 0.0, False
            self.progress.note(f"committed {row['url']} ({row['bytes'] / 1e6:.0f} MB in {row['seconds']:.1f} s)")

    def _warn_of_failed_commit(self, what: str, then: str) -> None:
        """Warn at the first failure since a commit, when the run begins to wait, and every ten minutes."""
        waits = then.startswith("trying again")
        if time.monotonic() >= self._failure_due or waits > self._waits:
            self._failure_due, self._waits = time.monotonic() + 600, waits
            self.warn(f"{what}; {then}")

    def step(self, state: RunState, **measured: Any) -> None:
        """Write a step line."""
        if not self.on:
            return
        row = self.records.event(
            "step", state.step, state.samples, stage=state.stage, bad_samples=self._bad, **measured
        )
        self._open_board().scalars(row)
        rate, parameters = measured["samples_per_second"], measured["parameters"]
        self.progress.update(
            state.samples, measured["loss"], rate, state.stage, parameters, self._terms(state, measured["losses"])
        )

    def _terms(self, state: RunState, losses: Mapping[str, float | None]) -> list[Term]:
        """The terms of the loss with their weights at this step."""
        done = (state.samples - self.recipe.data.batch) / self.recipe.total_samples
        weights = weights_at(self.recipe.objectives, done)
        return [Term(name, weights[name], value) for name, value in losses.items()]

    def evaluation(self, state: RunState, found: Evaluation, seconds: float) -> None:
        """Write the scores and examples of an evaluation, and update the report."""
        if not self.on:
            return
        if found.bad:
            self.warn(f"{len(found.bad)} evaluation samples cannot be used; the first: {found.bad[0]['reason']}")
        for note in found.notes:
            if note not in self._said:
                self.warn(note)
        self._said.update(found.notes)
        record = {"step": state.step, "samples": state.samples, **found.json(), "bits": bits(found)}
        loss: dict[str, Any] = {}
        if found.held_out:
            held_out = found.held_out.json()
            loss["held_out"] = held_out | {"training": training_beside(held_out, self.records.steps)}
        since = self.records.evaluation_before_growth()
        changed = {"flips": flips(since["bits"], record["bits"]), "since": since["samples"]} if since else {}
        self.records.write_json(f"evaluations/step-{state.step:09d}.json", record)
        self.records.event(
            "eval",
            state.step,
            state.samples,
            scores=found.scores,
            chance=found.chance,
            sizes=found.sizes,
            intervals=found.intervals,
            data=found.data,
            seconds=seconds,
            **changed,
            **loss,
        )
        self._open_board().evaluation(record)
        if found.points and state.samples == self.recipe.total_samples:  # megabytes of text: only at the end
            self._open_board().points(*found.points, state.samples)
        best = [(k, v) for k, v in found.scores.items() if k in found.chance and counts_first(k)]
        if best:
            self.progress.note("scores: " + ", ".join(f"{k} {v:.1%} (chance {found.chance[k]:.1%})" for k, v in best))
        if loss:
            self.progress.note(gap_text(loss["held_out"]))
        self._report_if_cheap()

    def scores(self, state: RunState) -> tuple[dict[str, float], dict[str, float]] | None:
        """Scores and chance levels already recorded for this step; None if it was not evaluated."""
        rows = self.records.metrics.rows() if self.on else []
        found = [row for row in rows if row["event"] == "eval" and row["step"] == state.step]
        return (found[-1]["scores"], found[-1]["chance"]) if found else None

    def bad(self, entries: list[dict[str, Any]]) -> None:
        """Add ledger entries of samples that could not be used."""
        if self.on:
            self.records.ledger.append(*entries)
            self._bad += len(entries)

    def counting(self, what: str) -> AbstractContextManager[Report]:
        """Shows how much of a piece of work between two steps is done."""
        return self.progress.counting(what) if self.on else no_counting(what)

    def lineage(self, state: RunState) -> None:
        """Write the lineage so far."""
        if self.on:
            self.records.write_json("lineage.json", [event.model_dump() for event in state.lineage])

    def report(self) -> Path:
        """Write the report page and return its path."""
        return write_report(self.out) if self.on else self.out / "report.html"

    def _report_if_cheap(self) -> None:
        """Update the report, unless that would take more than a hundredth of the run's time: it reads all records."""
        begun = time.monotonic()
        if begun < self._report_due:
            return
        self.report()
        self._report_due = time.monotonic() + (time.monotonic() - begun) / _REPORTING

    def close(self) -> None:
        """Stop the progress display and close all files."""
        if self.on:
            self.progress.close()
            self.records.close()
            if self._board:
                self._board.close()

    def _open_board(self) -> TensorBoardLog:
        """The TensorBoard log, opened at first use because the import takes a second."""
        if self._board is None:
            self._board = TensorBoardLog(self.out / "tensorboard", purge_step=self._purge)
        return self._board
