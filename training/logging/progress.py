"""Progress display of a run: a progress bar on a terminal, plain lines everywhere else.

Only rank 0 shows it, on stderr, so that stdout stays free for results. The bar is drawn only on updates. It has no
refresh thread, because a thread that holds a lock while loader workers are forked can make them hang. A terminal that
was closed, or a pipe that nobody reads any more, ends the display and not the run.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ...data.shards.parallel import Progress as Report
from ..report import readable
from ..report.losses import Term, loss_text, terms_text
from .counting import Lines, shortened

_SMOOTHING = 0.3  # weight of the newest rate in the moving average that gives the remaining time
_REDRAW = 0.5  # seconds between two updates of the bar by a piece of work
_SHORTEST = 5  # columns of the shortest bar and the space after it


class Progress:
    """Shows samples done, loss, speed, time left, stage and model size; use as a context manager.

    `total_samples`: samples of the run. `stages`: number of stages. `stream`: output (default: stderr); a bar if it is
    a terminal, else one line every `interval` seconds and at events. `clock` returns seconds.
    """

    def __init__(
        self,
        total_samples: int,
        stages: int = 1,
        stream: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._stages, self._interval, self._clock = total_samples, stages, interval, clock
        self._stream = stream or sys.stderr
        self._rate: float | None = None
        self._shape: tuple[int, int] | None = None
        self._shown = -math.inf
        self._pending: str | None = None
        console = Console(file=self._stream, highlight=False)
        self._bar: Bar | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (BarColumn(None), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Bar(*columns, console=console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task("", total=total_samples, text="starting")
            self._bar.start()

    def update(
        self,
        samples: int,
        loss: float | None,
        samples_per_second: float,
        stage: int,
        parameters: int,
        terms: Sequence[Term] = (),
    ) -> None:
        """Show the state after a step. `stage` counts from 0; `loss` None: not finite. `terms` sum to the loss."""
        if samples_per_second > 0 and math.isfinite(samples_per_second):
            fresh = self._rate is None or self._shape != (stage, parameters)  # a grown model runs at another speed
            old = samples_per_second if fresh or self._rate is None else self._rate
            self._rate = (1 - _SMOOTHING) * old + _SMOOTHING * samples_per_second
        changed = self._shape != (stage, parameters)
        self._shape = (stage, parameters)
        text = self._text(samples, loss, samples_per_second, terms_text(terms))
        if self._bar:
            with self._showing():
                self._bar.update(self._task, completed=samples, text=text)
                self._bar.refresh()
            return
        done = f"{100 * samples / self._total:.0f}%" if self._total else ""
        self._pending = f"{done:>4} · {text}"
        if changed or samples >= self._total or self._clock() - self._shown >= self._interval:
            self._flush()

    def note(self, message: str) -> None:
        """Print one line about an event, such as a commit, above the bar. Safe for untrusted text."""
        line = " ".join(readable.printable(message).split())
        if self._bar:
            with self._showing():
                self._bar.console.print(Text(line))
                self._bar.refresh()
        else:
            self._write(line)

    @contextmanager
    def counting(self, what: str) -> Iterator[Report]:
        """Shows how much of `what`, a piece of work between two steps, is done: in place of the text of the bar, or
        by a line every `interval` seconds."""
        if self._bar:
            kept = self._bar.tasks[0].fields["text"]
            yield Lines(readable.printable(what), self._show_in_bar, _REDRAW, self._clock)
            self._show_in_bar(kept)
        else:
            yield Lines(readable.printable(what), self._write_after, self._interval, self._clock)

    def _write_after(self, line: str) -> None:
        """A line after the step that waits for its turn."""
        self._flush()
        self._write(line)

    def _show_in_bar(self, text: str) -> None:
        if self._bar:
            with self._showing():
                self._bar.update(self._task, text=shortened(text, self._bar.console.width - _SHORTEST))
                self._bar.refresh()

    def close(self) -> None:
        """Leave the last state on the screen and stop the bar; may be called twice."""
        if self._bar:
            with self._showing():
                self._bar.refresh()
                self._bar.stop()
            self._bar = None
        else:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _room(self) -> float:
        """Columns of a line, beside the bar if there is one."""
        return self._bar.console.width - _SHORTEST if self._bar else math.inf

    def _text(self, samples: int, loss: float | None, rate: float, terms: str) -> str:
        """Everything; where there is no room for it, without the stage and the size, or else without the terms."""
        stage, parameters = self._shape or (0, 0)
        left = (self._total - samples) / self._rate if self._rate else None
        seen = readable.compact if self._total >= 10_000_000 else readable.exact
        done, loss_only = f"{seen(samples)}/{seen(self._total)}", f"loss {loss_text(loss)}"
        ends = [
            f"{readable.compact(rate)}/s",
            f"{readable.duration_text(left)} left" if samples < self._total else "done",
        ]
        shape = f"stage {stage + 1}/{self._stages} · {readable.compact(parameters)}"
        whole = [done, loss_only + terms, *ends, shape]
        forms = (" · ".join(parts) for parts in (whole, whole[:-1]))
        return next((form for form in forms if len(form) <= self._room), " · ".join([done, loss_only, *ends, shape]))

    def _flush(self) -> None:
        if self._pending is not None:
            self._write(self._pending)
            self._pending, self._shown = None, self._clock()

    def _write(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._showing():
            print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Shows something, unless nobody can see it any more."""
        try:
            yield
        except (OSError, SystemExit):  # rich leaves by SystemExit when a pipe is closed
            bar, self._bar = self._bar, None
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for good
            if bar:
                with suppress(OSError, SystemExit):
                    bar.stop()  # gives back the standard streams
