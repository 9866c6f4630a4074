"""`treering submit`: one command from a recipe to a job that survives preemption, crashes and lost nodes.

Everything that can be checked is checked before anything is written or queued, the cheapest first: recipe, site file,
`sbatch --test-only`, store, sources. The batch script is slurm/pretrain.sbatch with two marked places filled in.
Headers must match a pattern; everything else (paths, above all) is a quoted assignment, so that no user-chosen name is
ever evaluated by a shell. Overrides never reach the script: the run folder has the resolved recipe.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.storage.atomic_write import atomic_write
from ...data.units import counted
from ...training.health.signals import NOTICE
from ...training.recipe import Recipe
from ..errors import RecipeError, safe_text, show
from ..recipe.load import ResolvedRecipe
from ..run import check_data, check_sources, check_store
from ..run_folder import RECIPE_FILE, read_rows
from .cluster_config import TIME, WORD, Site
from .reachable import refuse_unreachable

if TYPE_CHECKING:
    from ...training.checkpoint.manifest import Commit

TEMPLATE = Path(__file__).parents[2] / "slurm" / "pretrain.sbatch"
STORE_SECONDS = 20
LONGEST_NOTICE = 65535
"""seconds, the most that Slurm's --signal takes"""
FINISHED = re.compile(r"COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|BOOT_FAIL|DEADLINE|OUT_OF_MEMORY")
_LOCAL_DISKS = {"ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs"}


@dataclass(frozen=True)
class JobRequest:
    """The resources requested for a job; None: as in the site file."""

    nodes: str
    processes: int | None = None
    gpus: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    after: int | None = None

    def __post_init__(self) -> None:
        for name, pattern in (("partition", WORD), ("account", WORD), ("qos", WORD), ("constraint", WORD)):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                raise RecipeError(f"--{name} {show(value)} is not a valid name in Slurm; see `sinfo`")
        if self.time is not None and not re.fullmatch(TIME, self.time):
            raise RecipeError(f"--time {show(self.time)} is not a valid time; write minutes, 2:00:00 or 1-00:00:00")


@dataclass(frozen=True)
class Job:
    """A job ready to be submitted."""

    runs: tuple[tuple[Path, ResolvedRecipe], ...]
    script: str
    nodes: tuple[int, ...]
    processes: int
    notes: tuple[str, ...]


def prepare_job(runs: list[tuple[Path, ResolvedRecipe]], request: JobRequest, site: Site) -> Job:
    """Check everything and render the batch script, without writing anything. Raises RecipeError, StoreError or
    DataError."""
    if shutil.which("sbatch") is None:
        raise RecipeError("sbatch was not found; submit on a login node of the cluster, or use treering train")
    least, most = _node_range(request.nodes)
    gpus = request.gpus if request.gpus is not None else site.gpus_per_node
    processes = request.processes or gpus or 1
    recipes = [resolved.recipe for _, resolved in runs]
    counts = _usable_counts(recipes, least, most, processes)
    for out, _ in runs:
        _refuse_second_job(out)
    script = render_script([out for out, _ in runs], recipes[0].name, counts, processes, gpus, request, site)
    _check_partition(request.partition or site.partition, request.time or site.time, counts[0])
    _test_submission(script)
    commits = [_check_store(STORE_SECONDS, resolved.recipe, out) for out, resolved in runs]
    for recipe, commit in zip(recipes, commits, strict=True):
        check_data(recipe, commit, check_sources(recipe))
    notes = _notes([out for out, _ in runs], least, most, counts, processes)
    if any(option.startswith("--export=") and option != "--export=ALL" for option in site.options):
        notes += (
            "--export among the site's options keeps variables of this shell, such as AWS_PROFILE, from the job; name "
            "those it needs under environment in the site file",
        )
    return Job(tuple(runs), script, counts, processes, notes)


def submit(job: Job) -> int:
    """Write the run folders and queue the job; returns its number. Raises RecipeError if Slurm refuses it."""
    for out, resolved in job.runs:
        (out / "job").mkdir(parents=True, exist_ok=True)
        atomic_write(out / RECIPE_FILE, resolved.text, durable=True)
        atomic_write(out / "job" / TEMPLATE.name, job.script, durable=True)
        (out / "job" / "stop").unlink(missing_ok=True)
    done = _slurm(["sbatch", "--parsable", str(job.runs[0][0].absolute() / "job" / TEMPLATE.name)])
    if done.returncode:
        raise RecipeError(
            f"Slurm refused the job: {_slurm_error(done)}; see `sinfo` for partitions and nodes, and the site file"
        )
    number = int(done.stdout.split(";")[0])
    for place, (out, _) in enumerate(job.runs):
        about = {"job": number, "task": place if len(job.runs) > 1 else None, "time": time.time(), "nodes": job.nodes}
        atomic_write(out / "job" / "job.json", json.dumps(about), durable=True)
    return number


