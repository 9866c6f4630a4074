"""How near is the loader to the speed of decoding, and how far ahead of what others use?

    python -m tests.benchmarks.loader [--quick] [--json] [--photos DIR] [--workers N] [--rounds N]

All take turns on the same photos: 224 pixels, 77 tokens, batches of 64, N processes each (left out: one a core).
`ours` reads tar shards from the disk, `ours, S3` from a real S3 server on this machine into an empty cache;
`webdataset` is how open_clip feeds its trainer (PIL, its own image_transform and tokenizer); MosaicML Streaming and
LitData have the same transform, read their own formats from the disk, and run where they are installed. The `ceiling`
is a bare loop in N processes that decodes and resizes the same bytes, in memory, with the fastest libraries, and does
nothing else. Ratios are medians over the rounds of photos per second within a round; "per cpu" is the same per second
of processor time, which a busy machine disturbs less. Photos are made here (1/f noise with edges, JPEG quality 90,
500 x 375) unless DIR holds some, with a captions.tsv. `--quick` ends within a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from treering.data import Source, open_source, stream
from treering.data.samples.decode import picture, resized
from treering.data.tools.pack import pack
from treering.models.interchange.open_clip_import import import_open_clip
from treering.training.device import device_name

from . import loader_arms as arms
from .loader_arms import BATCH, RESOLUTION, Sizes

Figures = dict[str, float]
PEERS = {"streaming": "mosaicml-streaming", "litdata": "litdata"}
WORDS = ("a", "photo", "of", "two", "small", "brown", "dogs", "running", "over", "wet", "grass", "near", "the", "house")


def make_photos(folder: Path, count: int) -> Path:
    """Pictures with the statistics that cost a decoder its time: 1/f spectra, hard edges, correlated colours."""
    frequencies = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None]) + 1 / 500
    rows, columns = np.mgrid[0:375, 0:500]
    lines = []
    for n in range(count):
        random = stream(0, "photo", n)
        planes = np.fft.irfft2(
            random.standard_normal((3, 375, 251)) * np.exp(1j * random.uniform(0, 6.28, (375, 251))) / frequencies,
            (375, 500),
        )
        planes = planes / planes.std() * 40 + 128
        for _ in range(12):
            centre, radius = random.uniform(0, (375, 500)), random.uniform(10, 120)
            inside = np.hypot(rows - centre[0], columns - centre[1]) < radius
            planes[:, inside] = 0.5 * planes[:, inside] + random.uniform(0, 128, (3, 1))
        pixels = planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / f"{n:05}.jpg", quality=90)
        lines.append(f"{n:05}.jpg\t{' '.join(random.choice(WORDS, int(random.integers(6, 20))))}\n")
    (folder / "captions.tsv").write_text("".join(lines))
    return folder / "captions.tsv"


@dataclass
class Rate:
    """What one arm did in one round."""

    photos: float  # a second
    per_cpu: float  # a second of the processor time of all its processes
    private: float = 0.0  # MB that a process shares with no other
    proportional: float = 0.0  # MB of a process, shared pages divided by those who share them


def throughput(start: Callable[[], Sizes], batches: int, warm: int) -> Rate:
    """What an arm does after `warm` batches."""
    with closing(start()) as sizes:  # type: ignore[type-var]
        for _ in range(warm):
            next(sizes)
        begun, busy = time.perf_counter(), processor_seconds()
        photos = sum(next(sizes) for _ in range(batches))
        seconds, busy = time.perf_counter() - begun, processor_seconds() - busy
        memory = [found for process in multiprocessing.active_children() if (found := memory_of(process))]
    private, proportional = np.mean(memory, axis=0) / 1e6 if memory else (0.0, 0.0)
    return Rate(photos / seconds, photos / busy, float(private), float(proportional))


def first_pass(start: Callable[[], Sizes], batches: int) -> float:
    """Photos a second from the first question on, the start of the processes included."""
    with closing(start()) as sizes:  # type: ignore[type-var]
        begun = time.perf_counter()
        return sum(next(sizes) for _ in range(batches)) / (time.perf_counter() - begun)


def processor_seconds() -> float:
    """What this process and its living children have taken of the processors (Linux: proc(5), fields 14 and 15)."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def memory_of(process: Any) -> tuple[int, int] | None:
    """Bytes that a decoding process shares with no other, and its share of all its pages; None where the system does
    not tell."""
    if process.name == "reading ahead":
        return None
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"]


