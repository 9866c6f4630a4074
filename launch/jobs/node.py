"""What one node of a job runs: checks of the node, then torchrun's elastic agent with the node's processes.

    python -m treering.launch.jobs.node DIR --nodes N --processes P --head HOST:PORT --id NAME

Started once per node, by srun or a similar launcher; or once per process, which then counts as a node. SIGTERM and
SIGUSR1 are forwarded to the processes, any number of times: they commit after the same next step, and end. Errors are
written to `DIR/job/failures/`, from which `attempts` decides what follows.
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
from ..runtimes import share_cores
from .attempts import ATTEMPT, BAD_NODE, FOLLOWING, UNFIT, fit_folder, lost


def main() -> None:
    """Entry point of a node."""
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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else the others print C++ stacks when a node dies
    forward_signals()
    try:
        if reason := lost(run):
            raise RunError(reason, STOPPED)
        _check_node(run, name, options.processes)
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
        _report_failure(run, name, error)
        sys.exit(error.code)
    except Exception as error:
        kind = type(error).__name__
        _report_failure(run, name, RunError(user_message(error) or f"{kind}: {error}", 1, kind))
        if kind not in FOLLOWING and user_message(error) is None:
            raise
        sys.exit(1)


def _check_node(run: Path, name: str, processes: int) -> None:
    """Check that this node can train, and record that it can. Raises RunError or StoreError if it cannot."""
    from .preflight import check_store_from_node, examine_node

    wrong = examine_node(run, processes)
    if wrong:
        raise RunError(f"{UNFIT}: {'; '.join(wrong)}", BAD_NODE)
    if os.environ.get("SLURM_LOCALID", "0") == "0":  # once per node
        check_store_from_node(run)
    fit_folder(run).mkdir(parents=True, exist_ok=True)
    (fit_folder(run) / name).touch()


def _is_head(head: str) -> bool:
    """Whether this node hosts the rendezvous: the first task of the job, or the host that `head` names (host names may
    be short or full)."""
    task = os.environ.get("SLURM_PROCID")
    if task is not None:
        return task == "0"
    return head.rpartition(":")[0].partition(".")[0] == socket.gethostname().partition(".")[0]


def forward_signals() -> None:
    """Forward signals to stop to the workers from now on; before there are any, they end this process."""

    def forward(number: int, frame: FrameType | None) -> None:
        workers = children()
        if not workers:
            sys.exit(STOPPED)
        for worker in workers:
            os.kill(worker, signal.SIGUSR1)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)


def children() -> list[int]:
    """Process ids of the workers that this process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"treering.launch.worker" in stat.with_name("cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def _report_failure(run: Path, host: str, error: RunError) -> None:
    """Print the error, and write it to the run folder for `attempts`, unless another attempt owns the run by now. The
    folder may be missing: that is often the error."""
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
