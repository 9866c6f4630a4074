"""What a step, commit, evaluation, start and resume cost as a run, its world and its bad samples grow.

    python -m tests.benchmarks.bounds [--quick] [--json]

Each row is one piece of bookkeeping, called by itself on made-up state of two sizes. `exponent` is the slope of its
time between them on logarithmic scales: 0 where the cost does not depend on the size, 1 where it is proportional to it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treering.data.config import DataConfig
from treering.data.ledger import LedgerEntry
from treering.data.loading.loader import Loader
from treering.data.order import Mixture, Order
from treering.models.spec import ImageSpec, ModelSpec, TextSpec
from treering.training.checkpoint.commits import Commits
from treering.training.checkpoint.config import CheckpointConfig
from treering.training.checkpoint.manifest import Manifest
from treering.training.checkpoint.snapshot import commit_name
from treering.training.checkpoint.store import Store
from treering.training.checkpoint.writer import CommitPart
from treering.training.engines.base import StepResult
from treering.training.health.divergence import Health, RecoveryConfig
from treering.training.logging.jsonl import RunRecords
from treering.training.report import write_report
from treering.training.state import Event, RunState
from treering.training.tally import Tally
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=8,
    image=ImageSpec(width=8, depth=1, heads=1, patch=4, resolution=8),
    text=TextSpec(width=8, depth=1, heads=1, context=8),
)
Work = Callable[[], object]


@dataclass(frozen=True)
class Bound:
    """One piece of bookkeeping."""

    when: str
    what: str
    grows_with: str
    sizes: tuple[int, int]
    prepare: Callable[[int, Path], Work]
    """for a size, with an empty folder: what is then timed"""


def _places(world: int, folder: Path) -> Work:
    order = Order(0, [np.full(1000, 10_000)], [Mixture(0, (1.0,))], 65_536)
    order.places(0, 0, world)
    return lambda: order.places(1, 0, world)


class _Source:
    url, skipped = "s3://bucket/{0..9999}.tar", ()

    def __len__(self) -> int:
        return 100_000_000


def _entries(start: int, count: int) -> list[LedgerEntry]:
    url = _Source.url
    return [LedgerEntry(url, f"{n % 10_000}.tar", f"{n:09d}", 0, "damaged: x", n) for n in range(start, start + count)]


def _one_more_bad(known: int, folder: Path) -> Work:
    loader: Any = Loader.__new__(Loader)
    loader.sources, loader._bad = [_Source()], {}
    loader.config = DataConfig.model_validate({"train": [{"source": _Source.url}], "batch": 8, "max_bad_fraction": 0.5})
    loader.check_bad(_entries(0, known))
    one = iter(range(known, 2 * known))
    return lambda: loader.check_bad(_entries(next(one), 1))


class _Gathered(World):
    """A world whose ranks all say what this one does."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return own.expand(self.size, *own.shape[1:])


def _tally(world: int, folder: Path) -> Work:
    tally, result = Tally(_Gathered(0, world, torch.device("cpu"))), StepResult({"a": torch.ones(())}, torch.ones(()))

    def ten_steps() -> None:
        for _ in range(10):
            tally.add(result, {"a": 1.0}, 100)
        tally.take()

    return ten_steps


def _judge(steps: int, folder: Path) -> Work:
    health = Health()
    for step in range(min(steps, 1000)):
        health = health.after_step(RecoveryConfig(), step, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, True)
    return lambda: health.after_step(RecoveryConfig(), steps, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, True)


def _manifest(step: int, **state: Any) -> Manifest:
    run = RunState(step=step, samples=8 * step, attempt=1, **state)
    return Manifest(spec=SPEC, state=run, recipe={}, shapes={}, parts=())


def _retain(kept: int, folder: Path) -> Work:
    """Of a run that keeps one commit in every stretch of samples, and has made `kept` of them."""
    commits = Commits(Store(str(folder)))
    commits.claim_attempt("this benchmark")
    policy = CheckpointConfig(keep=3, keep_every=8)
    with contextlib.suppress(FileNotFoundError):
        for step in range(1, kept + 1):
            commits.seal(commit_name(step, 1), _manifest(step))
    commits.retain(policy, 1)
    numbers = iter(range(kept + 1, 10 * kept + 100))

    def one_commit() -> None:
        step = next(numbers)
        commits.seal(commit_name(step, 1), _manifest(step))
        commits.retain(policy, 1)

    return one_commit


def _seal(ranks: int, folder: Path) -> Work:
    """The first rank's thread, on the reports of all ranks of a sharded engine."""
    names = [f"image.transformer.blocks.{i // 16}.attention.query.{i % 16}.weight" for i in range(400)]
    reports = [
        {
            "file": f"{kind}-{rank:05d}-{n:05d}.safetensors",
            "kind": kind,
            "bytes": 1 << 20,
            "sha256": "0" * 64,
            "tensors": 100,
            "ranges": {name: [rank * 4096, 4096] for name in names[n * 100 : (n + 1) * 100]},
        }
        for rank in range(ranks)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for n in range(4)
    ]

    def parsed() -> None:
        parts = tuple(CommitPart.model_validate(each, strict=False) for each in reports)
        Manifest(spec=SPEC, state=RunState(), recipe={}, shapes={}, parts=parts).encoded()

    return parsed


