"""`treering stop`: a run commits after its next step and ends, under Slurm or on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from ...training.health.watchdog import is_ours, read_heartbeats
from ..errors import RecipeError, show
from .submit import FINISHED, job_of


def stop_run(run: Path) -> str:
    """Ask the run in `run` to stop; returns a sentence about it. Raises RecipeError if nothing can be stopped here."""
    about = job_of(run)
    if about and about.get("state") and not FINISHED.match(about["state"]):
        if about["state"] == "PENDING":
            subprocess.run(["scancel", about["name"]], check=True, timeout=30)
            return f"job {about['name']} was queued and is cancelled"
        (run / "job" / "stop").touch()  # makes the batch script end instead of requeueing
        subprocess.run(["scancel", "--batch", "--signal=USR1", about["name"]], check=True, timeout=30)
        return f"job {about['name']} commits after its next step and ends"
    beats = [beat for beat in read_heartbeats(run) if time.time() - beat["time"] < 30 and beat["phase"] != "end"]
    signalled = [_signalled(beat["pid"]) for beat in beats if is_ours(beat)]
    if not any(signalled):
        where = f"; its last processes were on {beats[0]['host']}" if beats else ""
        raise RecipeError(
            f"no process of the run in {show(str(run), 200)} is running here{where}; "
            "`treering status` says where it runs"
        )
    return "the run commits after its next step and ends"


def _signalled(process: int) -> bool:
    """Ask a process to stop; returns False if it has ended meanwhile. Raises RecipeError if it is another user's."""
    try:
        os.kill(process, signal.SIGUSR1)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise RecipeError(f"process {process} of the run belongs to another user, who can stop it") from None
    return True
