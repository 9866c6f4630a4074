"""Progress of one piece of work, outside of the steps of a run: a bar on a terminal, a line now and then elsewhere.

Nobody should look at a silent command for longer than ten seconds. What is done sooner shows nothing outside of a
terminal. All is on stderr, and what nobody can see any more is dropped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TextIO

from ...data.shards.parallel import Progress, silent
from ..report.readable import duration_text, printable

Counting = Callable[[str], AbstractContextManager[Progress]]
"""opens the display of a piece of work with this name; what it gives takes (done, total)"""


@contextmanager
def no_counting(what: str) -> Iterator[Progress]:
    """Shows nothing."""
    yield silent


@contextmanager
def counting(
    what: str, stream: TextIO | None = None, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Shows how much of `what` (`shards packed`) is done on `stream` (default: stderr), with the time left: a bar that
    goes when the work ends if that is a terminal, else a line every `interval` seconds. `clock` returns seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    stream, what = stream or sys.stderr, printable(what)
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:

        def write(line: str) -> None:
            with suppress(OSError):
                print(line, file=stream, flush=True)

        yield lines(what, write, interval, clock)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


def lines(what: str, write: Callable[[str], None], interval: float, clock: Callable[[], float]) -> Progress:
    """Takes (done, total), and writes a line about it at most every `interval` seconds; none at the end of the work."""
    begun = shown = clock()

    def report(done: int, total: int) -> None:
        nonlocal shown
        now = clock()
        if now - shown < interval or done >= total:
            return
        shown = now
        left = f", {duration_text((now - begun) * (total - done) / done)} left" if done else ""
        write(f"{what}: {done:,} of {total:,}{left}")

    return report
