"""One training process: `python -m treering.launch.worker DIR`, started by `treering train`, torchrun or srun.

Rank and world size come from the environment (RANK, WORLD_SIZE, LOCAL_RANK), as torchrun sets them; without them this
is the only process. What goes wrong is written where the launcher looks for it, so that it is shown once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RecipeError, user_message
from .recipes import read_recipe

if TYPE_CHECKING:
    from ..training.loop import Summary


def work(out: Path) -> None:
    """Train the recipe of folder `out`; the first process then says what came of it."""
    from ..training.loop import train

    recipe = read_recipe(str(out / "recipe.yaml")).recipe
    summary = train(recipe, out)
    if os.environ.get("RANK", "0") == "0":
        show_summary(summary)


def show_summary(summary: Summary) -> None:
    """The last lines of a run: scores beside chance, and where everything is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if summary.scores:
        table = Table("score", "model", "chance", title="scores on the held-out samples", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, score in summary.scores.items():
            chance = summary.chance.get(name)
            table.add_row(Text(name), f"{score:.1%}", "" if chance is None else f"{chance:.1%}")
        console.print(table)
    places = {"report": summary.report, "commit": summary.commit, "tensorboard": summary.tensorboard}
    for name, place in places.items():
        if place:
            console.print(Text(f"{name:<12} {place}"), soft_wrap=True)
    minutes, seconds = divmod(round(summary.seconds), 60)
    console.print(Text(f"{'time':<12} {minutes} min {seconds} s"))


def main() -> None:
    """Entry of a worker process. Exits 2 for what a person can mend, 1 for our own mistakes."""
    try:
        if len(sys.argv) != 2:
            raise RecipeError("usage: python -m treering.launch.worker DIR, where DIR holds a recipe.yaml")
        work(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        code = 1 if message is None else 2
        _report(message or traceback.format_exc(), code)
        sys.exit(code)


def _report(message: str, code: int) -> None:
    """Leave `message` for the launcher (torchrun's error file format, and two fields of ours), or print it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        print(message, file=sys.stderr)
        return
    now = time.time()
    extra = {"py_callstack": message, "timestamp": str(int(now))}
    content = {"message": {"message": message, "code": code, "time": now, "extraInfo": extra}}
    Path(file).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
