"""The command line `treering`: what each command takes and prints. What they do stands in the modules they call.

Whatever is slow to import is imported inside the commands, so that a help page comes at once. A person's mistake ends
in one short message and exit code 2; ours keeps its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import job_commands
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
    origin: Annotated[
        str | None,
        typer.Option("--from", metavar="COMMIT", help="Begin a new run with this commit, or a run's newest one."),
    ] = None,
    carry: Annotated[
        str, typer.Option("--carry", metavar="WHAT", help="Of --from: weights, or all, the optimizer and place too.")
    ] = "weights",
) -> None:
    """Train a recipe on this machine.

    If the run folder has a commit the run continues from it, bit for bit: to resume after a kill, give the same command
    again. Everything is checked before the first process starts. At the end stand the scores, the report, the commit.

        treering train emoji
        treering train emoji --out runs/small data.batch=64 stages='[{samples: 3200}]' schedule.warmup=640
        treering train emoji --out runs/again --from runs/emoji seed=1
    """
    from .recipes import read_recipe
    from .run import STOPPED, start

    traced = ["log.profile=true"] if profile else []
    beginning = [f"origin={json.dumps({'commit': origin, 'carry': carry})}"] if origin else []
    resolved = read_recipe(recipe, [*(overrides or []), *traced, *beginning])
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
        str | None,
        typer.Option(
            "--suite",
            metavar="A,B",
            help="YAML files, and retrieval, zero_shot, geometry, captioning; left out: as in the recipe.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URL", help="Shards to evaluate on; left out: as in the recipe.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="OLD", help="An older commit: does what it indexed serve this one?"),
    ] = None,
    texts: Annotated[int, typer.Option("--texts", min=16, help="Captions to learn the map to OLD from.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Evaluate a commit and print every score with its 95% interval beside what guessing would give.

    Embeddings are kept, so the same commit on the same data is quick. Under torchrun or srun, all ranks share the work.

        treering eval runs/emoji --suite retrieval
        treering eval s3://BUCKET/emoji --suite pets.yaml,flickr.yaml,retrieval
    """
    from .evaluation import compare_commits, compatibility_table, evaluate_commit
    from .worker import score_table

    if against is not None:
        compared = compare_commits(commit, against, data, texts)
        if as_json:
            _print_json(compared)
        else:
            Console().print(compatibility_table(compared))
        return

    found = evaluate_commit(commit, _listed(suite), data)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        _print_json(found)
        return
    console = Console()
    on = f" on {found['data']}" if found["data"] else ""
    console.print(Text(f"{found['commit']} ({found['samples']:,} samples){on}"), soft_wrap=True)
    console.print(score_table(found["scores"], found["chance"], found["intervals"]))


