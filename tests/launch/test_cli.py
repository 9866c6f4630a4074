"""The real command, in a process of its own: what it prints, its exit codes, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from treering import __version__
from treering.launch import cli

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Refused = Callable[..., str]


def test_help_comes_without_torch() -> None:
    """The seconds that torch takes to import are not spent on a help page."""
    script = (
        "import sys; sys.argv = ['treering', {!r}, '--help']\n"
        "from treering.launch.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'open_clip', 'numpy') if name in sys.modules])"
    )
    for command in ("train", "explain", "eval", "grow", "report", "status", "doctor", "data"):
        done = subprocess.run(
            [sys.executable, "-c", script.format(command)], capture_output=True, text=True, timeout=60, check=True
        )
        assert f"treering {command}" in done.stdout
        assert done.stdout.rstrip().endswith("[]"), done.stdout


def test_the_version_is_that_of_the_package(treering: Command) -> None:
    done = treering("--version")
    assert (done.returncode, done.stdout) == (0, f"treering {__version__}\n")
    changes = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.+)$", changes, re.MULTILINE)[0] == __version__
    citation = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    assert citation["version"] == __version__


def test_a_run_trains_resumes_and_is_looked_at(treering: Command, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "here" / "runs" / "tiny"
    done = treering("train", str(tiny))
    assert done.returncode == 0, done.stderr
    last_lines = [line.split()[0] for line in done.stdout.splitlines()[-4:]]
    assert last_lines == ["report", "commit", "tensorboard", "time"]
    for line in done.stdout.splitlines()[-4:-1]:
        assert (tmp_path / "here" / line.split(maxsplit=1)[1]).exists()
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == []

    again = treering("train", str(tiny))
    assert again.returncode == 0, again.stderr
    status = json.loads(treering("status", "runs/tiny", "--json").stdout)
    assert status["finished"]
    assert (status["samples"], status["step"], status["attempts"], status["name"]) == (32, 4, 2, "tiny")
    assert Path(treering("report", "runs/tiny").stdout.strip()).name == "report.html"
    assert "0" in treering("status", "runs/tiny").stdout

    scores = json.loads(treering("eval", "runs/tiny", "--suite", "retrieval", "--json").stdout)
    assert scores["samples"] == 32
    assert set(scores["scores"]) == set(scores["chance"])
    assert all(name.startswith("retrieval/") and 0 <= score <= 1 for name, score in scores["scores"].items())
    assert "retrieval/image_to_text@1" in treering("eval", "runs/tiny", "--suite", "retrieval").stdout


def test_a_folder_takes_only_its_own_run(treering: Command, refused: Refused, tiny: Path, tmp_path: Path) -> None:
    assert treering("train", str(tiny)).returncode == 0
    before = (tmp_path / "here/runs/tiny/recipe.yaml").read_text()
    message = refused("train", str(tiny), "seed=1")
    assert "another recipe" in message
    assert "seed" in message
    assert "--out" in message
    assert (tmp_path / "here/runs/tiny/recipe.yaml").read_text() == before


def test_explain_prints_a_recipe_with_origins(treering: Command, tiny: Path, tmp_path: Path) -> None:
    done = treering("explain", str(tiny), "seed=3")
    assert done.stdout.startswith("# tiny: 1 stage, 32 samples, 4 steps of 8\n")
    for line in ("name: tiny .*# line 1", "seed: 3 .*# override", "  batch: 8 .*# line 4", "  lr: .*# default"):
        assert any(re.fullmatch(line, printed) for printed in done.stdout.splitlines()), line
    (tmp_path / "printed.yaml").write_text(done.stdout)
    first, second = (
        json.loads(treering("explain", *a, "--json").stdout)
        for a in ([str(tiny), "seed=3"], [str(tmp_path / "printed.yaml")])
    )
    assert first["recipe"] == second["recipe"]
    assert first["origins"]["seed"] == "override"
    assert first["origins"]["log.every"] == "line 12"


def test_data_batch_shares_the_same_batch_out(treering: Command, tiny: Path) -> None:
    one, two = (
        json.loads(treering("data", "batch", str(tiny), "--step", "2", "--world", w, "--json").stdout) for w in "12"
    )
    assert len(one["ranks"][0]) == 8
    assert len(set(one["ranks"][0])) == 8
    assert [len(keys) for keys in two["ranks"]] == [4, 4]
    assert [*two["ranks"][0], *two["ranks"][1]] == one["ranks"][0]


def test_data_pack(treering: Command, refused: Refused, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (tmp_path / "table.tsv").write_text("a.png\ta red square\na.png\tred\n")
    done = treering("data", "pack", str(tmp_path / "table.tsv"), "shards/red", "--images", str(folder), "--json")
    packed = json.loads(done.stdout)
    assert (packed["samples"], packed["captions"]) == (1, 2)
    assert all((tmp_path / "here" / shard).exists() for shard in packed["shards"])
    again = ("data", "pack", str(tmp_path / "table.tsv"), "shards/red", "--images", str(folder))
    assert "0 shards written now" in treering(*again).stdout
    (tmp_path / "table.tsv").write_text("a.png\tanother\n")
    assert "shards/red holds shards packed from another" in refused(*again)
    assert "must be i/n" in refused(*again, "--part", "8/8")
    assert "not found" in refused("data", "pack", str(tmp_path / "none.tsv"), "shards/none")
    for name in "abc":
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")
    (tmp_path / "three.tsv").write_text("".join(f"{name}.png\ta square\n" for name in "abc"))
    parts = ("--shard-size", "1", "--part", "1/2")
    done = treering("data", "pack", str(tmp_path / "three.tsv"), "shards/three", "--images", str(folder), *parts)
    assert done.stdout.startswith("1 sample with 1 caption in 1 of 3 shards\n")
    assert done.stdout.endswith("2 shards still to be written, by the other parts\n")


def test_doctor(treering: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUNTER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    done = treering("doctor", "--json", "--store", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ready"]
    wanted = {
        "python",
        "torch",
        "cores",
        "memory",
        "/dev/shm",
        "run folder",
        "samples://emoji",
        "deepspeed",
        "open_clip",
        "slurm",
        "store",
    }
    assert wanted <= checks.keys()
    assert checks["credentials"]["found"] == "for S3: environment"
    assert checks["store"]["state"] == "ok"
    assert list((tmp_path / "store").rglob("*")) == []
    for check in checks.values():
        assert check["state"] == "ok" or check["remedy"], check
    assert "hunter" not in done.stdout.lower() + done.stderr.lower()


def test_doctor_says_what_is_lacking(treering: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = treering("doctor", "--store", str(tmp_path / "file" / "store"))
    assert done.returncode == 1
    assert "lacking" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "emojy"], ["the recipe 'emojy' does not exist", "emoji, photos"]),
        (["explain", "emoji", "model.image.dpeth=1"], ["did you mean depth"]),
        (["train", "emoji", "data.batch=[1"], ["data.batch", "YAML"]),
        (["train", "emoji", "[red]x[/red]=1"], ["[red]x[/red]"]),
        (["train", "emoji", "\x1b[31mx=1"], ["x1b[31mx"]),
        (["train", "emoji", "--processes", "3"], ["3 processes", "data.batch"]),
        (["train", "emoji", "--processes", "0"], ["--processes 0"]),
        (["train", "emoji", "checkpoint.to=s3://me:hunter2@b/x"], ["AWS_ACCESS_KEY_ID"]),
        (["train", "emoji", "data.train=[{source: nowhere/*.tar}]", "eval.suites=[]"], ["nowhere/*.tar"]),
        (["train", "emoji", "data.train=[{source: samples://emojy}]", "eval.suites=[]"], ["samples://emojy"]),
        (["train", "emoji", "checkpoint.to=quux://x/y"], ["quux"]),
        (["train", "emoji", "checkpoint.to=/proc/nowhere"], ["/proc"]),
        (["train", "emoji", "--out", "/proc/nowhere/run"], ["/proc"]),
        (["train", "emoji", "--out", "/dev/null"], ["'/dev/null' is a file"]),
        (["train", "emoji", "--out", "/dev/null/x"], ["/dev/null"]),
        (["status", "nowhere"], ["nowhere", "not a run folder"]),
        (["report", "nowhere"], ["nowhere", "not a run folder"]),
        (["eval", "nowhere"], ["nowhere", "no commit"]),
        (["eval", "nowhere", "--suite", "foo"], ["'foo'", "retrieval"]),
        (["data", "batch", "emoji", "--step", "999999999"], ["is not a step of the run; its steps are 1 to"]),
        (["data", "batch", "emoji", "--world", "7"], ["7 processes"]),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_short_message(refused: Refused, arguments: list[str], words: list[str]) -> None:
    message = refused(*arguments)
    assert all(word in message for word in words), message
    assert "hunter2" not in message
    assert "\x1b" not in message


def test_the_command_in_a_separate_process_refuses_alike(process: Command, refused: Refused, here: Path) -> None:
    for arguments in (["train", "emoji", "sed=1"], ["eval", "nowhere"]):
        done = process(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == refused(*arguments)
        assert list(here.iterdir()) == []


def test_a_full_disk_is_found_before_anything_starts(refused: Refused) -> None:
    message = refused("train", "emoji", "model.text.width=196608", "checkpoint.keep=1000000")
    assert "GB free" in message
    assert "checkpoint.keep" in message


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    script = (
        "import treering.launch.commands.status as status, sys\n"
        "def broken(folder): raise ZeroDivisionError('ours')\n"
        "status.read_status = broken\n"
        "sys.argv = ['treering', 'status', 'x']\n"
        "from treering.launch.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr


# Several processes


def test_two_processes_train_the_same(process: Command, treering: Command, tiny: Path, tmp_path: Path) -> None:
    for out, processes, command in (("one", "1", treering), ("two", "2", process)):
        done = command("train", str(tiny), "--out", out, "--processes", processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tensorboard") == 2  # one line: its name and its path
    losses = []
    for out in ("one", "two"):
        lines = map(json.loads, (tmp_path / "here" / out / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def broken_loop(folder: Path, body: str) -> dict[str, str]:
    """An environment in which `train` is replaced in every process by `body` (a sitecustomize, found by PYTHONPATH)."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import importlib.abc, importlib.util, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'treering.training.loop':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(folder / 'loop.py')!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    (folder / "loop.py").write_text("import os, signal, sys, time\ndef train(recipe, out, *about, **more):\n" + body)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


