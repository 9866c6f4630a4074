"""How long threads spin is limited in every process of a run, and its GPU's memory grows in place, before torch is
imported, unless the user has decided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treering.launch.runtimes import BLOCK_TIME, SPINS, limit_spinning, share_cores, use_expandable_segments

OURS = {
    "OMP_WAIT_POLICY": None,
    "GOMP_SPINCOUNT": str(SPINS),
    "KMP_BLOCKTIME": str(BLOCK_TIME),
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
# What every Python process of the test does: it notes its settings when torch is imported, and at each fork after that.
SPY = f"""
import json, os, sys
def note(what):
    row = [what, sys.argv[0], {{name: os.environ.get(name) for name in {list(OURS)}}}]
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(row) + "\\n")
def hook(event, arguments):
    if event == "import" and arguments[0] == "torch":
        note("import")
sys.addaudithook(hook)
os.register_at_fork(after_in_child=lambda: note("fork") if "torch" in sys.modules else None)
"""


def run(tiny: Path, processes: int, folder: Path, **settings: str) -> tuple[list[tuple[str, str, dict]], str]:
    """What the processes of a short run noted, and what OpenMP's runtimes said of themselves (OMP_DISPLAY_ENV)."""
    (folder / "sitecustomize.py").write_text(SPY)
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | settings
    paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "NOTES": str(folder / "notes"),
        "OMP_DISPLAY_ENV": "VERBOSE",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-m", "treering.launch", "train", str(tiny), "data.workers=1"]
    command += ["--out", str(folder / "run"), "--processes", str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in (folder / "notes").read_text().splitlines()], done.stderr


def test_command_line_workers_and_decoding_processes(tiny: Path, tmp_path: Path) -> None:
    notes, said = run(tiny, 2, tmp_path)
    assert [settings for _, _, settings in notes] == [OURS] * len(notes)
    imported = [Path(program).name for what, program, _ in notes if what == "import"]
    assert imported.count("worker.py") == 2
    assert "__main__.py" in imported
    decoding = [program for what, program, _ in notes if what == "fork" and program.endswith("worker.py")]
    assert len(decoding) >= 2
    if sys.platform == "linux":  # the runtime itself, once in each process
        assert said.count(f"GOMP_SPINCOUNT = '{SPINS}'") == said.count("GOMP_SPINCOUNT") >= 3


def test_what_the_user_has_set_wins(tiny: Path, tmp_path: Path) -> None:
    for name, value, others in (
        ("OMP_WAIT_POLICY", "active", {"GOMP_SPINCOUNT": None, "KMP_BLOCKTIME": None}),
        ("GOMP_SPINCOUNT", "77", {"KMP_BLOCKTIME": str(BLOCK_TIME)}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        notes, said = run(tiny, 1, folder, **{name: value})
        assert len(notes) >= 2
        assert all(settings == OURS | {name: value} | others for _, _, settings in notes)
        assert sys.platform != "linux" or f"{name} = '{value.upper()}'" in said


def test_each_runtime_has_its_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"KMP_BLOCKTIME": "5"})
    limit_spinning()
    assert os.environ == {"GOMP_SPINCOUNT": str(SPINS), "KMP_BLOCKTIME": "5"}


@pytest.mark.parametrize(
    "given", [{"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}]
)
def test_an_allocator_that_the_user_has_configured_is_kept(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    use_expandable_segments()
    assert os.environ == given


@pytest.mark.parametrize(("processes", "each"), [(2, 3), (3, 2), (7, 1)])
def test_cores_are_shared_evenly(processes: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(os, "environ", {})
    share_cores(processes)
    assert os.environ["OMP_NUM_THREADS"] == str(each)
    share_cores(1)  # set by now
    assert os.environ["OMP_NUM_THREADS"] == str(each)