def render_script(
    outs: list[Path],
    name: str,
    counts: tuple[int, ...],
    processes: int,
    gpus: int | None,
    request: JobRequest,
    site: Site,
) -> str:
    """The batch script of a job; `outs` are its run folders, `counts` the usable numbers of nodes, largest first."""
    notice = max(site.notice, *(_seconds_to_stop(out) for out in outs))
    nodes = f"{counts[-1]}-{counts[0]}" if len(counts) > 1 else str(counts[0])
    tasks = processes if site.tasks == "gpu" else 1
    binding = ["--cpu-bind=none"] if site.tasks == "node" else ["--gpus-per-task=1"] if gpus else []
    headers = {  # no --ntasks-per-node: with it Slurm allocates only the minimum of a range of nodes
        "job-name": name,
        "nodes": nodes,
        "partition": request.partition or site.partition,
        "account": request.account or site.account,
        "qos": request.qos or site.qos,
        "time": request.time or site.time,
        "constraint": request.constraint or site.constraint,
        "gpus-per-node": str(gpus) if gpus else None,
        "dependency": f"afterany:{request.after}" if request.after else None,
        "array": f"0-{len(outs) - 1}" if len(outs) > 1 else None,
        "signal": f"B:USR1@{notice}",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in headers.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in site.options]
    settings = [
        f"RUNS=({_quoted(str(out.absolute()) for out in outs)})",
        f"PYTHON={shlex.quote(site.python or sys.executable)}",
        f"TASKS={tasks} PROCESSES={processes // tasks} NODE_COUNTS='{' '.join(map(str, counts))}'",
        f"RESTARTS={site.restarts} EXPAND={site.expand} DRAIN={'yes' if site.drain else 'no'}",
        f"SRUN=({_quoted([*binding, *site.srun])}) INSIDE=({_quoted(site.inside)})",
        *(f"export {key}={shlex.quote(value)}" for key, value in sorted(site.environment.items())),
        f"export {NOTICE}={notice}",
        *(["export TREERING_GPUS=1"] if gpus else []),
        *([f"export TREERING_MIN_BANDWIDTH={site.min_bandwidth:g}"] if site.min_bandwidth else []),
        "setup() {",
        *(f"    {line}" for line in (*site.setup, "true")),
        "}",
    ]
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("# treering: headers\n", "\n".join(lines) + "\n")
    return text.replace("# treering: settings\n", "\n".join(settings) + "\n")


def _seconds_to_stop(out: Path) -> int:
    """Seconds that a run needs to stop, from its own records: twice the longest of the last ten commits, and 30 s.

    0 if it has no commits.
    """
    commits = [row["seconds"] for row in read_rows(out / "metrics.jsonl") if row.get("event") == "commit"]
    return min(LONGEST_NOTICE, math.ceil(2 * max(commits[-10:]) + 30)) if commits else 0


