"""The command line `treering`: the arguments and output of each command; the work is done in the modules they call.

Slow imports happen inside the commands, so that help pages appear at once. A user's mistake ends in one short message
and exit code 2; a bug keeps its traceback.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from ..data.storage.credentials import holds_secret
from .arguments import AsJson, Overrides, RecipeName, print_json
from .commands import data, jobs
from .errors import RecipeError, RunError, show, user_message
from .run_folder import is_first_process

app = typer.Typer(
    help=(
        "Pretrain image-text models that grow while they train.\n\n"
        "Start with `treering train emoji`: it trains, grows, evaluates and reports on this machine. "
        "`treering COMMAND --help` explains a command."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")

Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; default: runs/NAME.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"treering {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the name of a command."""


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = None,
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", help="Processes; default: one per GPU, or one on the CPU.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace steps 5 to 8; the same as log.profile=true.")
    ] = False,
    origin: Annotated[
        str | None,
        typer.Option("--from", metavar="COMMIT", help="Start a new run from a commit, or a run's newest."),
    ] = None,
    load: Annotated[
        str,
        typer.Option(
            "--load", metavar="WHAT", help="What to load from --from: weights, or all (weights, optimizer, position)."
        ),
    ] = "weights",
) -> None:
    """Train a recipe on this machine.

    If the run folder has a commit, the run continues from it bit for bit: to resume after a kill, repeat the command.
    Everything is checked before the first process starts. The last lines show the scores, the report and the commit.

        treering train emoji
        treering train emoji --out runs/small data.batch=64 stages='[{samples: 3200}]' schedule.warmup=640
        treering train emoji --out runs/again --from runs/emoji seed=1
    """
    from . import run
    from .run_folder import STOPPED

    traced = ["log.profile=true"] if profile else []
    source = [f"init_from={json.dumps({'commit': origin, 'load': load})}"] if origin else []
    try:
        run.train(recipe, [*(overrides or []), *traced, *source], out, processes)
    except KeyboardInterrupt:
        raise RunError("interrupted; the same command continues from the last commit", STOPPED) from None


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print the file of this one, to be edited; default: list all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the bundled recipes: what each trains, and the command, machine, time and score to expect.

    With a name, print that recipe's file, with its comments: what a recipe of your own begins with. Nothing is
    trained or written.

        treering recipes
        treering recipes photos > mine.yaml
    """
    from .commands import recipes as bundled

    if name is None:
        found: Any = bundled.list_recipes()
        text = bundled.as_text(found)
    else:
        text = (found := bundled.read_bundled(name))["text"].rstrip("\n")
    if as_json:
        print_json(found)
    else:
        Console().print(Text(text), soft_wrap=True)


@app.command()
def explain(recipe: RecipeName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the complete recipe, each value with its origin: a line of the file, an override, or a default.

    The output is itself a valid recipe.

        treering explain emoji optimizer.lr=3e-4
    """
    from .recipe.load import read_recipe

    resolved = read_recipe(recipe, overrides or [])
    if as_json:
        origins = {path: str(origin) for path, origin in resolved.origins.items()}
        print_json({"recipe": resolved.recipe.model_dump(mode="json"), "origins": origins, "file": str(resolved.file)})
        return
    Console().print(Text(f"{resolved.headline()}\n{resolved.annotated()}"), soft_wrap=True)


