"""One training process: `python -m treering.launch.worker DIR`, started by `treering train`, torchrun or srun.

Rank and world size come from the environment (RANK, WORLD_SIZE, LOCAL_RANK), as torchrun sets them; without them this
is the only process. Errors are written to the file that the launcher reads, so that they are shown once.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from . import STARTED
from .errors import RecipeError, RunError, user_message
from .jobs.attempts import ATTEMPT, last_end, lost
from .recipe.load import read_recipe
from .run_folder import LAUNCHER, STOPPED, is_first_process

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.logging.run_log import Summary

_PR_SET_PDEATHSIG = 1


def work(out: Path) -> None:
    """Train the recipe in folder `out`; the first process then prints a summary.

    Raises RunError if the run was stopped by a signal, after it committed.
    """
    recipe = read_recipe(str(out / "recipe.yaml")).recipe
    from ..training.loop import train
    from ..training.starting.begin import Beginning

    imports = time.monotonic() - STARTED
    if ATTEMPT in os.environ:
        from .jobs.preflight import check_network

        check_network()
    summary = train(recipe, out, Beginning(imports, last_end(out)), lost=lambda: lost(out))
    if not summary.finished:
        raise RunError(f"stopped and committed to {summary.commit}; the same command continues from there", STOPPED)
    if is_first_process():
        with suppress(OSError, SystemExit):  # nobody reads any more
            show_summary(summary)


def show_summary(summary: Summary) -> None:
    """Print the last lines of a run: scores with their chance levels, and the paths of its results."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if summary.scores:
        console.print(score_table(summary.scores, summary.chance))
    minutes, seconds = divmod(round(summary.seconds), 60)
    rows = {
        "report": summary.report,
        "commit": summary.commit,
        "tensorboard": summary.tensorboard,
        "time": f"{minutes} min {seconds} s",
    }
    for name, value in rows.items():
        console.print(Text(f"{name:<12} {value}"), soft_wrap=True)


def score_table(
    scores: Mapping[str, float],
    chance: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Table:
    """A table of every score with its chance level and, if given, its 95% interval."""
    from rich.table import Table
    from rich.text import Text

    from ..training.report.readable import score as shown

    table = Table("score", box=None, pad_edge=False)
    table.add_column("model", justify="right")
    if intervals is not None:
        table.add_column("95% interval", justify="right")
    table.add_column("chance", justify="right")
    for name, score in scores.items():
        within = " to ".join(shown(name, end) for end in intervals[name]) if intervals and name in intervals else ""
        guess = f"{chance[name]:.1%}" if name in chance else ""
        table.add_row(Text(name), shown(name, score), *([within] if intervals is not None else []), guess)
    return table


def main() -> None:
    """Entry point of a worker process. Exit code 2 for a user's mistake, 1 for a bug, that of RunError otherwise."""
    try:
        if len(sys.argv) != 2:
            raise RecipeError("usage: python -m treering.launch.worker DIR, where DIR holds a recipe.yaml")
        _die_with_launcher()
        _redirect_log(Path(sys.argv[1]))
        work(Path(sys.argv[1]))
    except RunError as stop:
        _report(str(stop), stop.code)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except Exception as error:
        message = user_message(error)
        code = 1 if message is None else 2
        _report(message or traceback.format_exc(), code, type(error).__name__)
        sys.exit(code)


def _die_with_launcher() -> None:
    """Ask Linux to kill this process when its launcher dies, as torchrun's agent starts workers in separate sessions.

    A launcher that died before this call is detected by the changed parent.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):
            sys.exit(1)


def _redirect_log(out: Path) -> None:
    """In a Slurm job, append the output of every rank but 0 to `DIR/logs/rank-N.log`, over all attempts."""
    rank = int(os.environ.get("RANK", "0"))
    if rank and (out / "job").is_dir():
        (out / "logs").mkdir(exist_ok=True)
        with (out / "logs" / f"rank-{rank:05d}.log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


def _report(message: str, code: int, kind: str = "") -> None:
    """Write `message` to the launcher's error file (torchrun's format, and three fields of ours), or print it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        print(message, file=sys.stderr)
        return
    now = time.time()
    extra = {"py_callstack": message, "timestamp": str(int(now))}
    content = {"message": {"message": message, "code": code, "kind": kind, "time": now, "extraInfo": extra}}
    Path(file).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
