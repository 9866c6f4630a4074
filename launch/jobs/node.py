"""What one node of a job runs: a look at the node, then torchrun's elastic agent with the node's processes.

    python -m treering.launch.jobs.node DIR --nodes N --processes P --head HOST:PORT --id NAME

Started once on each node, by srun or anything like it; or once for each process, which then counts as a node. SIGTERM
and SIGUSR1 go on to the processes, any number of times: they commit at their next step edge, all at the same one, and
end. What went wrong is left in `DIR/job/failures/` for whoever decides what comes next.
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

from ..errors import RunError, user_message
from ..run_folder import STOPPED
from ..threads import share_cores
from .attempts import ATTEMPT, BAD_NODE, FOLLOWING, UNFIT, fit_folder, lost


def main() -> None:
    """Entry of the node."""
    parser = argparse.ArgumentParser(prog="treering.launch.jobs.node")
    parser.add_argument("run", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--id", required=True)
    options = parser.parse_args()
    run: Path = options.run
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    os.environ[ATTEMPT] = options.id
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a node that dies, the others would print stacks in C++
    forward_signals()
    try:
        if reason := lost(run):
            raise RunError(reason, STOPPED)
        _look_around(run, name, options.processes)
        from ..run import launch_workers

        share_cores(options.processes)
        launch_workers(
            run,
            options.processes,
            options.nodes,
            options.head,
            options.id,
            address=socket.gethostname(),
            is_head=_is_head(options.head),
            signals="SIGINT",
        )
    except RunError as error:
        _leave_word(run, name, error)
        sys.exit(error.code)
    except Exception as error:
        kind = type(error).__name__
        _leave_word(run, name, RunError(user_message(error) or f"{kind}: {error}", 1, kind))
        if kind not in FOLLOWING and user_message(error) is None:
            raise
        sys.exit(1)


def _look_around(run: Path, name: str, processes: int) -> None:
    """Whether this node can train, told to whoever decides. Raises RunError or StoreError if it cannot."""
    from .preflight import check_store_from_node, examine_node

    wrong = examine_node(run, processes)
    if wrong:
        raise RunError(f"{UNFIT}: {'; '.join(wrong)}", BAD_NODE)
    if os.environ.get("SLURM_LOCALID", "0") == "0":  # the others of the node would hear the same
        check_store_from_node(run)
    fit_folder(run).mkdir(parents=True, exist_ok=True)
    (fit_folder(run) / name).touch()


def _is_head(head: str) -> bool:
    """Whether this is the node where all meet: the first task of the job, or the one that `head` names (host names may
    be short or full)."""
    task = os.environ.get("SLURM_PROCID")
    if task is not None:
        return task == "0"
    return head.rpartition(":")[0].partition(".")[0] == socket.gethostname().partition(".")[0]


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
    """Say it in the log, and leave it where the decision is taken; the folder may be what is missing, or another
    attempt's by now."""
    print(f"{host}: {error}", file=sys.stderr, flush=True)
    if error.code == STOPPED or lost(run):
        return
    folder = run / "job" / "failures"
    file = folder / f"{host}-{os.environ.get('SLURM_LOCALID', '0')}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"time": time.time(), "host": host, "message": str(error), "kind": error.kind}
        file.write_text(json.dumps(content), encoding="utf-8")
    except OSError as trouble:
        print(f"{host}: {trouble}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
