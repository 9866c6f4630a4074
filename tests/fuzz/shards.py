"""Hostile shards against all that reads them: index, source, decoders, tokenizer, loader, lint, inspect, sheet, pack.

    python -m tests.fuzz.shards --minutes 10          # from the repository root
    python -m tests.fuzz.shards --case 1234           # one case again, with its traceback

A case is a number: shards made by hostile.py, read in a child process in every way there is. What must not happen, and
is a fault: an exception other than DataError and BadSample; a death of the process; more than SECONDS of processor time
(or a wait of WALL); more memory than MEMORY beyond the start; a file opened for writing, made, moved or removed outside
the cache folder and the outputs asked for, whatever the keys are (told by an audit hook, and by listing the home before
and after); a process started, a connection opened, anything unpickled. And two things that must be true: lint names
exactly the samples that cannot be read one by one, and what pack leaves in a shard is clean.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from treering.data import DataConfig, DataError, Loader, Tokenizer, open_source
from treering.data.config import AugmentConfig
from treering.data.errors import BadSample
from treering.data.order import stream
from treering.data.samples.clip_tokenizer import clean_text
from treering.data.samples.decode import captions_and_labels, picture, random_crop
from treering.data.tools.contact_sheet import Section, cards, write_sheet
from treering.data.tools.inspect import inspect, inspect_sample, sample_numbers
from treering.data.tools.lint import lint, write_ledger
from treering.data.tools.pack import pack
from treering.tests.fuzz import hostile, pictures

SECONDS = 20.0
WALL = 180.0
MEMORY = 3 << 30  # a picture of 64 megapixels with transparency takes 1.1 GB on its way to RGB
TOGETHER = 100  # cases of one child
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
            "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1}  # fmt: skip
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
          "socket.getaddrinfo", "pickle.find_class")  # fmt: skip


@dataclass
class Outcome:
    """What came of the cases."""

    seed: int
    cases: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)


def exercise(folder: Path, random: Random, counts: Counter[str]) -> None:
    """Reads the shards of `folder`/data in every way. Raises AssertionError where two ways disagree."""
    for ending in sorted({path.suffix for path in (folder / "data").iterdir()}):
        url = f"{folder}/data/*{ending}"
        with _refusals(counts, "lint"):
            found = lint(url)
            write_ledger(folder / "out" / "bad.jsonl", found.bad)
            counts.update({f"bad: {kind}": count for kind, count in found.kinds.items()})
        with _refusals(counts, "source"):
            source = open_source(url)
            bad = {n for n in range(len(source)) if not _readable(source, n, counts)}
            named = {(entry.shard, entry.key) for entry in found.bad}
            if not found.faults:
                assert {(source.shard(n), source.key(n)) for n in bad} == named, "lint and source disagree"
            inspect(source, sample_numbers(source, 9))
            seen = [Section("", cards(source, sample_numbers(source, 9)))]
            for name in ("sheet.html", "sheet.png"):
                write_sheet(folder / "out" / name, url, "", seen)
        with _refusals(counts, "loader"):
            config = {"train": [{"source": url}], "batch": 2, "max_bad_fraction": 0.9}
            with contextlib.closing(Loader(DataConfig.model_validate(config), 16, 16, seed=0).batches(0)) as batches:
                next(batches)
            counts["batches"] += 1
        with _refusals(counts, "pack"):
            packed = pack(url, str(folder / "out" / "set"), random.choice(("1MB", "2", "50kB")), skip_bad=True)
            if packed.bad < packed.samples:
                again = lint(str(folder / "out" / "set" / "*.tar"))
                assert again.clean, f"what was packed is not clean: {again.bad[:3]} {again.faults[:3]}"
                assert again.samples == packed.samples - packed.bad, "samples lost in packing"
            counts["packed"] += packed.samples - packed.bad
        shutil.rmtree(folder / "out" / "set", ignore_errors=True)


def _readable(source: Any, number: int, counts: Counter[str]) -> bool:
    """Reads one sample by the steps of training; whether it can be used."""
    tokenizer = _TOKENIZER
    try:
        record = source.record(number)
        captions, _ = captions_and_labels(record.fields)
        pixels = picture(record.fields)
    except BadSample as error:
        if not str(error).isprintable():
            raise AssertionError(f"a reason that is not printable: {error!r}") from None
        return False
    random_crop(pixels, 16, AugmentConfig(), stream(0, "fuzz", number))
    for caption in captions[:50]:
        ids = tokenizer.encode(caption, 77)
        assert 2 <= len(ids) <= 77
        tokenizer.decode(ids)
        clean_text(caption)
    inspect_sample(source, number, tokenizer)
    counts["usable"] += 1
    return True


@contextlib.contextmanager
def _refusals(counts: Counter[str], what: str) -> Iterator[None]:
    """Passes over a refusal in words, and over nothing else."""
    try:
        yield
    except DataError as error:
        counts[f"{what} refused"] += 1
        if not str(error):
            raise AssertionError("a refusal without words") from None


def run_case(seed: int, number: int, home: Path, counts: Counter[str], act: Callable[..., None] = exercise) -> None:
    """One case in the folder `home`; raises what goes wrong."""
    random = Random(f"{seed}/{number}")
    for name in ("data", "out", "cache"):
        shutil.rmtree(home / name, ignore_errors=True)
        (home / name).mkdir()
    for name, data in hostile.shards(random).items():
        (home / "data" / name).write_bytes(data)
    before = _listing(home)
    act(home, random, counts)
    if random.random() < 0.2:  # once more, with a cache that somebody has harmed
        for path in sorted((home / "cache").rglob("*")):
            if path.is_file():
                path.write_bytes(pictures.damaged(random, path.read_bytes()))
        counts["harmed caches"] += 1
        act(home, random, counts)
    assert _listing(home) == before, f"files changed outside the cache: {sorted(_listing(home) ^ before)[:5]}"


def _listing(home: Path) -> set[tuple[str, int, int]]:
    """Everything in the home but the cache and the outputs, with sizes and times; and that outputs have plain names."""
    found = set()
    for path in home.rglob("*"):
        top = path.relative_to(home).parts[0]
        if top in ("cache", "out"):
            assert not path.is_symlink(), f"a link: {path}"
            assert path.name.isprintable(), f"a hostile name: {path}"
        else:
            status = path.lstat()
            found.add((str(path), status.st_size, status.st_mtime_ns if path.is_file() else 0))
    return found


def _watch(home: Path) -> list[str]:
    """From now on in this process: no change outside `home`, no process, no connection, nothing unpickled."""
    seen: list[str] = []
    root = str(home.resolve()) + os.sep

    def inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        full = os.path.realpath(os.fsdecode(path))
        return (full + os.sep).startswith(root) or full == os.devnull

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            wrong = not inside(arguments[0])
        elif event in _CHANGES:
            wrong = not all(inside(path) for path in arguments[: _CHANGES[event]])
        else:
            wrong = event in _NEVER
        if wrong:
            seen.append(f"{event} {ascii(arguments)[:200]}")
            raise PermissionError(f"fuzzing: {event}")

    sys.addaudithook(hook)
    return seen


def _child(seed: int, numbers: range, home: Path, say: Callable[..., None], act: Callable[..., None]) -> None:
    """Runs cases in this process, which has its limits; `say` is heard by the parent."""
    os.environ |= {"HOME": str(home), "TREERING_CACHE": str(home / "cache"), "TMPDIR": str(home / "out")}
    tempfile.tempdir = None
    os.chdir(home)
    crash = open(home / "stacks", "w+b", buffering=0)  # noqa: SIM115 (lives as long as the process)
    faulthandler.enable(crash)
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, crash, chain=True)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY, virtual + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    changes = _watch(home)
    for number in numbers:
        counts: Counter[str] = Counter()
        say(start=number)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL)
        fault = None
        try:
            run_case(seed, number, home, counts, act)
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"[:300] + "\n" + traceback.format_exc()[-3000:]
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if changes:
            fault = f"outside the cache: {changes[0]}"
            changes.clear()
        say(end=number, counts=counts, fault=fault)


def fuzz(
    seed: int, first: int, most: int, minutes: float, act: Callable[..., None] = exercise, told: bool = False
) -> Outcome:
    """Cases first, first + 1, ... until `most` are done or the time is over. Each child runs TOGETHER of them."""
    warnings.simplefilter("ignore")  # Pillow's, of EXIF that it cannot read
    pictures.valid_pictures(), hostile.gzip_bomb(), pictures.bombs()
    import jinja2  # noqa: F401 (what the children would import each)
    import torch

    torch.set_num_threads(1)
    outcome, begun, number = Outcome(seed), time.monotonic(), first
    while number < first + most and time.monotonic() - begun < 60 * minutes:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            home = Path(folder).resolve()
            numbers = range(number, min(number + TOGETHER, first + most))
            number = _watched(outcome, numbers, home, act, begun + 60 * minutes)
        outcome.seconds = time.monotonic() - begun
        if told:
            print(f"{outcome.cases:,} cases, {len(outcome.faults)} faults, {outcome.seconds:.0f} s", file=sys.stderr)
    return outcome


def _watched(outcome: Outcome, numbers: range, home: Path, act: Callable[..., None], until: float) -> int:
    """Runs a child and hears it to its end; the number of the next case."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def say(**words: Any) -> None:
            os.write(writing, json.dumps(words).encode() + b"\n")
            if "end" in words and time.monotonic() > until:
                os._exit(0)

        try:
            _child(outcome.seed, numbers, home, say, act)
        finally:
            os._exit(0)
    os.close(writing)
    current, following = None, numbers.start
    with open(reading, encoding="utf-8") as heard:
        for line in heard:
            words = json.loads(line)
            if "start" in words:
                current = words["start"]
                following = current + 1
                continue
            outcome.cases += 1
            outcome.counts.update(words["counts"])
            if words["fault"]:
                outcome.faults.append({"case": current, "what": words["fault"]})
            current = None
    _, status = os.waitpid(child, 0)
    if current is not None:
        outcome.cases += 1
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
        what = {"SIGPROF": "hang", "SIGALRM": "hang (waiting)"}.get(name, "death of the process")
        stacks = (home / "stacks").read_text(errors="replace")[-3000:] if (home / "stacks").exists() else ""
        outcome.faults.append({"case": current, "what": f"{what}: {name}\n{stacks}"})
    return following


_TOKENIZER = Tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fuzz.shards", description="Hostile shards against all that reads them")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=1 << 60, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    first, most = (options.case, 1) if options.case is not None else (options.first, options.cases)
    outcome = fuzz(options.seed, first, most, options.minutes, told=not options.json)
    if options.json:
        print(json.dumps(asdict(outcome), indent=1))
    else:
        for what, count in outcome.counts.most_common():
            print(f"{count:9,}  {what}")
        for fault in outcome.faults:
            print(f"\ncase {fault['case']} of seed {outcome.seed}: {fault['what']}")
        print(f"{outcome.cases:,} cases in {outcome.seconds:.0f} s: {len(outcome.faults)} faults")
    sys.exit(1 if outcome.faults else 0)


if __name__ == "__main__":
    main()
