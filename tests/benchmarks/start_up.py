"""How long does a process take to its first batch, with 10, 1,000 and 40,000 shards?

    python -m tests.benchmarks.start_up [--quick] [--json] [--rounds N]

Every shard is a name of one real tar of 1,000 small photos (hard links: 40,000 of them take no room), and every one has
an index of its own name, made beforehand as `treering data index` makes it. A fresh process then opens the source by a
glob, and by a brace URL, asks for the keys of a global batch of 1,024 and for its first batch of 64 decoded photos.
Times are medians over the rounds; `processor` is the processor time of the three together, which a busy machine
disturbs less; imports (torch, mostly) are counted apart. `first_opening` is what the first process pays that finds
indexes but no summary of them. `--quick` is one round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

SHARDS = (10, 1_000, 40_000)
KEYS, BATCH, SAMPLES = 1_024, 64, 1_000
PARTS = ("imports", "opening", "keys", "first_batch")


def one_start(url: str) -> dict[str, float]:
    """In a fresh process: seconds of each part, and the memory held, in MB."""
    clock = [time.perf_counter()]
    from contextlib import closing

    import torch

    from treering.data import DataConfig, Loader

    torch.set_num_threads(1)
    clock.append(time.perf_counter())
    before, busy = memory(), time.process_time()
    config = DataConfig.model_validate({"train": [{"source": url}], "batch": BATCH})
    loader = Loader(config, 64, 32, seed=0)
    clock.append(time.perf_counter())
    opened = memory()
    assert sum(len(loader.keys(step)) for step in range(KEYS // BATCH)) == KEYS
    clock.append(time.perf_counter())
    with closing(loader.batches(0)) as batches:
        assert len(next(batches).images) == BATCH
    clock.append(time.perf_counter())
    parts = dict(zip(PARTS, (b - a for a, b in pairwise(clock)), strict=True))
    parts["processor"] = time.process_time() - busy
    return parts | {"opened_mb": (opened - before) / 1e6, "after_batch_mb": (memory() - before) / 1e6}


def memory() -> int:
    """Bytes that this process holds now; where the system does not tell, the most it held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_tar(path: Path) -> None:
    """1,000 JPEGs of 64 x 64, with captions and metadata."""
    import tarfile

    import numpy as np
    from PIL import Image

    from treering.data import stream

    with tarfile.open(path, "w") as tar:
        for n in range(SAMPLES):
            file = io.BytesIO()
            pixels = stream(0, "photo", n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(file, "JPEG")
            metadata = json.dumps({"similarity": n / SAMPLES, "nsfw": n % 7 == 0}).encode()
            for kind, data in (("jpg", file.getvalue()), ("txt", b"photo number %d" % n), ("json", metadata)):
                info = tarfile.TarInfo(f"{n:05}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def link_shards(folder: Path, shards: int, tar: Path) -> None:
    """Names of the tar as shards. Each name changes the stamp of all, so all are made before any is indexed."""
    folder.mkdir()
    for n in range(shards):
        os.link(tar, folder / f"{n:05}.tar")


def make_source(folder: Path, shards: int) -> dict[str, str]:
    """Names of the tar's index as indexes of its names. The URLs by form."""
    from treering.data.shards.index import cached_at
    from treering.data.shards.listing import index_shard, list_shards

    urls = {"glob": f"{folder}/*.tar", "braces": f"{folder}/{{00000..{shards - 1:05}}}.tar"}
    found = list_shards(urls["glob"])
    index_shard(found[0])
    first = cached_at(found[0])
    for shard in found[1:]:
        os.link(first, cached_at(shard))
    return urls


def sum_up(urls: dict[str, str]) -> float:
    """Makes the summaries of a source. Seconds of the first opening, where every shard has an index already."""
    from treering.data.shards.listing import list_shards
    from treering.data.shards.opening import summarize_shards
    from treering.data.shards.summary import write_summary

    found = list_shards(urls["glob"])
    begun = time.perf_counter()
    with one_key_in_many_shards():
        summary = summarize_shards(urls["glob"], found)
    seconds = time.perf_counter() - begun
    write_summary(urls["braces"], summary)
    return seconds


@contextmanager
def one_key_in_many_shards() -> Iterator[None]:
    """A small source with keys that repeat, as the names of one tar do, would be refused."""
    from treering.data.shards import opening

    whole = opening._MAX_COMPARED_KEYS
    opening._MAX_COMPARED_KEYS = 0
    yield
    opening._MAX_COMPARED_KEYS = whole


def measure(temporary: Path, rounds: int) -> dict[str, float]:
    os.environ["TREERING_CACHE"] = str(temporary / "cache")
    make_tar(temporary / "photos.tar")
    for n in SHARDS:
        link_shards(temporary / str(n), n, temporary / "photos.tar")
    sources = {n: make_source(temporary / str(n), n) for n in SHARDS}
    figures = {f"first_opening_{shards}": sum_up(urls) for shards, urls in sources.items()}
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for shards, urls in sources.items():
            for form, url in urls.items():
                command = [sys.executable, "-m", "tests.benchmarks.start_up", "--one", url]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.setdefault(f"{form}_{shards}", []).append(json.loads(done.stdout))
    for name, rows in runs.items():
        figures |= {f"{part}_{name}": statistics.median(row[part] for row in rows) for part in rows[0]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_start(options.one)))
        return
    with tempfile.TemporaryDirectory(prefix="start-up-") as temporary:
        figures = measure(Path(temporary), 1 if options.quick else options.rounds)
    device = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "treering", "numpy", "fsspec")}
        print(json.dumps({"benchmark": "start_up", "device": device, "versions": versions, "figures": figures}))
        return
    print_table(figures, device)


def print_table(figures: dict[str, Any], device: str) -> None:
    print(f"{device}; shards of {SAMPLES:,} samples; seconds, medians")
    columns = ("opening", "keys", "first_batch", "processor", "opened_mb", "after_batch_mb", "imports")
    print(f"{'shards':>8} {'URL':7}" + "".join(f"{name:>16}" for name in columns))
    for shards in SHARDS:
        for form in ("glob", "braces"):
            print(f"{shards:8,} {form:7}" + "".join(f"{figures[f'{name}_{form}_{shards}']:16.3f}" for name in columns))
    for name, seconds in figures.items():
        if name.startswith("first_opening"):
            print(f"{name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