@app.command()
def compare(
    commits: Annotated[
        list[str],
        typer.Argument(metavar="A B [C]", help="Commits' URLs, or run folders for their newest; A is compared with."),
    ],
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="X,Y", help="As in `treering eval`; left out: as in A's recipe.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="URL", help="For built-in suites; left out: as in A's recipe.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="PAGE", help="Where to write the page.")] = Path(
        "comparison.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Say where models differ, by more than luck: every score, what each lost and won, as a table and as a page.

    treering compare runs/emoji runs/other
    treering compare runs/emoji s3://BUCKET/emoji/step-000000000562-life-0001 --suite pets.yaml,retrieval
    """
    from ..training.report.comparison import render_comparison
    from .comparing import compare_runs, comparison_table
    from .run import write_file

    found = compare_runs(commits, _listed(suite), data)
    if os.environ.get("RANK", "0") != "0":
        return
    write_file(out, render_comparison(found))
    if as_json:
        _print_json({**found, "page": str(out)})
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)  # a file takes whole lines
    console.print(comparison_table(found))
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
            metavar="KEY=VALUE", help="As in a stage: samples=40000, copies=noise, layers=zero, moments=map."
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
    """Grow a commit offline, in memory for one tensor, and write the recipe that trains it on.

    The new commit is what a run would have had that grew there. The grown model trains for what is left of the commit's
    stage, and then in the stages that were to follow; or for samples=N, and then the run ends.

        treering grow runs/emoji --to image.depth=12 --out runs/emoji-12 samples=48000
    """
    from .growing import grow_offline

    found = grow_offline(commit, to or [], shrink or [], options or [], out)
    if as_json:
        _print_json(found)
        return
    before, after = found["parameters_before"], found["parameters_after"]
    sizes = ", ".join(f"{path} {found['from'][path]} to {size}" for path, size in found["to"].items())
    lossy = [step["operator"] for step in found["operators"] if step.get("lossy")]
    kept = f"lossy: {', '.join(lossy)}" if lossy else "computes what it computed before"
    text = f"{sizes}; {before:,} to {after:,} parameters; {kept}\ncommit  {found['commit']}\n"
    Console().print(Text(f"{text}next    {' '.join(found['continue'])}"), soft_wrap=True)


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
        typer.Option("--data", metavar="URL", help="Shards that the recipe trains on; left out: samples://emoji."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json, for weights that do not use CLIP's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take over weights of open_clip as a commit, and write a recipe that trains them on.

    A tag is fetched by open_clip's own download. A file is read without running anything in it. The commit can be
    evaluated, grown, trained on and exported like any other.

        treering import open_clip:ViT-B-32/laion2b_s34b_b79k --to runs/b32
        treering import open_clip:ViT-B-32/laion2b_s34b_b79k=b32.safetensors --to s3://BUCKET/b32
    """
    from .importing import import_weights

    found = import_weights(source, to, data, tokenizer)
    if as_json:
        _print_json(found)
        return
    rows = [f"{name:<12} {found[name]}" for name in ("source", "weights", "parameters", "commit", "recipe")]
    rows += [f"{'note':<12} {note}" for note in found["notes"]]
    Console().print(Text("\n".join([*rows, f"{'next':<12} {' '.join(found['continue'])}"])), soft_wrap=True)


@app.command("export")
def export(
    commit: Annotated[
        str, typer.Argument(metavar="COMMIT", help="A commit's URL, or a run folder for its newest commit.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="safetensors, or open_clip.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="WHICH", help="model or ema; left out: ema if the run keeps it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a commit for other programs, with what the model is and where it came from beside them.

    The folder of --to open_clip is what open_clip.create_model("local-dir:DIR") loads; a model that it cannot hold is
    refused with every reason.

        treering export runs/emoji --to safetensors --out emoji-weights
        treering export runs/b32 --to open_clip --out b32-weights
    """
    from .exporting import export_commit

    found = export_commit(commit, to, out, weights)
    if as_json:
        _print_json(found)
        return
    rows = [f"{name:<12} {value}" for name, value in found.items()]
    Console().print(Text("\n".join(rows)), soft_wrap=True)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or of a sweep.")]) -> None:
    """Write the report page of a run or a sweep again, at any time of its life, and print where it is."""
    from ..training.report import write_report
    from .errors import clean

    try:
        page = write_report(folder)
    except ValueError as error:
        raise RecipeError(clean(str(error))) from None
    Console().print(Text(str(page)), soft_wrap=True)


@app.command()
def status(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A folder of a run or a sweep, or the URL of a run's commits.")
    ],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again every two seconds, to the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say where a run stands: state, nodes, samples, stage, loss, speed, time left, newest commit and scores."""
    from . import status as reading
    from .status import as_table, read_status

    if watch and not as_json:
        try:
            return reading.watch(run)
        except KeyboardInterrupt:
            raise RunError("no longer watching; the run goes on", 0) from None
    found = read_status(run)
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


job_commands.add_to(app)


@data_app.command("pack")
def pack(
    input: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A table (.tsv, .csv, .jsonl: picture path, caption), a folder of key.jpg and key.txt, or shards.",
        ),
    ],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A folder or URL of its own for the shards.")],
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="About the size of a shard, 300MB; or samples, 1000.")
    ] = "300MB",
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Where the table's paths begin; left out: beside it.")
    ] = None,
    part: Annotated[
        str,
        typer.Option("--part", metavar="I/N", help="Write one part of the shards: 0/8, 1/8, ... 7/8 are the whole."),
    ] = "0/1",
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Of the order of the samples.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what training could not use, and list it beside the shard.")
    ] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Pack pictures and captions into tar shards of one size, in mixed order, each sample checked.

    The same command goes on where an earlier one was cut off. Shards as INPUT are packed anew. Several lines of a table
    for one picture are several captions; columns beside path and caption become metadata. Parts may run anywhere, at
    any time, in any order, as under Slurm: sbatch --array=0-7 with --part $SLURM_ARRAY_TASK_ID/8.

        treering data pack captions.tsv shards/photos --images photos/
        treering data pack 's3://BUCKET/raw/*.tar' s3://BUCKET/photos --shard-size 1GB --part 0/8
    """
    from ..data.pack import pack as pack_shards
    from ..data.sweep import enough_workers
    from . import looking

    with looking.progress("shards") as told:
        packed = pack_shards(
            input, output, shard_size, images,
            part=part, seed=seed, skip_bad=skip_bad, workers=workers or enough_workers(input), told=told,
        )  # fmt: skip
    if as_json:
        _print_json(asdict(packed))
        return
    Console().print(Text("\n".join(looking.packed_lines(packed))), soft_wrap=True)


@data_app.command("index")
def index(
    url: DataUrl,
    beside: Annotated[
        bool, typer.Option("--beside", help="Also put the indexes in .treering beside the shards, for other machines.")
    ] = False,
    filter: Annotated[
        str | None, typer.Option("--filter", metavar="EXPR", help="Say how many samples it accepts, and keep that.")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Index all shards, in parallel; what was indexed before is not read again.

    A run makes the index itself: this makes its start quick. Exit code 2 if a shard is damaged.

        treering data index 's3://BUCKET/photos/{00000..01023}.tar' --beside --filter 'similarity > 0.28 and not nsfw'
    """
    from . import indexing, looking

    found = indexing.index_url(url, workers, beside, filter)
    reasons = [fault["reason"] for fault in found["faults"]]
    if as_json:
        _print_json(found)
        raise typer.Exit(2 if reasons else 0)
    Console().print(Text(indexing.as_text(found, filter)), soft_wrap=True)
    if reasons:
        raise RunError(looking.faults_message(found["shards"], reasons), 2)


