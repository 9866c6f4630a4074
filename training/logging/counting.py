"""Progress of one piece of work, outside of the steps of a run: a bar on a terminal, a line now and then elsewhere.

Nobody should look at a silent command for longer than ten seconds. What is done sooner shows nothing outside of a
terminal. All is on stderr, and what nobody can see any more is dropped. Work whose parts can be counted shows how many
are done (`counting`), other work for how long it has gone on (`waiting`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TextIO

from ...data.shards.parallel import Progress, silent
from ..report.readable import duration_text, printable

if TYPE_CHECKING:
    from rich.console import Console

Counting = Callable[[str], AbstractContextManager[Progress]]
"""opens the display of a piece of work with this name; what it gives takes (done, total)"""


_FIGURES = 40
"""columns of a terminal for a short bar, counts and times"""


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
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    stream, what = stream or sys.stderr, printable(what)
    console = _terminal(stream)
    if console is None:
        with _ticking(Lines(what, partial(_write, stream), interval, clock), interval) as shown:
            yield shown
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(shortened(what, console.width - _FIGURES), total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


@contextmanager
def waiting(
    what: str, stream: TextIO | None = None, interval: float = 10.0, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Shows for how long `what` (`reading b32.pt`), whose parts cannot be counted, has gone on: as `counting` does."""
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    stream, what = stream or sys.stderr, printable(what)
    console = _terminal(stream)
    if console is not None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Bar(*columns, console=console, transient=True) as bar:
            bar.add_task(shortened(what, console.width - _FIGURES), total=None)
            yield
        return
    with _ticking(Lines(what, partial(_write, stream), interval, clock), interval):
        yield


def shortened(text: str, most: int) -> str:
    """The end of a text of more than `most` characters, which says what is counted."""
    return text if len(text) <= most else f"…{text[len(text) - max(0, most - 1) :]}"


def _terminal(stream: TextIO) -> Console | None:
    """A console for a stream on which a line can be rewritten; None for any other."""
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _write(stream: TextIO, line: str) -> None:
    with suppress(OSError):
        print(line, file=stream, flush=True)


class Lines:
    """Writes a line about a piece of work at most every `interval` seconds: when it is called with (done, total), and
    on a `tick` where that has not come for as long. A call with all done writes none."""

    def __init__(
        self, what: str, write: Callable[[str], None], interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._write, self._interval, self._clock = what, write, interval, clock
        self._begun = self._shown = clock()
        self._known: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        with self._lock:
            self._known = done, total
            if done < total:
                self._show()

    def tick(self) -> None:
        """Time has passed."""
        with self._lock:
            self._show()

    def _show(self) -> None:
        now = self._clock()
        if now - self._shown < self._interval:
            return
        self._shown, spent = now, now - self._begun
        if self._known is None:
            return self._write(f"{self._what}: {duration_text(spent)} so far")
        done, total = self._known
        left = f", {duration_text(spent * (total - done) / done)} left" if 0 < done < total else ""
        self._write(f"{self._what}: {done:,} of {total:,}{left}")


@contextmanager
def _ticking(report: Lines, interval: float) -> Iterator[Lines]:
    """Ticks every `interval` seconds while the context lasts."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(interval):
            report.tick()

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        over.set()
        thread.join()
