"""Starts a run on this machine: checks everything that can be checked, writes the recipe to the run folder, trains.

The one idea: nothing is written and no process starts before the recipe, the sources, the disk and the store have been
checked. A single process trains in this one, which starts fastest; several are started by torchrun's elastic agent, as
on a cluster, and only the first failure among them is reported.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from ..data.storage.atomic_write import atomic_write
from ..data.storage.files import shown_url
from ..models.flops import parameters
from ..training.health.signals import is_ignored
from ..training.health.watchdog import HUNG, LOST
from ..training.logging.counting import counting, waiting
from ..training.recipe import Recipe
from .errors import RecipeError, RunError, show
from .recipe.load import ResolvedRecipe, read_recipe
from .run_folder import LAUNCHER, RECIPE_FILE, STOPPED, read_rows
from .runtimes import share_cores
from .worker import work

if TYPE_CHECKING:
    from ..data.identity import SourceIdentity
    from ..training.checkpoint.manifest import Commit

RENDEZVOUS_SECONDS = 600
SHUTDOWN_SECONDS = 120  # time for a worker to commit between SIGTERM and SIGKILL
_RESERVE = 64 << 20


def train(
    recipe: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, processes: int | None = None
) -> Path:
    """Train a recipe on this machine and return the run folder; `treering train` in Python.

    `recipe` is the name of a bundled recipe or a YAML file, `overrides` are as on the command line (`data.batch=64`),
    `out` is the run folder (None: runs/NAME), `processes` None is one per GPU, or one on the CPU. A single process
    trains inside the caller's. If the folder has a commit, the run continues from it. Raises RecipeError, DataError,
    StoreError or OSError before anything is written, and RunError if a process fails.
    """
    resolved = read_recipe(str(recipe), list(overrides))
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    folder = Path(out) if out is not None else Path("runs") / resolved.recipe.name
    start(resolved, folder, processes)
    return folder


def start(resolved: ResolvedRecipe, out: Path, processes: int) -> None:
    """Train `resolved` in folder `out` with `processes` processes; continues from the run's newest commit, if any.

    Raises RecipeError, DataError, StoreError or OSError before anything is written, and RunError if a process fails.
    """
    recipe = resolved.recipe
    check(recipe, out, processes)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / RECIPE_FILE, resolved.text, durable=True)
    share_cores(processes)
    if processes == 1:
        work(out)
    else:
        launch_workers(out, processes, name=str(os.getpid()))


def check(recipe: Recipe, out: Path, processes: int) -> None:
    """Check everything that must hold before a run starts, the cheapest first. Raises as `start`."""
    if processes < 1:
        raise RecipeError(f"--processes {processes} must be 1 or more")
    try:
        recipe.check_world(processes)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {show(str(out))} is a file; give a folder")
    _check_disk(recipe, out)
    found = check_sources(recipe)
    with waiting(f"checking {shown_url(recipe.commits_url(out))}"):
        commit = check_store(recipe, out)
    check_data(recipe, commit, found)
    check_memory(recipe, processes)


def check_memory(recipe: Recipe, processes: int) -> None:
    """Check, where there are GPUs, that every stage fits one, by the estimate of `treering plan`: a run should not
    learn after days that its growth does not. Warns where it is close."""
    import torch

    if not torch.cuda.is_available():
        return
    from ..training.device import memory
    from .commands.plan import shortage

    wrong, close = shortage(recipe, processes, memory(torch.device("cuda", 0)))
    if wrong:
        raise RecipeError(wrong)
    if close:
        Console(stderr=True).print(Text(f"warning: {close}"), soft_wrap=True)


def _check_disk(recipe: Recipe, out: Path) -> None:
    from ..training.checkpoint.store import Store

    url = recipe.commits_url(out)
    local = "://" not in url or url.startswith("file://")
    place = Path(url.removeprefix("file://")) if local else out
    commit = 12 * max(parameters(spec) for spec in recipe.specs())  # fp32: weight and two moments
    there = sum(Store(url).beginning("step-").values()) if local else 0
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = _RESERVE + (max(0, (recipe.checkpoint.keep + 1) * commit - there) if local else 0)
    if free < needed:
        keep = recipe.checkpoint.keep
        raise RecipeError(
            f"{show(str(existing))} has {free / 1e9:.2f} GB free, and the run's commits need about {needed / 1e9:.2f} "
            f"GB; free some space, keep fewer commits (checkpoint.keep, now {keep}), or give another --out"
        )


def check_sources(recipe: Recipe) -> list[SourceIdentity]:
    """Open every source once, which lists and indexes its shards (and packs those of samples://); returns what
    identifies the samples of each."""
    from ..data.shards.source import open_source
    from ..data.storage.block_cache import BlockCache
    from .commands.data_index import source_notes

    cache, found = BlockCache(recipe.data.cache.bytes), []
    for each in recipe.data.train:
        with counting(f"{shown_url(each.source)}: shards read") as progress:
            source = open_source(each.source, cache, each.filter, recipe.data.bad_shards, progress=progress)
        for line in source_notes(source, each.filter):
            Console(stderr=True).print(Text(line), soft_wrap=True)
        found.append(source.identity)
    eval_data = recipe.evaluation_source if recipe.eval.built_in else recipe.eval.data
    if eval_data and eval_data not in {each.source for each in recipe.data.train}:
        from ..training.evaluate.suites import check_shards

        check_shards(eval_data)
        with counting(f"{shown_url(eval_data)}: shards read") as progress:
            open_source(eval_data, cache, progress=progress)
    if recipe.eval.suites:
        from ..training.evaluate.protocols import check_suites

        with waiting("opening the data of the suites"):
            check_suites(recipe.eval)
    return found


def check_store(recipe: Recipe, out: Path) -> Commit | None:
    """Check that the store works, and that this recipe can continue the newest commit in it; returns that, if any."""
    from ..training.checkpoint.commits import Commits
    from ..training.checkpoint.manifest import DamagedCommit
    from ..training.checkpoint.store import Store
    from ..training.starting.init_from import open_origin
    from ..training.starting.resume import check_same_run

    store = Store(recipe.commits_url(out))
    commits = Commits(store)
    if recipe.init_from and not commits.names():
        open_origin(recipe)
    store.check()
    for name in commits.names()[-1:]:
        try:
            commit = commits.verified(name)
            check_same_run(recipe, commit)
            return commit
        except DamagedCommit:
            break  # the run reports it and resumes from the one before
    return None


def check_data(recipe: Recipe, commit: Commit | None, found: Sequence[SourceIdentity]) -> None:
    """Check that the sources, as `check_sources` found them, are those that the run of a commit has read."""
    from ..training.starting.same_data import check_same_data

    if commit is not None:
        check_same_data(recipe, commit.manifest.state, found, commit.store.url)


def launch_workers(
    out: Path,
    processes: int,
    nodes: int = 1,
    head: str = "127.0.0.1:0",
    name: str = "local",
    address: str = "127.0.0.1",
    is_head: bool = True,
    signals: str = "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
) -> None:
    """Start this node's worker processes under torchrun's elastic agent and wait for them.

    `head` is the rendezvous endpoint of all `nodes`; the agent on the node that `is_head` hosts it. `name` is the same
    on every node, `address` is this node's. On `signals` the agent ends its processes; the caller handles others.
    Raises RunError with the first failure of this node.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs every failure
    # Before torch 2.13 the agent lacks this setting and waits 30 seconds.
    newer: dict[str, Any] = {"shutdown_timeout": SHUTDOWN_SECONDS}
    shutdown = newer if newer.keys() <= signature(LaunchConfig).parameters.keys() else {}
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=f"treering-{name}",
        rdzv_backend="c10d",
        rdzv_endpoint=head,
        rdzv_configs={"timeout": RENDEZVOUS_SECONDS} | ({"is_host": is_head} if nodes > 1 else {}),
        local_addr=address,
        max_restarts=0,
        signals_to_handle=",".join(name for name in signals.split(",") if not is_ignored(signal.Signals[name])),
        **shutdown,
    )
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "treering.launch.worker", str(out))
    except ChildFailedError as error:
        raise _first_failure(error, out) from None
    except SignalException as error:
        signal_name = signal.Signals(error.sigval).name
        message = f"stopped by {signal_name}; the same command continues from the last commit"
        raise RunError(message, STOPPED) from None


