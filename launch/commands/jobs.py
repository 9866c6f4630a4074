"""The commands for jobs: submit, stop, logs, plan; the work is done in the modules they call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from ...data.units import counted
from ..arguments import AsJson, Overrides, RecipeName, print_json
from ..errors import RecipeError, RunError, safe_text

if TYPE_CHECKING:
    from ..jobs.submit import Job

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
RunOrSweep = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a sweep.")]


def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[
        str, typer.Option("--nodes", metavar="N", help="Nodes; 2-8: as many as each attempt can get.")
    ] = "1",
    gpus: Annotated[
        int | None, typer.Option("--gpus-per-node", metavar="G", min=0, help="GPUs per node; one process each.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes-per-node", metavar="P", min=1, help="Processes per node without GPUs.")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="P")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="A")] = None,
    qos: Annotated[str | None, typer.Option("--qos", metavar="Q")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="T", help="30, 2:00:00 or 1-00:00:00.")] = None,
    constraint: Annotated[str | None, typer.Option("--constraint", metavar="C")] = None,
    after: Annotated[
        int | None, typer.Option("--after", metavar="JOB", min=1, help="Start after this job has ended.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=A,B", help="One run per value, as a job array; repeat for a grid."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run folder, on a shared disk; default: runs/NAME.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the batch script only.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe under Slurm: check it and the cluster, submit one job, print its number.

    The job commits when Slurm warns it, requeues itself, and restarts after a crash. Settings of the site for every job
    are in ~/.config/treering/site.yaml or $TREERING_SITE.

        treering submit emoji --nodes 2 --processes-per-node 2 checkpoint.to=s3://BUCKET/emoji
    """
    from ..jobs import submit as submitting
    from ..jobs.cluster_config import read_site
    from ..jobs.sweep import grid_points, write_sweep
    from ..recipe.load import read_recipe

    request = submitting.JobRequest(nodes, processes, gpus, partition, account, qos, time, constraint, after)
    given = overrides or []
    base_recipe = read_recipe(recipe, given).recipe
    base = out or Path("runs") / base_recipe.name
    points = grid_points(sweep or [], base_recipe.checkpoint.to)
    runs = [(base / point.name, read_recipe(recipe, [*given, *point.overrides])) for point in points]
    job = submitting.prepare_job(runs, request, read_site())
    console = Console(stderr=True)
    for note in job.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if dry_run:
        print(job.script, end="")
        return
    if sweep:
        write_sweep(base, points)
    _show_submitted(submitting.submit(job), job, base, as_json)


def _show_submitted(number: int, job: Job, base: Path, as_json: bool) -> None:
    """Print the number of a submitted job, and the commands that follow it."""
    folders = [str(folder) for folder, _ in job.runs]
    if as_json:
        print_json({"job": number, "runs": folders, "nodes": job.nodes, "processes": job.processes})
        return
    size = f"{counted(job.nodes[0], 'node')} x {counted(job.processes, 'process')}"
    about = f"job {number}: {size}, {counted(len(folders), 'run')} in {base}"
    follow = [f"treering status --watch {base}", f"treering logs --follow {folders[0]}", f"treering stop {base}"]
    print("\n".join([safe_text(about), *(safe_text(line) for line in follow)]))


def stop(run: RunOrSweep) -> None:
    """Commit the run at its next step, then end its job; the same `treering submit` continues it.

    For a sweep: all its runs.
    """
    from ..jobs.stop import stop_run
    from ..jobs.sweep import is_sweep, members

    if not is_sweep(run):
        return print(safe_text(stop_run(run)))
    stopped = 0
    for folder in members(run):
        try:
            print(safe_text(f"{folder.name}: {stop_run(folder)}"))
            stopped += 1
        except RecipeError as nothing_runs:
            print(safe_text(f"{folder.name}: {nothing_runs}"))
    if not stopped:
        raise RecipeError(f"no run of the sweep in {safe_text(str(run))} can be stopped here")


def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option("--rank", metavar="R", min=0, help="The log of one process.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing what is added.")] = False,
) -> None:
    """Print the log of a job over all attempts: of its script and first process, or of the process of one rank."""
    import time

    from ..jobs.sweep import is_sweep, members

    if is_sweep(run):
        begun = [str(folder) for folder in members(run) if (folder / "job.log").is_file()]
        few = f"such as treering logs {begun[0]}" if begun else "none of its runs has started"
        raise RecipeError(
            f"{safe_text(str(run))} is a sweep, and each of its runs has a log of its own; {safe_text(few)}"
        )
    path = run / "logs" / f"rank-{rank:05d}.log" if rank else run / "job.log"
    if not path.is_file():
        known = sorted(int(file.stem.rpartition("-")[2]) for file in (run / "logs").glob("rank-*.log"))
        remedy = f"ranks with a log: 0, {', '.join(map(str, known))}" if known else "no job of this run has started"
        raise RecipeError(f"there is no {safe_text(str(path))}; {remedy}")
    try:
        read = 0
        while True:
            with path.open("rb") as file:  # each attempt has a new file that begins with a copy of the old one
                file.seek(read)
                for line in file:
                    print(safe_text(line.decode(errors="replace").rstrip("\n")), flush=follow)
                read = file.tell()
            if not follow:
                return
            time.sleep(1)
    except KeyboardInterrupt:
        raise RunError("", 0) from None


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1)] = 1,
    per_node: Annotated[int, typer.Option("--gpus-per-node", metavar="G", min=1)] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="D", help="Such as a100, h100, h100-pcie, h200 or cpu; default: this machine's."
        ),
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", metavar="F", help="Model FLOPs utilisation: the fraction of the peak reached.")
    ] = 0.4,
    price: Annotated[float | None, typer.Option("--price", metavar="P", help="Price of a device hour.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run needs before it starts.

    That is memory, time, loader, network, store and cost.
    Warnings say what will fail or be slow.

        treering plan photos --nodes 4 --gpus-per-node 8 --device h100 'data.train=[{source: shards/photos/*.tar}]'
    """
    from ..recipe.load import read_recipe
    from . import plan as planning

    found = planning.plan(read_recipe(recipe, overrides or []).recipe, nodes, per_node, device, mfu, price)
    if as_json:
        print_json(found)
    else:
        screen = Console()
        screen.print(planning.as_table(found, screen.width))


def add_to(app: typer.Typer) -> None:
    """Register the commands with `app`."""
    for command in (submit, stop, logs, plan):
        app.command()(command)