@data_app.command("lint")
def lint(
    url: DataUrl,
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", metavar="FILE", help="Write all bad samples here, as a run does."),
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Read and decode every sample as a run would, and list what it could not use, with the reasons.

    Cut off, the same command goes on where it was; shards that did not change are not read again. Exit code 0 if
    everything can be used, 2 if not.

        treering data lint 'shards/photos/*.tar' --ledger bad.jsonl
        treering data inspect 'shards/photos/*.tar' --ledger bad.jsonl --out bad.html
    """
    from ..data.lint import lint as lint_url
    from ..data.lint import write_ledger
    from ..data.sweep import enough_workers
    from . import looking

    with looking.progress("samples") as told:
        found = lint_url(url, workers or enough_workers(url), told)
    if ledger is not None:
        write_ledger(ledger, found.bad)
    if as_json:
        _print_json(looking.findings_json(found))
        raise typer.Exit(0 if found.clean else 2)
    Console().print(looking.findings(found, ledger), soft_wrap=True)
    if found.faults:
        raise RunError(looking.faults_message(found.shards, [fault.reason for fault in found.faults]), 2)
    raise typer.Exit(0 if found.clean else 2)


@data_app.command("inspect")
def inspect(
    url: DataUrl,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="How many samples to draw.")] = 10_000,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PAGE", help="Write a contact sheet here: .html or .png.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE", help="Show the samples a run's ledger.jsonl names.")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Tell what pictures, captions, labels and columns are like, from N samples drawn by chance, always the same ones.

    The contact sheet shows the first 120 of them, and pictures that look alike. With --ledger: instead, all samples
    that a run could not use.

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
