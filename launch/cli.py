"""The command line `treering`: what each command takes and prints. What they do stands in the modules they call.

Whatever is slow to import is imported inside the commands, so that a help page comes at once. A person's mistake ends
in one short message and exit code 2; ours keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .errors import RecipeError, RunError, show, user_message

app = typer.Typer(
    help=(
        "Pretrain image-text models that grow while they train.\n\n"
        "Start with `treering train emoji`: it trains, grows, evaluates and reports on this machine. "
        "`treering COMMAND --help` is the manual of a command."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Make shards of pictures and captions, and look into the stream.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A bundled recipe by its name, or the path of a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override values of the recipe: optimizer.lr=3e-4, stages.0.samples=320, model.caption=null.",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; left out: runs/NAME.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

DataUrl = Annotated[str, typer.Argument(metavar="URL", help="samples://NAME, or a glob/brace URL of tar shards.")]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Processes; left out: one a core, 16 for a store.")
]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", help="Processes; left out: one a GPU, or one on the CPU.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace steps 5 to 8 for a browser; the same as log.profile=true.")
    ] = False,
) -> None:
    """Train a recipe on this machine.

    If the run folder has a commit the run continues from it, bit for bit: to resume after a kill, give the same command
    again. Everything is checked before the first process starts. At the end stand the scores, the report, the commit.

        treering train emoji
        treering train emoji --out runs/small data.batch=64 stages='[{samples: 3200}]' schedule.warmup=640
    """
    from .recipes import read_recipe
    from .run import STOPPED, start

    resolved = read_recipe(recipe, [*(overrides or []), *(["log.profile=true"] if profile else [])])
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    try:
        start(resolved, out or Path("runs") / resolved.recipe.name, processes)
    except KeyboardInterrupt:
        raise RunError("interrupted; the same command continues from the last commit", STOPPED) from None


@app.command()
def explain(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the whole recipe, every value with its origin: a line of the file, an override, or a default.

    What is printed is itself a recipe.

        treering explain emoji optimizer.lr=3e-4
    """
    from .recipes import read_recipe

    resolved = read_recipe(recipe, overrides or [])
    if as_json:
        origins = {path: str(origin) for path, origin in resolved.origins.items()}
        _print_json({"recipe": resolved.recipe.model_dump(mode="json"), "origins": origins, "file": str(resolved.file)})
        return
    Console().print(Text(f"{resolved.headline()}\n{resolved.annotated()}"), soft_wrap=True)


