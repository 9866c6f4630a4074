"""What one node of a job runs: a look at the node, then torchrun's elastic agent with the node's processes.

    python -m treering.launch.node DIR --nodes N --processes P --head HOST:PORT --id NAME

Started once on each node, by srun or anything like it. SIGTERM and SIGUSR1 go on to the processes, any number of times:
they commit at their next step edge, all at the same one, and end. What went wrong is left in `DIR/job/failures/` for
whoever decides what comes next.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from .errors import RunError, user_message
from .lives import FOLLOWING, STOPPED

BAD_NODE = 3
"""exit code of a node that cannot train"""


def main() -> None:
    """Entry of the node."""
    parser = argparse.ArgumentParser(prog="treering.launch.node")
    parser.add_argument("run", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--id", required=True)
    options = parser.parse_args()
    run: Path = options.run
    host = socket.gethostname()
    forward_signals()
    try:
        from .preflight import check_store, examine_node

        wrong = examine_node(run, options.processes)
        if wrong:
            raise RunError(f"this node cannot train: {'; '.join(wrong)}", BAD_NODE)
        check_store(run)
        from .run import launch_workers

        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // options.processes)))
        where = {"nodes": options.nodes, "head": options.head, "name": options.id, "address": host}
        launch_workers(run, options.processes, **where, signals="SIGINT")
    except RunError as error:
        _leave_word(run, host, error)
        sys.exit(error.code)
    except Exception as error:
        kind = type(error).__name__
        _leave_word(run, host, RunError(user_message(error) or f"{kind}: {error}", 1, kind))
        if kind not in FOLLOWING and user_message(error) is None:
            raise
        sys.exit(1)


def forward_signals() -> None:
    """From now on a signal to stop goes to the workers; before there are any it ends this process."""

    def forward(number: int, frame: FrameType | None) -> None:
        workers = children()
        if not workers:
            sys.exit(STOPPED)
        for worker in workers:
            os.kill(worker, signal.SIGUSR1)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)


def children() -> list[int]:
    """The worker processes that this process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"treering.launch.worker" in stat.with_name("cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _leave_word(run: Path, host: str, error: RunError) -> None:
    """Say it in the log, and leave it where the decision is taken; the folder may be what is missing."""
    print(f"{host}: {error}", file=sys.stderr, flush=True)
    if error.code == STOPPED:
        return
    folder = run / "job" / "failures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"time": time.time(), "host": host, "message": str(error), "kind": error.kind}
        (folder / f"{host}.json").write_text(json.dumps(content), encoding="utf-8")
    except OSError as trouble:
        print(f"{host}: {trouble}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
