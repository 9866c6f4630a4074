"""One training process: `python -m treering.launch.worker DIR`, started by `treering train`, torchrun or srun.

Rank and world size come from the environment (RANK, WORLD_SIZE, LOCAL_RANK), as torchrun sets them; without them this
is the only process. What goes wrong is written where the launcher looks for it, so that it is shown once.
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
from pathlib import Path
from typing import TYPE_CHECKING

from . import BEGUN
from .errors import RecipeError, RunError, user_message
from .jobs.attempts import ATTEMPT, last_end, lost
from .recipe.load import read_recipe
from .run_folder import LAUNCHER, STOPPED, is_first_process

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.loop import Summary

_PR_SET_PDEATHSIG = 1


def work(out: Path) -> None:
    """Train the recipe of folder `out`; the first process then says what came of it.

    Raises RunError if a signal asked the run to stop, which it then did after a commit.
    """
    recipe = read_recipe(str(out / "recipe.yaml")).recipe
    from ..training.loop import Beginning, train

    imports = time.monotonic() - BEGUN
    if ATTEMPT in os.environ:
        from .jobs.preflight import check_network

        check_network()
    summary = train(recipe, out, Beginning(imports, last_end(out)), lost=lambda: lost(out))
    if not summary.finished:
        raise RunError(f"stopped and committed to {summary.commit}; the same command continues from there", STOPPED)
    if is_first_process():
        show_summary(summary)


def show_summary(summary: Summary) -> None:
    """The last lines of a run: scores beside chance, and where everything is."""
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
    """Every score beside its interval, where those are given, and what guessing would give."""
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
    """Entry of a worker process. Exits 2 for what a person can mend, 1 for our own mistakes."""
    try:
        if len(sys.argv) != 2:
            raise RecipeError("usage: python -m treering.launch.worker DIR, where DIR holds a recipe.yaml")
        _die_with_launcher()
        _own_log(Path(sys.argv[1]))
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
    """Ask Linux to kill this process with its launcher: torchrun's agent puts workers in sessions of their own.

    A launcher that died before it was asked for is seen by who the parent is now.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):
            sys.exit(1)


def _own_log(out: Path) -> None:
    """Under a job, processes but the first write into a file of their own, `DIR/logs/rank-N.log`, attempt after
    attempt."""
    rank = int(os.environ.get("RANK", "0"))
    if rank and (out / "job").is_dir():
        (out / "logs").mkdir(exist_ok=True)
        with (out / "logs" / f"rank-{rank:05d}.log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)


def _report(message: str, code: int, kind: str = "") -> None:
    """Leave `message` for the launcher (torchrun's error file format, and three fields of ours), or print it."""
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