def job_of(out: Path) -> dict[str, Any] | None:
    """The job last submitted for the run in `out`, with its state if Slurm still has it; None if there is none."""
    try:
        about: dict[str, Any] = json.loads((out / "job" / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = f"{about['job']}_{about['task']}" if about.get("task") is not None else str(about["job"])
    if shutil.which("squeue"):
        done = _slurm(["squeue", "-h", "-a", "-t", "all", "-j", name, "-o", "%T|%N|%r|%S"])
        state, nodes, reason, start = ((done.stdout.splitlines() or [""])[0].split("|") + [""] * 4)[:4]
        about |= {"state": state or None, "on": nodes, "waits_for": reason, "expected": start}
    return about | {"name": name}


def _node_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    if not match or not 0 < int(match[1]) <= int(match[2] or match[1]):
        raise RecipeError(f"--nodes {show(text)} is not a number of nodes; write 4, or 2-8 for as many as are free")
    return int(match[1]), int(match[2] or match[1])


def _usable_counts(recipes: list[Recipe], least: int, most: int, processes: int) -> tuple[int, ...]:
    """Numbers of nodes, largest first, whose processes can divide every recipe's batch evenly."""
    counts, reason = [], ""
    for count in range(most, least - 1, -1):
        try:
            for recipe in recipes:
                recipe.check_world(count * processes)
            counts.append(count)
        except ValueError as error:
            reason = reason or str(error)
    if not counts:
        raise RecipeError(f"--nodes {least if least == most else f'{least}-{most}'}: {reason}")
    return tuple(counts)


def _refuse_second_job(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {show(str(out))} is a file; give a folder")
    about = job_of(out)
    if about and about.get("state") and not FINISHED.match(about["state"]):
        raise RecipeError(
            f"job {about['name']} ({about['state'].lower()}) already has the run folder {show(str(out))}; "
            f"follow it with treering status, end it with treering stop, or give another --out"
        )


def _check_partition(partition: str | None, limit: str | None, nodes: int) -> None:
    """Check the limits of the partition, or that one of several (a,b) takes the job: `sbatch --test-only` does not
    enforce them on every cluster. Raises RecipeError."""
    reasons = [_partition_refuses(name, limit, nodes) for name in (partition.split(",") if partition else [None])]
    if all(reasons):
        raise RecipeError(str(reasons[0]))


def _partition_refuses(partition: str | None, limit: str | None, nodes: int) -> str | None:
    """Why a partition (None: the default one) does not take such a job; None if it may. Raises RecipeError if it does
    not exist."""
    done = _slurm(["scontrol", "-o", "show", "partition", *([partition] if partition else [])])
    if done.returncode:
        known = sorted({name.rstrip("*") for name in _slurm(["sinfo", "-h", "-o", "%P"]).stdout.split()})
        wrong = (
            f"partition {show(partition)} does not exist"
            if known
            else f"Slurm does not answer here ({_slurm_error(done)}); run this on a login node of the cluster"
        )
        raise RecipeError(f"{wrong}; known here: {', '.join(known)}" if known else wrong)
    for line in done.stdout.splitlines():
        fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
        if partition is None and fields.get("Default") != "YES":
            continue
        longest, name = fields.get("MaxTime", "UNLIMITED"), fields.get("PartitionName")
        if limit and longest != "UNLIMITED" and _minutes(limit) > _minutes(longest):
            return f"--time {limit} exceeds the limit of partition {name}, {longest}; request that or less"
        largest = fields.get("MaxNodes", "UNLIMITED")
        if largest != "UNLIMITED" and nodes > int(largest):
            return f"--nodes {nodes} exceeds the limit of partition {name} for a job, {largest}; request fewer"
        if nodes > int(fields.get("TotalNodes", nodes)):
            return f"--nodes {nodes}: partition {name} has {counted(int(fields['TotalNodes']), 'node')}; request fewer"
    return None


def _minutes(text: str) -> float:
    """A time in Slurm's notation, in minutes."""
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _test_submission(script: str) -> None:
    """Check that Slurm could run the job; nothing is queued."""
    done = _slurm(["sbatch", "--test-only"], script)
    if done.returncode:
        raise RecipeError(
            f"Slurm would refuse the job: {_slurm_error(done)}; see `sinfo` for partitions and nodes, and the site file"
        )


def _check_store(seconds: float, recipe: Recipe, out: Path) -> Commit | None:
    """Check the store, giving up after `seconds`; returns the newest commit in it, if any."""
    place = Path(recipe.commits_url(out))
    if "://" not in str(recipe.checkpoint.to or "") and not place.exists():  # the store's check would create it
        existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            raise RecipeError(f"{show(str(existing), 200)} is not writable; give another --out or checkpoint.to")
        return None
    refuse_unreachable(str(recipe.checkpoint.to or ""))
    found: list[Exception | Commit | None] = []

    def check() -> None:
        try:
            found.append(check_store(recipe, out))
        except Exception as error:
            found.append(error)

    threading.Thread(target=check, daemon=True).start()
    end = time.monotonic() + seconds
    while not found and time.monotonic() < end:
        time.sleep(0.02)
    if not found:
        url = safe_text(recipe.checkpoint.to or str(out))
        raise RecipeError(
            f"store {url}: no answer within {seconds:.0f} s; check the network, and that the server works"
        )
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _notes(outs: list[Path], least: int, most: int, counts: tuple[int, ...], processes: int) -> tuple[str, ...]:
    """Notes for the user about what is allowed but may surprise."""
    notes = []
    left = [str(n) for n in range(least, most + 1) if n not in counts]
    if left:
        notes.append(
            f"{', '.join(left)} nodes of {counted(processes, 'process')} cannot divide the batch evenly; "
            "fewer will be used"
        )
    place = outs[0].absolute()
    mounts = (
        [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()] if sys.platform == "linux" else []
    )
    under = [(len(point), kind) for point, kind in mounts if place.is_relative_to(point)]
    if under and max(under)[1] in _LOCAL_DISKS:
        notes.append(
            f"{place} lies on a disk of type {max(under)[1]}; each node checks that it can see it before it trains"
        )
    return tuple(notes)


def _quoted(words: Any) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _slurm(command: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A Slurm command. Raises RecipeError if the controller does not answer in time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SLURM_"))}
    environment |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        return subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(f"{command[0]} does not answer; check the controller with `scontrol ping`") from None


def _slurm_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.split("error: ")[-1] for line in done.stderr.splitlines() if line.strip()]
    return safe_text("; ".join(dict.fromkeys(lines)))[:400] or f"exit code {done.returncode}"