RANK_1 = "    if os.environ['RANK'] == '0': time.sleep(600)\n"  # which is not waited for


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (
            RANK_1 + "    from treering.data.errors import DataError\n    raise DataError('shard 7 is cut short')\n",
            2,
            "shard 7 is cut short",
        ),
        (RANK_1 + "    raise ZeroDivisionError('ours')\n", 1, "ZeroDivisionError: ours"),
        (RANK_1 + "    os.kill(os.getpid(), signal.SIGKILL)\n", 1, "process 1 was killed by SIGKILL"),
        (RANK_1 + "    os._exit(7)\n", 1, "process 1 ended with exit code 7"),
    ],
    ids=["data", "bug", "killed", "exit"],
)
def test_a_failing_process_is_reported_once(
    process: Command, tiny: Path, tmp_path: Path, body: str, code: int, words: str
) -> None:
    done = process("train", str(tiny), "--processes", "2", **broken_loop(tmp_path / "site", body))
    assert done.returncode == code, done.stderr
    assert done.stderr.count(words) == 1, done.stderr
    assert ("Traceback" in done.stderr) == (words.startswith("Zero"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Whatever ends the launcher ends its workers too; SIGTERM and SIGINT reach them first."""
    body = (
        "    open(f'worker-{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\n"
        "    def note(*_): open(f'signalled-{os.environ[\"RANK\"]}', 'w'); sys.exit(0)\n"
        "    for each in (signal.SIGTERM, signal.SIGINT): signal.signal(each, note)\n"
        "    time.sleep(600)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | broken_loop(tmp_path / "site", body)
    command = [sys.executable, "-P", "-m", "treering.launch", "train", str(tiny), "--processes", "2"]
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    pids = [wait_for(tmp_path / f"worker-{rank}") for rank in range(2)]
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=100)
    deadline = time.monotonic() + 100
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives its launcher"
        time.sleep(0.05)
    if number == signal.SIGKILL:
        assert launcher.returncode == -number
    else:
        assert launcher.returncode == 130, errors
        assert f"stopped by {number.name}" in errors
        assert "Traceback" not in errors
        assert (tmp_path / "signalled-0").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_ends_a_run_after_a_commit(tiny: Path, here: Path, processes: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "treering.launch", "train", str(tiny), "stages=[{samples: 8_000_000}]"]
    run = subprocess.Popen(
        [*command, "--processes", processes], cwd=here, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = here / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert time.monotonic() < deadline, "no third step"
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert (last["event"], last["reason"]) == ("commit", "signal")


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)
    return int(path.read_text())


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_commit_is_grown_offline_and_trained_on(treering: Command, refused: Refused, tiny: Path) -> None:
    assert treering("train", str(tiny), "--out", "small").returncode == 0
    assert "give the length of the next one" in refused("grow", "small", "--out", "large", "--to", "image.depth=2")
    done = treering("grow", "small", "--out", "large", "samples=16", "--to", "image.depth=2,text.width=24")
    assert done.returncode == 0, done.stderr
    assert "image.depth 1 to 2" in done.stdout
    assert "same function as before" in done.stdout
    assert done.stdout.splitlines()[-1].split(maxsplit=1)[1] == "treering train large/recipe.yaml --out large"
    done = treering("train", "large/recipe.yaml", "--out", "large")
    assert done.returncode == 0, done.stderr
    status = json.loads(treering("status", "large", "--json").stdout)
    assert (status["finished"], status["samples"]) == (True, 48)
    found = treering("grow", "large", "--out", "small2", "samples=16", "--shrink", "image.depth=1", "--json")
    assert [step["operator"] for step in json.loads(found.stdout)["operators"]] == ["drop"]


def commands() -> list[tuple[str, Any]]:
    """Every command with its words, those of groups too."""
    whole = typer.main.get_command(cli.app)
    found: list[tuple[str, Any]] = []
    for name, command in whole.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", {})
        found += [(f"{name} {child}", each) for child, each in inner.items()] or [(name, command)]
    return found


@pytest.mark.parametrize(("words", "command"), commands(), ids=[words for words, _ in commands()])
def test_every_example_of_a_help_page_is_a_line(words: str, command: Any) -> None:
    """typer joins the lines of an example unless prose of two lines comes before it."""
    examples = [line.strip() for line in command.help.splitlines() if line.strip().startswith(f"treering {words} ")]
    page = CliRunner().invoke(cli.app, [*words.split(), "--help"], env={"COLUMNS": "240", "NO_COLOR": "1"}).output
    lines = [line.strip() for line in page.splitlines()]
    assert [line for line in examples if line not in lines] == []