def agreement(source: Source) -> dict[str, float]:
    """PSNR in dB of our pixels against those of the usual pipeline (Pillow, torchvision) for one crop of each photo;
    and of scaled decoding against exact decoding."""
    from torchvision.transforms.functional import InterpolationMode, resized_crop

    found, scaled = [], []
    for number in range(min(len(source), 50)):
        fields = source.record(number).fields
        pixels = picture(fields)
        height, width = pixels.shape[:2]
        top, left = height // 40, width // 40
        own = resized(pixels[top : height - top, left : width - left], RESOLUTION, RESOLUTION)
        theirs = resized_crop(
            Image.open(io.BytesIO(arms.photo(fields))).convert("RGB"),
            top,
            left,
            height - 2 * top,
            width - 2 * left,
            [RESOLUTION, RESOLUTION],
            InterpolationMode.BICUBIC,
        )
        found.append(psnr(own, np.asarray(theirs)))
        small = resized(picture(fields, round(RESOLUTION / 0.9**0.5)), RESOLUTION, RESOLUTION)
        scaled.append(psnr(small, resized(pixels, RESOLUTION, RESOLUTION)))
    return {
        "psnr_median_db": statistics.median(found),
        "psnr_least_db": min(found),
        "psnr_scaled_median_db": statistics.median(scaled),
        "psnr_scaled_least_db": min(scaled),
    }


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """In dB; at most 100, for equal pixels."""
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 255**2 / 1e10)))


