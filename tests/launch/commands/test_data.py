"""`treering data index`, `lint`, `inspect`: what they print, their exit codes, and that nothing hostile is echoed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from treering.tests.support.made_up_shards import Members, shard

Command = Callable[..., "subprocess.CompletedProcess[str]"]
HOSTILE = "x\x1b[2J\x07\u202e<b>[red]y"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TREERING_CACHE", str(folder))
    return folder


def photo(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (17 * colour % 256, colour, 255)).save(file, "JPEG")
    return file.getvalue()


def good(*numbers: int) -> Members:
    members = [[(f"{n}.jpg", photo(n)), (f"{n}.txt", f"picture {n}".encode())] for n in numbers]
    return [member for pair in members for member in pair]


@pytest.fixture
def clean(here: Path) -> str:
    for n in range(3):
        shard(here / "shards" / f"{n}.tar", good(*range(4 * n, 4 * n + 4)))
    return "shards/*.tar"


def safe(done: subprocess.CompletedProcess[str]) -> None:
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert all(c == "\n" or (c.isprintable() and c != "\u202e") for c in text), ascii(text)


def test_index(treering: Command, clean: str, here: Path, cache: Path) -> None:
    done = treering("data", "index", clean, "--workers", "2")
    size = sum(path.stat().st_size for path in (here / "shards").iterdir())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"12 samples in 3 shards, {size / 1000:.3g} kB\n"
    assert len(list((cache / "index").iterdir())) == 3
    found = json.loads(treering("data", "index", clean, "--json").stdout)
    account = found.pop("account")
    assert sum(row["bytes"] for row in account.values()) == found.pop("bytes_accounted_for") == size
    assert sum(row["members"] for row in account.values()) == found.pop("members") == 24
    assert found == {"source": clean, "shards": 3, "samples": 12, "bytes": size, "faults": []}


def test_index_lists_damaged_shards_on_one_screen(treering: Command, clean: str, here: Path) -> None:
    for n in range(30):
        (here / "shards" / f"bad{n:02}\x1b[2J.tar").write_bytes(b"x" * 2048)
    done = treering("data", "index", clean, "--workers", "2")
    assert done.returncode == 2
    assert done.stdout.startswith("12 samples in 3 shards")
    assert done.stderr.startswith("error: 30 faults in 33 shards\n")
    assert "shards/bad07\\x1b[2J.tar is not a tar file" in done.stderr
    assert "bad08" not in done.stderr
    assert "and 22 more" in done.stderr
    assert len(done.stderr.splitlines()) <= 24
    safe(done)
    found = treering("data", "index", clean, "--json")
    assert found.returncode == 2
    assert len(json.loads(found.stdout)["faults"]) == 30


def test_lint(treering: Command, clean: str, here: Path) -> None:
    done = treering("data", "lint", clean)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "0 of 12 samples in 3 shards cannot be used\n", ""
    )  # fmt: skip
    broken = [(f"{HOSTILE}.jpg", b"x"), (f"{HOSTILE}.txt", b"\xff"), ("b.jpg", b"x"), ("b.txt", b"b")]
    shard(here / "shards" / "3.tar", [*good(90), *broken])
    done = treering("data", "lint", clean, "--workers", "2")
    assert done.returncode == 2
    assert done.stderr == ""
    with tarfile.open(here / "shards" / "3.tar") as tar:
        assert f"shards/3.tar at byte {tar.getmember(f'{HOSTILE}.jpg').offset_data}: 'x" in done.stdout
    assert "'x\\x1b[2J\\x07\\u202e<b>[red]y': caption is not UTF-8: byte 0xff at 0" in done.stdout
    assert "'b': picture does not decode: neither JPEG, PNG nor WebP" in done.stdout
    assert "2 of 15 samples in 4 shards cannot be used" in done.stdout
    safe(done)
    shard(here / "shards" / "4.tar", [*good(0), ("91.jpg", b""), ("91.jpg", b"")])
    (here / "shards" / "5.tar").write_bytes((here / "shards" / "0.tar").read_bytes()[:700])
    done = treering("data", "lint", clean)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 3 faults in 6 shards\n")
    for words in ("two members for key '91'", "cut short", "have 1 key in common, such as '0'"):
        assert words in done.stderr
    safe(done)
    found = json.loads(treering("data", "lint", clean, "--json").stdout)
    assert (found["clean"], found["shards"], len(found["bad"]), len(found["faults"])) == (False, 6, 3, 3)
    assert found["bad"][0]["key"] == HOSTILE
    assert found["reasons"] == {"picture does not decode": 1, "caption is not UTF-8": 1, "no caption": 1}


def test_inspect(treering: Command, clean: str, here: Path) -> None:
    metadata = json.dumps({"captions": [HOSTILE, HOSTILE + "2"], "labels": {HOSTILE: HOSTILE}}).encode()
    shard(here / "shards" / "3.tar", [(f"{n}{HOSTILE}.{kind}", data) for n in range(2) for kind, data in
                                      (("jpg", photo(200)), ("json", metadata))])  # fmt: skip
    done = treering("data", "inspect", clean, "--out", "pages/sheet.html", "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "14 samples in 4 shards", "all inspected", "width over height", "1.333", "scripts: Latin 16",
        "pictures that are copies: 1", "captions that are copies: 2", "contact sheet: pages/sheet.html",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    safe(done)
    page = (here / "pages" / "sheet.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 14
    assert "<b>" not in page
    assert not any(c in page for c in "\x1b\x07\u202e")
    found = json.loads(treering("data", "inspect", clean, "--samples", "5", "--json").stdout)
    assert (found["samples"], found["inspected"]) == (14, 5)
    assert found["pictures"]["width"]["mean"] == 40
    assert list((here / "pages").iterdir()) == [here / "pages" / "sheet.html"]


def test_inspect_a_ledger(treering: Command, clean: str, here: Path) -> None:
    """The ledger that a run leaves leads to its samples, and only to them."""
    from treering.data import DataConfig, Loader
    from treering.training.logging.jsonl import RunRecords

    shard(here / "shards" / "3.tar", [*good(90, 91), (f"{HOSTILE}.jpg", photo(1)), (f"{HOSTILE}.txt", b"\xff"),
                                      ("c.jpg", b"x"), ("c.txt", b"c")])  # fmt: skip
    loader = Loader(DataConfig.model_validate({"train": [{"source": clean}], "batch": 16}), 16, 16, seed=0)
    entries = next(loader.batches(0)).bad
    assert {entry.key for entry in entries} == {HOSTILE, "c"}
    log = RunRecords(here / "run")
    log.ledger.append(*({"step": 1, **asdict(entry)} for entry in entries))
    done = treering("data", "inspect", clean, "--ledger", "run/ledger.jsonl", "--out", "sheet.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 samples listed in" in done.stdout
    assert "caption is not UTF-8: byte 0xff at 0" in done.stdout
    assert "picture does not decode: neither" in done.stdout
    assert "picture 9" not in done.stdout
    safe(done)
    page = (here / "sheet.html").read_text(encoding="utf-8")
    assert (page.count('<li class="card">'), page.count("<img ")) == (2, 1)
    found = json.loads(treering("data", "inspect", clean, "--ledger", "run/ledger.jsonl", "--json").stdout)
    assert [len(found["samples"]), found["gone"], found["elsewhere"]] == [2, 0, 0]
    shard(here / "shards" / "3.tar", [*good(90, 91), *[(f"c.{name}", data) for name, data in
                                                       (("jpg", photo(2)), ("txt", b"mended"))]])  # fmt: skip
    done = treering("data", "inspect", clean, "--ledger", "run/ledger.jsonl")
    assert "now: it can be used" in done.stdout
    assert "1 more are no longer in their shards" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "nowhere/*.tar"], "no shards match nowhere/*.tar"),
        (["lint", "nowhere/*.tar"], "no shards match nowhere/*.tar"),
        (["inspect", "samples://emojy"], "samples://emojy is unknown"),
        (["inspect", "shards/*.tar", "--ledger", "nowhere.jsonl"], "cannot read 'nowhere.jsonl'"),
        (["inspect", "shards/*.tar", "--ledger", "shards/0.tar"], "not an entry of a ledger"),
    ],
)
def test_mistakes(treering: Command, clean: str, arguments: list[str], words: str) -> None:
    done = treering("data", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    safe(done)


def test_a_sheet_of_twemoji_has_the_credit_of_the_pictures(treering: Command, clean: str, here: Path) -> None:
    for number, (url, count) in enumerate((("samples://emoji/held_out", 1), (clean, 0))):
        done = treering("data", "inspect", url, "--samples", "4", "--out", f"{number}.html", "--workers", "1")
        assert done.returncode == 0, done.stderr
        page = (here / f"{number}.html").read_text(encoding="utf-8")
        assert page.count("Twemoji, Copyright 2019 Twitter, Inc and other contributors, CC BY 4.0") == count


def test_a_sheet_that_cannot_be_written(treering: Command, clean: str) -> None:
    done = treering("data", "inspect", clean, "--out", "shards")
    assert done.returncode == 2
    assert "cannot write 'shards'" in done.stderr
    safe(done)


@pytest.mark.timeout(60)
def test_no_process_outlives_the_command(clean: str, here: Path) -> None:
    """SIGKILL gives the command no time to end its processes: they end by themselves."""
    script = (
        "import os, sys, time\n"
        "from treering.data.shards.parallel import sweep\n"
        "def work(n):\n"
        "    open(f'pid-{os.getpid()}', 'w').close()\n"
        "    time.sleep(0.1)\n"
        "list(sweep(work, range(10_000), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=here)
    deadline = time.monotonic() + 40
    while len(pids := [int(path.name[4:]) for path in here.glob("pid-*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process outlives the command"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