@app.command("eval")
def evaluate(
    commit: Annotated[
        str, typer.Argument(metavar="COMMIT", help="A commit's URL, or a run folder for its newest commit.")
    ],
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="A,B", help="zero_shot, retrieval; left out: as in the recipe.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URL", help="Shards to evaluate on; left out: as in the recipe.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a commit and print every score beside what guessing would give.

    treering eval runs/emoji --suite retrieval
    """
    from .evaluation import evaluate_commit
    from .worker import score_table

    suites = [name.strip() for name in suite.split(",")] if suite is not None else None
    found = evaluate_commit(commit, suites, data)
    if as_json:
        _print_json(found)
        return
    console = Console()
    console.print(Text(f"{found['commit']} ({found['samples']:,} samples) on {found['data']}"), soft_wrap=True)
    console.print(score_table(found["scores"], found["chance"]))


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]) -> None:
    """Write the report page of a run again, at any time of its life, and print where it is."""
    from ..training.report import write_report
    from .errors import clean

    try:
        page = write_report(folder)
    except ValueError as error:
        raise RecipeError(clean(str(error))) from None
    Console().print(Text(str(page)), soft_wrap=True)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")], as_json: AsJson = False
) -> None:
    """Say where a run stands: samples, stage, loss, speed, time left, newest commit and scores."""
    from .status import as_table, read_status

    found = read_status(folder)
    if as_json:
        _print_json(found)
    else:
        Console().print(as_table(found))


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Also try to write, read and remove an object here.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders are to be.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Look at what this machine has and lacks for training, with the remedy for each lack.

    Exit code 0 if a run can start here, 1 if something essential is lacking.
    """
    from . import doctor as checks

    found = checks.examine(out, store)
    if as_json:
        _print_json(checks.as_json(found))
    else:
        Console().print(checks.as_table(found))
    if checks.lacks_something(found):
        raise typer.Exit(1)


@data_app.command("pack")
def pack(
    input: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A .tsv or .csv table (picture path, caption), or a folder of key.jpg and key.txt."
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A folder or URL that does not exist yet.")],
    shard_size: Annotated[int, typer.Option("--shard-size", metavar="N", help="Samples in a shard, at most.")] = 1000,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Where the table's paths begin; left out: beside it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pack pictures and captions into tar shards, each picture checked; all of them or none.

    Several lines of a table for one picture are several captions.

        treering data pack captions.tsv shards/photos --images photos/
    """
    from ..data.pack import pack as pack_shards

    packed = pack_shards(input, output, shard_size, images)
    if as_json:
        _print_json({"shards": packed.shards, "samples": packed.samples, "captions": packed.captions})
        return
    shards = packed.shards
    text = f"{packed.samples:,} samples with {packed.captions:,} captions in {len(shards)} shards\n{shards[0]}"
    Console().print(Text(text + (f" to\n{shards[-1]}" if len(shards) > 1 else "")), soft_wrap=True)


@data_app.command("index")
def index(url: DataUrl, workers: Workers = None, as_json: AsJson = False) -> None:
    """Index all shards, in parallel; what was indexed before is not read again.

    A run makes the index itself, shard after shard: this makes its start quick. Exit code 2 if a shard is damaged.

        treering data index 's3://BUCKET/photos/{00000..01023}.tar'
    """
    from . import looking

    found = looking.index_url(url, workers)
    reasons = [fault["reason"] for fault in found["faults"]]
    if as_json:
        _print_json(found)
        raise typer.Exit(2 if reasons else 0)
    whole = found["shards"] - len(reasons)
    text = f"{found['samples']:,} samples in {whole:,} shards, {looking.size(found['bytes'])}"
    Console().print(Text(text), soft_wrap=True)
    if reasons:
        raise RunError(looking.faults_message(found["shards"], reasons), 2)


@data_app.command("lint")
def lint(url: DataUrl, workers: Workers = None, as_json: AsJson = False) -> None:
    """Read and decode every sample as a run would, and list all that it could not use, with the reasons.

    Exit code 0 if everything can be used, 2 if not.

        treering data lint 'shards/photos/*.tar'
    """
    from ..data.lint import lint as lint_url
    from ..data.sweep import enough_workers
    from . import looking

    with looking.progress("samples") as told:
        found = lint_url(url, workers or enough_workers(url), told)
    if as_json:
        _print_json(looking.findings_json(found))
        raise typer.Exit(0 if found.clean else 2)
    console = Console()
    for entry in found.bad:
        console.print(Text(looking.bad_line(entry)), soft_wrap=True)
    if found.bad:
        console.print(looking.reasons_table(found.kinds))
    total = f"{len(found.bad):,} of {found.samples:,} samples in {found.shards:,} shards cannot be used"
    console.print(Text(total), soft_wrap=True)
    if found.faults:
        raise RunError(looking.faults_message(found.shards, [fault.reason for fault in found.faults]), 2)
    raise typer.Exit(0 if found.clean else 2)


@data_app.command("inspect")
def inspect(
    url: DataUrl,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="How many samples to draw.")] = 10_000,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE", help="Write a contact sheet of them here, as one HTML page.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE", help="Show the samples a run's ledger.jsonl names.")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Tell what pictures, captions and labels are like, from N samples drawn by chance, always the same ones.

    The contact sheet shows the first 120 of them. With --ledger: instead, all samples that a run could not use.

        treering data inspect 'shards/photos/*.tar' --out sheet.html
        treering data inspect 'shards/photos/*.tar' --ledger runs/photos/ledger.jsonl
    """
    from .looking import inspect_url, replay_ledger

    if ledger is not None:
        found, text = replay_ledger(url, ledger, out, workers)
    else:
        found, text = inspect_url(url, samples, out, workers)
    if as_json:
        _print_json(found)
        return
    Console().print(text, soft_wrap=True)


@data_app.command("batch")
def batch(
    recipe: RecipeName,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option("--step", metavar="T", min=0, help="Number of the global batch, from 0.")] = 0,
    world: Annotated[int, typer.Option("--world", metavar="W", min=1, help="Processes that share it.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say which samples are in global batch T, and which process reads them; nothing is decoded."""
    from .batches import keys_by_rank

    ranks = keys_by_rank(recipe, overrides or [], step, world)
    if as_json:
        _print_json({"step": step, "world": world, "ranks": ranks})
        return
    for rank, keys in enumerate(ranks):
        print("\n".join(f"rank {rank}  {show(key, 200)[1:-1]}" for key in keys))


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=True, indent=1))


def main() -> None:
    """Entry of the console script."""
    try:
        app()
    except RunError as error:
        code, message = error.code, str(error)
    except Exception as error:
        known = user_message(error)
        if known is None:
            raise
        code, message = 2, known
    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(code)