@app.command("eval")
def evaluate(
    commit: Annotated[
        str,
        typer.Argument(
            metavar="COMMIT",
            help="A commit's URL, a run folder for its newest commit, or open_clip:ARCHITECTURE/TAG (also =FILE).",
        ),
    ],
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            metavar="A,B",
            help="YAML files, and retrieval, zero_shot, geometry, captioning; default: those of the recipe.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URL", help="Shards to evaluate on; default: those of the recipe.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="OLD", help="An older commit: can COMMIT search the index that it built?"),
    ] = None,
    texts: Annotated[int, typer.Option("--texts", min=16, help="Captions to learn the map to OLD from.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Evaluate a commit and print every score with its 95% interval and its chance level.

    Embeddings are cached, so repeating a commit on the same data is quick.
    Under torchrun or srun all ranks take part.

        treering eval runs/emoji --suite retrieval
        treering eval s3://BUCKET/emoji --suite pets.yaml,flickr.yaml,retrieval
        treering eval open_clip:ViT-B-32/laion2b_s34b_b79k --suite pets.yaml
    """
    from .commands.eval import compare_commits, compatibility_table, evaluate_commit, evaluation_parts

    if against is not None:
        compared = compare_commits(commit, against, data, texts)
        if as_json:
            print_json(compared)
        else:
            Console().print(compatibility_table(compared))
        return

    found = evaluate_commit(commit, _listed(suite), data)
    if not is_first_process():
        return
    if as_json:
        print_json(found)
        return
    for part in evaluation_parts(found):
        Console().print(part, soft_wrap=isinstance(part, Text))


@app.command()
def compare(
    commits: Annotated[
        list[str],
        typer.Argument(metavar="A B [C]", help="Commits' URLs, or run folders for their newest; A is the baseline."),
    ],
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="X,Y", help="As in `treering eval`; default: those of A's recipe.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URL", help="For built-in suites; default: that of A's recipe.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="PAGE", help="Where to write the page.")] = Path(
        "comparison.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Show where models differ significantly.

    The table and the page have every score, with the difference and its interval;
    the page also shows the examples that each model lost and won.

        treering compare runs/emoji runs/other
        treering compare runs/emoji s3://BUCKET/emoji/step-000000000562-attempt-0001 --suite pets.yaml,retrieval
    """
    from ..data.storage.atomic_write import atomic_write
    from ..training.report.comparison_page import held_out_losses, render_comparison
    from .commands.compare import compare_runs, comparison_table

    found = compare_runs(commits, _listed(suite), data)
    if not is_first_process():
        return
    atomic_write(out, render_comparison(found), durable=True)
    if as_json:
        print_json({**found, "page": str(out)})
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)  # do not wrap lines in a file
    console.print(comparison_table(found))
    if losses := held_out_losses(found["models"]):
        console.print(Text(losses), soft_wrap=True)
    console.print(Text(f"page  {out}"), soft_wrap=True)


def _listed(suites: str | None) -> list[str] | None:
    return [name.strip() for name in suites.split(",")] if suites is not None else None


@app.command()
def grow(
    commit: Annotated[
        str, typer.Argument(metavar="COMMIT", help="A commit's URL, or a run folder for its newest commit.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="URL", help="A new run folder, or the URL of an empty store.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="As in a stage: samples=40000, width_init=noise, depth_init=zero, moments=map."
        ),
    ] = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="SIZE=N", help="Sizes to reach: image.depth=12,text.depth=8.")
    ] = None,
    shrink: Annotated[
        list[str] | None, typer.Option("--shrink", metavar="SIZE=N", help="Smaller sizes to reach; lossy.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Grow a commit offline, one tensor in memory at a time, and write the recipe that continues its training.

    The new commit equals that of a run that grew at this step. The grown model trains for the rest of the commit's
    stage and then for the stages that follow; or for samples=N, and then the run ends.

        treering grow runs/emoji --to image.depth=12 --out runs/emoji-12 samples=48000
    """
    from .commands.grow import grow_offline

    found = grow_offline(commit, to or [], shrink or [], options or [], out)
    if as_json:
        print_json(found)
        return
    before, after = found["parameters_before"], found["parameters_after"]
    sizes = ", ".join(f"{path} {found['from'][path]} to {size}" for path, size in found["to"].items())
    lossy = [step["operator"] for step in found["operators"] if step.get("lossy")]
    kept = f"lossy: {', '.join(lossy)}" if lossy else "same function as before"
    text = f"{sizes}; {before:,} to {after:,} parameters; {kept}\ncommit  {found['commit']}\n"
    Console().print(Text(f"{text}next    {shlex.join(found['continue'])}"), soft_wrap=True)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="open_clip:ARCHITECTURE/TAG, open_clip:ARCHITECTURE=FILE, open_clip:local-dir:FOLDER.",
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="URL", help="A new run folder, or the URL of an empty store.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="URL", help="Shards that the recipe trains on; default: left open in the recipe."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json, for weights that do not use CLIP's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Import open_clip weights as a commit, and write a recipe that continues their training.

    A tag is downloaded by open_clip. A file is read without executing anything in it. The commit can be evaluated,
    grown, trained further and exported like any other.

        treering import open_clip:ViT-B-32/laion2b_s34b_b79k --to runs/b32
        treering import open_clip:ViT-B-32/laion2b_s34b_b79k=b32.safetensors --to s3://BUCKET/b32
    """
    from .commands.import_ import import_weights

    found = import_weights(source, to, data, tokenizer)
    if as_json:
        print_json(found)
        return
    rows = [f"{name:<12} {found[name]}" for name in ("source", "weights", "parameters", "commit", "recipe")]
    rows += [f"{'note':<12} {note}" for note in found["notes"]]
    Console().print(Text("\n".join([*rows, f"{'next':<12} {shlex.join(found['continue'])}"])), soft_wrap=True)


@app.command("export")
def export(
    commit: Annotated[
        str, typer.Argument(metavar="COMMIT", help="A commit's URL, or a run folder for its newest commit.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="safetensors, or open_clip.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="WHICH", help="model or ema; default: ema if the run keeps it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a commit for other programs, with the model's config and its lineage.

    open_clip.create_model("local-dir:DIR") loads the folder of --to open_clip; a model that open_clip cannot represent
    is refused with every reason.

        treering export runs/emoji --to safetensors --out emoji-weights
        treering export runs/b32 --to open_clip --out b32-weights
    """
    from .commands.export import export_commit

    found = export_commit(commit, to, out, weights)
    if as_json:
        print_json(found)
        return
    rows = [f"{name:<12} {value}" for name, value in found.items()]
    Console().print(Text("\n".join(rows)), soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or of a sweep.")]) -> None:
    """Write the report page of a run or a sweep anew, also while it trains, and print its path."""
    from ..training.report import write_report
    from .errors import safe_text

    try:
        page = write_report(folder)
    except ValueError as error:
        raise RecipeError(safe_text(str(error))) from None
    Console().print(Text(str(page)), soft_wrap=True)


@app.command()
def status(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A folder of a run or a sweep, or the URL of a run's commits.")
    ],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every two seconds until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the status of a run: state, nodes, samples, stage, loss, speed, time left, newest commit and scores."""
    from .commands import status as reading
    from .commands.status import as_table, read_status

    if watch and not as_json:
        try:
            return reading.watch(run)
        except KeyboardInterrupt:
            raise RunError("no longer watching; the run continues", 0) from None
    found = read_status(run)
    if as_json:
        print_json(found)
    else:
        Console().print(as_table(found))


@app.command()
def doctor(
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Also write, read and remove a test object here.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where run folders will lie.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check what this machine has and lacks for training, with a remedy for each lack.

    Exit code 0 if a run can start here, 1 if something essential is missing.
    """
    from ..training.logging.counting import waiting
    from .commands import doctor as checks

    with waiting("checking this machine"):
        found = checks.run_checks(out, store)
    if as_json:
        print_json(checks.as_json(found))
    else:
        Console().print(checks.as_table(found))
    if checks.lacks_something(found):
        raise typer.Exit(1)


jobs.add_to(app)


def _refuse_secrets(words: list[str]) -> None:
    """Raise RecipeError if a word is a URL with credentials, which would reach files, logs and the list of processes.

    Overrides are checked with the recipe.
    """
    for word in words:
        if not re.match(r"[\w.]+=", word) and holds_secret(word):
            raise RecipeError(
                f"{show(word)} held credentials inside a URL; remove them, and set environment variables (such as "
                "AWS_PROFILE) or a credentials file instead"
            )


def main() -> None:
    """Entry point of the console script."""
    try:
        _refuse_secrets(sys.argv[1:])
        app()
    except RunError as error:
        code, message = error.code, str(error)
    except Exception as error:
        known = user_message(error)
        if known is None:
            raise
        code, message = 2, known
    with suppress(OSError, SystemExit):  # the terminal was closed
        Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(code)