def _lineage(attempts: int, folder: Path) -> Work:
    events = tuple(
        Event(event="resume", step=n, samples=n, detail={"attempt": n, "hosts": ["a"]}) for n in range(attempts)
    )
    manifest = _manifest(attempts, lineage=events)
    return lambda: Manifest.decoded(manifest.encoded())


def _records(steps: int, folder: Path) -> RunRecords:
    """The records of a run of so many steps, a line every ten of them."""
    row = {"event": "step", "time": 1e9, "loss": 1.0, "losses": {"a": 1.0}, "lr": 1e-3, "grad_norm": 1.0, "stage": 0}
    row |= {"seconds": {"data": 0.0, "compute": 1.0}, "parameters": 10, "samples_per_second": 10.0}
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"event": "start", "step": 0, "samples": 0, "time": 1e9, "seconds": {}}) + "\n")
        for n in range(10, steps + 1, 10):
            file.write(json.dumps({**row, "step": n, "samples": 8 * n, "time": 1e9 + n}) + "\n")
    return RunRecords(folder)


def _evaluated(steps: int, folder: Path) -> Work:
    records = _records(steps, folder)
    return lambda: (records.evaluation_before_growth(), records.event("eval", steps, 8 * steps))


def _report(steps: int, folder: Path) -> Work:
    _records(steps, folder).close()
    return lambda: write_report(folder)


def _cut(steps: int, folder: Path) -> Work:
    records = _records(steps, folder)
    return lambda: records.cut_back(steps, 8 * steps)


def _known_bad(bad: int, folder: Path) -> Work:
    records = RunRecords(folder)
    records.ledger.append(*({"step": 1, **vars_of(entry)} for entry in _entries(0, bad)))
    return records.ledger.rows


def vars_of(entry: LedgerEntry) -> dict[str, Any]:
    """A ledger entry as a row."""
    return {name: getattr(entry, name) for name in entry.__slots__}


def _claim(attempts: int, folder: Path) -> Work:
    for number in range(1, attempts + 1):
        (folder / f"attempt-{number:04d}.json").write_text('{"who": "x", "run": "r"}')
    return lambda: Commits(Store(str(folder))).claim_attempt("this benchmark")


def _names(kept: int, folder: Path) -> Work:
    for step in range(1, kept + 1):
        place = folder / commit_name(step, 1)
        place.mkdir()
        for name in ("COMMIT", "manifest.json"):
            (place / name).touch()
    return lambda: Commits(Store(str(folder))).names()


BOUNDS = (
    Bound("step", "which samples this rank reads, batch 65,536", "world", (64, 4096), _places),
    Bound("step", "one more bad sample", "known bad samples", (1_000, 300_000), _one_more_bad),
    Bound("step", "judged for divergence", "steps", (1_000, 1_000_000), _judge),
    Bound("log line", "ten steps' losses from all ranks", "world", (64, 4096), _tally),
    Bound("commit", "sealed, and old ones removed", "commits kept", (100, 2_000), _retain),
    Bound("commit", "first rank's thread: reports of a sharded engine", "world", (16, 256), _seal),
    Bound("commit", "lineage written and read back", "attempts", (10, 500), _lineage),
    Bound("evaluation", "the evaluation before the last growth", "steps", (10_000, 1_000_000), _evaluated),
    Bound("evaluation", "report (at most a hundredth of the time)", "steps", (10_000, 1_000_000), _report),
    Bound("start", "a new attempt is claimed", "attempts", (10, 500), _claim),
    Bound("start", "commits are listed", "commits kept", (100, 10_000), _names),
    Bound("resume", "records are cut back", "steps", (10_000, 1_000_000), _cut),
    Bound("resume", "bad samples are read", "bad samples", (10_000, 1_000_000), _known_bad),
)


def measure(quick: bool) -> list[tuple[Bound, tuple[int, int], tuple[float, float]]]:
    """Every bound with its sizes and the seconds at each."""
    rows = []
    for bound in BOUNDS:
        small, large = bound.sizes
        sizes = (small, 4 * small) if quick else (small, large)
        seconds = []
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                work = bound.prepare(size, Path(folder))
                seconds.append(min(_timed(work) for _ in range(3)))
        rows.append((bound, sizes, (seconds[0], seconds[1])))
    return rows


def _timed(work: Work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true")
    words.add_argument("--json", action="store_true")
    given = words.parse_args()
    rows = measure(given.quick)
    figures = {}
    if not given.json:
        print("| when | what | grows with | sizes | ms | exponent |\n|---|---|---|---|---|---|")
    for bound, (small, large), (fast, slow) in rows:
        exponent = log(slow / fast) / log(large / small)
        figures[f"{bound.when}: {bound.what}"] = exponent
        if not given.json:
            times = f"{fast * 1e3:.3g}, {slow * 1e3:.3g}"
            row = (bound.when, bound.what, bound.grows_with, f"{small:,}, {large:,}", times, f"{exponent:.2f}")
            print(f"| {' | '.join(row)} |")
    if given.json:
        print(json.dumps({"benchmark": "bounds", "device": "CPU", "versions": {}, "figures": figures}))


if __name__ == "__main__":
    main()