def s3_server(stack: ExitStack, folder: Path, shards: list[str]) -> str | None:
    """The URL of the shards on a real S3 server of our own; None if its binary is not installed."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if importlib.util.find_spec("pytest") is None or not shutil.which("weed", path=places):
        return None
    import s3fs

    from ..support.s3_server import BUCKET, KEY, SECRET, Server

    folder.mkdir()
    server = Server(folder)
    stack.callback(server.kill)
    server.start()
    server.wait()
    access = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": server.endpoint}
    os.environ |= access | {"AWS_DEFAULT_REGION": "us-east-1"}
    system = s3fs.S3FileSystem(endpoint_url=server.endpoint, key=KEY, secret=SECRET, skip_instance_cache=True)
    for shard in shards:
        system.put_file(shard, f"{BUCKET}/photos/{Path(shard).name}")
    return f"{server.url}/photos/*.tar"


def warm_batches(workers: int) -> int:
    """More than any arm decodes ahead, so that nothing of what is timed was made before."""
    return 3 + 2 * workers


def contestants(
    stack: ExitStack, source: Source, shards: list[str], folder: Path, workers: int, epoch: int
) -> dict[str, Callable[[], Sizes]]:
    """All that can run here, by name. Those that know epochs get one of `epoch` photos, so as not to be stopped by
    its end."""
    found: dict[str, Callable[[], Sizes]] = {
        "ours": partial(arms.ours, source.url, workers),
        "ours, scaled": partial(arms.ours, source.url, workers, "scaled"),
        "webdataset": partial(arms.webdataset, shards, workers),
    }
    if url := s3_server(stack, folder / "s3", shards):
        found["ours, S3"] = partial(arms.ours, url, workers)
    if arms.installed(PEERS["streaming"]):
        arms.write_streaming(source, folder / "mds", epoch)
        found["streaming"] = partial(arms.streaming, folder / "mds", workers)
    if arms.installed(PEERS["litdata"]):
        arms.write_litdata(source, folder / "lit", epoch)
        found["litdata"] = partial(arms.litdata, folder / "lit", workers)
    return found


def measure(source: Source, starts: dict[str, Callable[[], Sizes]], workers: int, rounds: int, batches: int) -> Figures:
    """All arms in turns; the figures."""
    rates: dict[str, list[Rate]] = {"ceiling": [], **{arm: [] for arm in starts}}
    first: list[float] = []
    warm = warm_batches(workers)
    photos = [arms.photo(source.record(n).fields) for n in range(len(source))]
    in_a_pass = len(source) // BATCH
    for turn in range(rounds):
        empty_cache(turn)
        if "ours, S3" in starts:
            first.append(first_pass(starts["ours, S3"], in_a_pass) / first_pass(starts["ours"], in_a_pass))
        for arm in sorted(rates, key=lambda arm: (list(rates).index(arm) + turn) % len(rates)):
            if arm == "ceiling":
                rates[arm].append(Rate(*arms.ceiling(photos, max(workers, 1), batches * BATCH)))
            else:
                rates[arm].append(throughput(starts[arm], batches, warm))
            last = rates[arm][-1]
            print(f"round {turn + 1}, {arm}: {last.photos:.0f} a second, {last.per_cpu:.0f} per cpu", file=sys.stderr)
    figures: Figures = {}
    for arm, found in rates.items():
        name = arm.replace(", ", "_").lower()
        figures[f"{name}_photos_per_second"] = statistics.median(rate.photos for rate in found)
        figures[f"{name}_private_mb"] = statistics.median(rate.private for rate in found)
        figures[f"{name}_pss_mb"] = statistics.median(rate.proportional for rate in found)
        if arm in ("ours", "ours, S3", "ours, scaled"):
            continue
        pairs = list(zip(rates["ours"], found, strict=True))
        figures |= spread(f"ratio_to_{name}", [mine.photos / theirs.photos for mine, theirs in pairs])
        figures[f"cpu_ratio_to_{name}"] = statistics.median(mine.per_cpu / theirs.per_cpu for mine, theirs in pairs)
    for arm, name in (("ours, S3", "s3_ratio"), ("ours, scaled", "scaled_ratio")):
        pairs = list(zip(rates["ours"], rates.get(arm, []), strict=False))
        figures |= spread(name, [it.photos / mine.photos for mine, it in pairs])
    return figures | spread("s3_first_pass_ratio", first) | agreement(source)


def spread(name: str, ratios: list[float]) -> Figures:
    """Median, least and largest; nothing of nothing."""
    if not ratios:
        return {}
    return {name: statistics.median(ratios), f"{name}_low": min(ratios), f"{name}_high": max(ratios)}


def empty_cache(turn: int) -> None:
    """The next sources are indexed, and read from S3, as on a node that has not seen them."""
    folder = Path(os.environ["TREERING_CACHE"]).parent / f"cache{turn}"
    os.environ["TREERING_CACHE"] = str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_open_clip()
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary, ExitStack() as stack:
        os.environ["TREERING_CACHE"] = f"{temporary}/cache"
        folder = Path(temporary, "photos")
        folder.mkdir()
        table = (
            options.photos / "captions.tsv" if options.photos else make_photos(folder, 128 if options.quick else 512)
        )
        packed = pack(table, f"{temporary}/shards", shard_size=16 if options.quick else 48)
        source = open_source(f"{temporary}/shards/*.tar")
        rounds, batches = (2, 4) if options.quick else (options.rounds, 16)
        epoch = (warm_batches(options.workers) + batches + 1) * BATCH
        starts = contestants(stack, source, list(packed.shards), Path(temporary), options.workers, epoch)
        figures = measure(source, starts, options.workers, rounds, batches)
        sizes = [len(arms.photo(source.record(n).fields)) / 1000 for n in range(len(source))]
        figures |= {"photos": len(sizes), "median_photo_kb": statistics.median(sizes)}
    device = device_name(torch.device("cpu"))
    if options.json:
        names = ("torch", "treering", "webdataset", "open_clip_torch", "torchvision", "Pillow", "simplejpeg")
        versions = {name: arms.installed(name) for name in (*names, *PEERS.values())}
        print(json.dumps({"benchmark": "loader", "device": device, "versions": versions, "figures": figures}))
        return
    print_table(figures, device, options.workers)


def print_table(figures: Figures, device: str, workers: int) -> None:
    def ratio(name: str) -> str:
        if name not in figures:
            return ""
        return f"{figures[name]:.2f} ({figures[name + '_low']:.2f}-{figures[name + '_high']:.2f})"

    print(f"{device}; {workers} processes; {figures['photos']:.0f} photos, median {figures['median_photo_kb']:.0f} kB")
    print(f"{'arm':14}{'photos/s':>10}{'ours / it':>20}{'per cpu':>10}{'MB a worker: private':>22}{'PSS':>7}")
    for arm in ("ours", "ours, scaled", "ours, S3", "ceiling", "webdataset", *PEERS):
        name = arm.replace(", ", "_").lower()
        if f"{name}_photos_per_second" not in figures:
            print(f"{arm:14}  not installed")
            continue
        busy = f"{figures[f'cpu_ratio_to_{name}']:.2f}" if f"cpu_ratio_to_{name}" in figures else ""
        sizes = [f"{figures[f'{name}_{kind}_mb']:.0f}" if arm != "ceiling" else "" for kind in ("private", "pss")]
        print(
            f"{arm:14}{figures[f'{name}_photos_per_second']:10.1f}{ratio(f'ratio_to_{name}'):>20}{busy:>10}"
            f"{sizes[0]:>22}{sizes[1]:>7}"
        )
    print(f"from S3: {ratio('s3_ratio')} of local; first pass, cache empty: {ratio('s3_first_pass_ratio')}")
    print(
        f"PSNR against torchvision's pixels: median {figures['psnr_median_db']:.1f} dB, least "
        f"{figures['psnr_least_db']:.1f}; scaled decoding {ratio('scaled_ratio')} times as fast, PSNR against exact "
        f"median {figures['psnr_scaled_median_db']:.1f} dB, least {figures['psnr_scaled_least_db']:.1f}"
    )


if __name__ == "__main__":
    main()