def _first_failure(error: Any, out: Path) -> RunError:
    """The error of the process that failed first, from its error file, or else how it died.

    The agent ends the others by SIGTERM and counts them as failed within the same second, so time alone does not
    identify the cause: processes that wrote an error file rank first, those ended by the agent last.
    """
    failures = []
    for rank, failure in error.failures.items():
        left = failure.error_file_data.get("message")
        if isinstance(left, dict) and "time" in left:
            failures.append((0, left["time"], RunError(left["message"], left["code"], left.get("kind", ""))))
            continue
        died = f"process {rank} ended with exit code {failure.exitcode} and left no error message"
        if failure.exitcode == HUNG:
            message = next(iter(read_rows(out / "hangs.jsonl")[-1:]), {}).get("message", "")
            died = f"process {rank} waited without progress: {message}; stacks in {out / 'hang.txt'}"
        if failure.exitcode == LOST:
            died = f"process {rank} ended because another attempt of the run has started"
        if failure.exitcode < 0:
            died = f"process {rank} was killed by {failure.signal_name()}"
        if failure.exitcode == -signal.SIGKILL:
            died += "; if memory ran out, start fewer --processes or set a smaller data.batch"
        ended_by_agent = failure.exitcode == -signal.SIGTERM
        failures.append((2 if ended_by_agent else 1, failure.timestamp, RunError(died, 1)))
    return min(failures, key=lambda item: item[:2])[2]
