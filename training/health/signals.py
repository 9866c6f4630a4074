"""Signals only set a flag; the loop acts on it at the next step edge, where the state is whole."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NOTICE = "TREERING_NOTICE"
"""environment variable: seconds between the signal and the end of the run"""


def short_notice(commit_seconds: float) -> str | None:
    """A warning if the notice before the end is shorter than a commit takes; None if it suffices or is not known.

    Twice the time is asked for: a commit may be under way already, and is waited for first.
    """
    notice = float(os.environ.get(NOTICE, "inf"))
    if 2 * commit_seconds <= notice:
        return None
    return (
        f"a commit took {commit_seconds:.0f} s, and the run gets notice only {notice:.0f} s before its end; "
        f"submit it again, or set notice: {2 * commit_seconds + 30:.0f} in the site file"
    )


def is_ignored(number: int) -> bool:
    """Whether whoever started this process wants it to outlive its terminal, as nohup does."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """Whether one of the stop signals was received. A second Ctrl-C acts as if this were not here; of the others, which
    schedulers send to every process two or three times, any number may come."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Handlers can only be set from the main thread; elsewhere (tests) the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOP if not is_ignored(number)]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
