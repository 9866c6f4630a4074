"""The `treering data` commands: pack, index, lint, inspect, batch; the work is done in the modules they call."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..arguments import AsJson, Overrides, print_json
from ..errors import RunError

app = typer.Typer(help="Pack, index, check and inspect shards of pictures and captions.", no_args_is_help=True)

DataUrl = Annotated[str, typer.Argument(metavar="URL", help="samples://NAME, or a glob/brace URL of tar shards.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Processes; default: one per core, 16 for a store.")
]


@app.command("pack")
def pack(
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A table (.tsv, .csv, .jsonl: picture path, caption), a folder of key.jpg and key.txt, or shards.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A separate folder or URL for the shards.")],
    shard_size: Annotated[
        str,
        typer.Option(
            "--shard-size", metavar="SIZE", help="Approximate size of a shard, 300MB, or its number of samples, 1000."
        ),
    ] = "300MB",
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Base of the table's paths; default: its own folder.")
    ] = None,
    part: Annotated[
        str,
        typer.Option("--part", metavar="I/N", help="Write one part of the shards; 0/8, 1/8, ... 7/8 together are all."),
    ] = "0/1",
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed of the order of the samples.")] = 0,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Skip samples and rows that could not be used, and list them."),
    ] = False,
    workers: WorkersOption = None,
    as_json: AsJson = False,
) -> None:
    """Pack pictures and captions into tar shards of equal size, in shuffled order, checking each sample.

    After an interruption the same command continues. INPUT may be shards, which are repacked. Several lines of a table
    for one picture are several captions; columns other than path and caption become metadata. Parts may run anywhere,
    at any time, in any order, as in a Slurm array: sbatch --array=0-7 with --part $SLURM_ARRAY_TASK_ID/8.

        treering data pack captions.tsv shards/photos --images photos/
        treering data pack 's3://BUCKET/raw/*.tar' s3://BUCKET/photos --shard-size 1GB --part 0/8
    """
    from ...data.shards.parallel import enough_workers
    from ...data.tools.pack import pack as pack_shards
    from ...training.logging.counting import counting
    from . import data_output

    with counting("shards packed") as report:
        packed = pack_shards(
            input, output, shard_size, images,
            part=part, seed=seed, skip_bad=skip_bad, workers=workers or enough_workers(input), progress=report,
        )  # fmt: skip
    if as_json:
        print_json(asdict(packed))
        return
    Console().print(Text("\n".join(data_output.packed_lines(packed))), soft_wrap=True)


@app.command("index")
def index(
    url: DataUrl,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Also write the indexes to .treering next to the shards, for other machines."),
    ] = False,
    filter: Annotated[
        str | None, typer.Option("--filter", metavar="EXPR", help="Count the samples it accepts, and cache the result.")
    ] = None,
    workers: WorkersOption = None,
    as_json: AsJson = False,
) -> None:
    """Index all shards in parallel; shards that are indexed already are not read again.

    A run creates missing indexes itself; indexing beforehand shortens its start. Exit code 2 if a shard is damaged.

        treering data index 's3://BUCKET/photos/{00000..01023}.tar' --beside --filter 'similarity > 0.28 and not nsfw'
    """
    from . import data_index, data_output

    found = data_index.index_url(url, workers, beside, filter)
    reasons = [fault["reason"] for fault in found["faults"]]
    if as_json:
        print_json(found)
        raise typer.Exit(2 if reasons else 0)
    Console().print(Text(data_index.as_text(found, filter)), soft_wrap=True)
    if reasons:
        raise RunError(data_output.faults_message(found["shards"], reasons), 2)


@app.command("lint")
def lint(
    url: DataUrl,
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", metavar="FILE", help="Write all bad samples to this file, as a run does."),
    ] = None,
    workers: WorkersOption = None,
    as_json: AsJson = False,
) -> None:
    """Read and decode every sample as a run would, and list the unusable ones with reasons.

    After an interruption the same command continues; unchanged shards are not read again. Exit code 0 if every sample
    can be used, 2 if not.

        treering data lint 'shards/photos/*.tar' --ledger bad.jsonl
        treering data inspect 'shards/photos/*.tar' --ledger bad.jsonl --out bad.html
    """
    from ...data.shards.parallel import enough_workers
    from ...data.tools.lint import lint as lint_url
    from ...data.tools.lint import write_ledger
    from ...training.logging.counting import counting
    from . import data_output

    with counting("samples") as report:
        found = lint_url(url, workers or enough_workers(url), report)
    if ledger is not None:
        write_ledger(ledger, found.bad)
    if as_json:
        print_json(data_output.findings_json(found))
        raise typer.Exit(0 if found.clean else 2)
    Console().print(data_output.findings(found, ledger), soft_wrap=True)
    if found.faults:
        raise RunError(data_output.faults_message(found.shards, [fault.reason for fault in found.faults]), 2)
    raise typer.Exit(0 if found.clean else 2)


@app.command("inspect")
def inspect(
    url: DataUrl,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="How many samples to draw.")] = 10_000,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE", help="Write a contact sheet: .html or .png.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE", help="Show the samples listed in a run's ledger.jsonl.")
    ] = None,
    workers: WorkersOption = None,
    as_json: AsJson = False,
) -> None:
    """Print statistics of pictures, captions, labels and columns, from N random samples (always the same ones).

    The contact sheet shows the first 120 of them, and pictures that look alike. With --ledger it shows all samples
    that a run could not use instead.

        treering data inspect 'shards/photos/*.tar' --out sheet.html
        treering data inspect 'shards/photos/*.tar' --ledger runs/photos/ledger.jsonl
    """
    from .data_output import inspect_url, replay_ledger

    if ledger is not None:
        found, text = replay_ledger(url, ledger, out, workers)
    else:
        found, text = inspect_url(url, samples, out, workers)
    if as_json:
        print_json(found)
        return
    Console().print(text, soft_wrap=True)


@app.command("batch")
def batch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe by name or path, or a run folder.")],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option("--step", metavar="T", min=1, help="A step, as in logs and ledger.")] = 1,
    world: Annotated[int, typer.Option("--world", metavar="W", min=1, help="Number of processes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """List the samples that step T trains on: where each lies, its caption, what it replaces, and the rank that reads
    it.

    For a run folder that is the batch which the run reads at this step,
    after rollbacks and stages that ended early.

        treering data batch runs/emoji --step 812 --world 2
    """
    from .data_batch import batch_of
    from .data_output import batch_lines

    found = batch_of(recipe, overrides or [], step, world)
    if as_json:
        print_json(found.json(world))
        return
    print("\n".join(batch_lines(found)))
