"""How near is the loader to the speed of decoding, and how far ahead of WebDataset's usual pipeline?

    python -m tests.benchmarks.loader [--quick] [--json] [--photos DIR] [--workers N]

Three arms take turns on the same tar shards, 224 pixels, 77 tokens, with N processes each (left out: one a core):
`ours` (Loader), `webdataset` (as open_clip feeds its trainer: PIL, its own image_transform and tokenizer) and
`ceiling` (nothing but our decode and crop of the same bytes, in memory, in a bare loop). Ratios are medians over the
rounds of photos per second in one round; "per cpu" is the same per second of processor time, which a busy machine
disturbs less. Photos are made here (1/f noise with edges, JPEG quality 90, 500 x 375) unless DIR holds some, with a
captions.tsv. `--quick` ends within a minute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from treering.data import AugmentConfig, DataConfig, Loader, Source, open_source, stream
from treering.data.decode import picture, random_crop, resized
from treering.data.pack import pack
from treering.training.device import describe

RESOLUTION, CONTEXT, BATCH = 224, 77, 32
AUGMENT = AugmentConfig()  # crops as open_clip's default: 0.9 to 1 of the area
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


def ours(url: str, workers: int) -> Iterator[int]:
    """The loader; yields the size of each batch."""
    config = DataConfig(train=[{"source": url}], batch=BATCH, workers=workers, augment=AUGMENT)  # type: ignore[list-item,arg-type]
    with closing(Loader(config, RESOLUTION, CONTEXT, seed=0).batches(0)) as batches:
        for batch in batches:
            yield len(batch.images)


def webdataset(shards: list[str], workers: int) -> Iterator[int]:
    """The stages of open_clip_train 3.3.0's get_wds_dataset, with a shuffle buffer that such a small set can fill."""
    import open_clip
    import webdataset as wds

    transform = open_clip.image_transform(RESOLUTION, is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    stages = [
        wds.SimpleShardList(shards),
        wds.shuffle(100),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(64, initial=32),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    ]
    loader = wds.WebLoader(wds.DataPipeline(*stages).repeat(), batch_size=None, shuffle=False, num_workers=workers)
    batches = iter(loader)
    try:
        for images, _ in batches:
            yield len(images)
    finally:
        del batches


def throughput(start: Callable[[], Iterator[int]], batches: int, warm: int) -> tuple[float, float, float]:
    """Photos per second after `warm` batches, photos per second of all processes' processor time, and the memory of
    its own that a worker holds at the end, in MB."""
    with closing(start()) as stream_:  # type: ignore[type-var]
        for _ in range(warm):
            next(stream_)
        begun, busy = time.perf_counter(), processor_seconds()
        photos = sum(next(stream_) for _ in range(batches))
        seconds, busy = time.perf_counter() - begun, processor_seconds() - busy
        memory = [private_memory(process.pid) for process in multiprocessing.active_children() if process.pid]
    return photos / seconds, photos / busy, statistics.mean(memory) / 1e6 if memory else 0.0


def processor_seconds() -> float:
    """What this process and its living children have taken of the processors (Linux: proc(5), fields 14 and 15)."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def private_memory(pid: int) -> int:
    """Bytes that a process shares with no other; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def ceiling(source: Source, workers: int, photos: int) -> tuple[float, float]:
    """Photos per second, and per second of processor time, of decode and crop alone, in `workers` processes; reading
    is not timed."""
    records = [source.record(n) for n in range(len(source))]
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(workers), context.SimpleQueue()
    share = photos // workers

    def loop(worker: int) -> None:
        torch.set_num_threads(1)
        random = stream(0, "ceiling", worker)
        ready.wait()
        begun, busy = time.perf_counter(), time.process_time()
        for n in range(worker * share, (worker + 1) * share):
            random_crop(picture(records[n % len(records)].fields), RESOLUTION, AUGMENT, random)
        results.put((time.perf_counter() - begun, time.process_time() - busy))

    processes = [context.Process(target=loop, args=(worker,)) for worker in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds, busy = zip(*(results.get() for _ in processes), strict=True)
    return workers * share / max(seconds), workers * share / sum(busy)


def agreement(source: Source) -> list[float]:
    """PSNR in dB of our pixels against Pillow's, for one crop of each photo."""
    found = []
    for number in range(min(len(source), 50)):
        fields = source.record(number).fields
        pixels = picture(fields)
        height, width = pixels.shape[:2]
        top, left = height // 40, width // 40
        data = next(fields[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in fields)
        theirs = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, width - left, height - top))
        theirs = theirs.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
        own = resized(pixels[top : height - top, left : width - left], RESOLUTION, RESOLUTION)
        error = np.mean((own.astype(float) - np.asarray(theirs)) ** 2)
        found.append(float(10 * np.log10(255**2 / max(error, 1e-12))))
    return found


def torchvision_beside_cpu_torch() -> list[torch.library.Library]:
    """torchvision's wheel for CUDA, beside a CPU build of torch, misses two schemas; open_clip needs it to import."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        return []
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]


def measure(source: Source, shards: list[str], workers: int, rounds: int, batches: int) -> dict[str, float]:
    """All arms in turns; the figures."""
    rates: dict[str, list[tuple[float, float]]] = {"ours": [], "webdataset": [], "ceiling": []}
    memory: dict[str, float] = {}
    warm = 2 * max(workers, 1)  # what was decoded ahead before the clock ran
    for _ in range(rounds):
        rates["ceiling"].append(ceiling(source, max(workers, 1), batches * BATCH))
        *rate, memory["ours"] = throughput(lambda: ours(source.url, workers), batches, warm)
        rates["ours"].append((rate[0], rate[1]))
        *rate, memory["webdataset"] = throughput(lambda: webdataset(shards, workers), batches, warm)
        rates["webdataset"].append((rate[0], rate[1]))
    psnr = agreement(source)
    figures = {f"{arm}_photos_per_second": statistics.median(r for r, _ in values) for arm, values in rates.items()}
    for other in ("ceiling", "webdataset"):
        pairs = list(zip(rates["ours"], rates[other], strict=True))
        ratios = [mine[0] / theirs[0] for mine, theirs in pairs]
        figures |= {f"ratio_to_{other}": statistics.median(ratios), f"ratio_to_{other}_low": min(ratios)}
        figures[f"ratio_to_{other}_high"] = max(ratios)
        figures[f"cpu_ratio_to_{other}"] = statistics.median(mine[1] / theirs[1] for mine, theirs in pairs)
    figures |= {f"{arm}_worker_mb": size for arm, size in memory.items()}
    return figures | {"psnr_median_db": statistics.median(psnr), "psnr_least_db": min(psnr)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = torchvision_beside_cpu_torch()
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        os.environ["TREERING_CACHE"] = f"{temporary}/cache"
        folder = Path(temporary, "photos")
        folder.mkdir()
        table = options.photos / "captions.tsv" if options.photos else make_photos(folder, 64 if options.quick else 480)
        packed = pack(table, f"{temporary}/shards", shard_size=8 if options.quick else 48)
        source = open_source(f"{temporary}/shards/*.tar")
        rounds, batches = (3, 6) if options.quick else (7, 40)
        figures = measure(source, list(packed.shards), options.workers, rounds, batches)
        photos = [record.fields for record in map(source.record, range(len(source)))]
        figures["photos"] = len(photos)
        figures["median_photo_kb"] = statistics.median(
            len(next(data for kind, data in fields.items() if kind not in ("txt", "json"))) / 1000 for fields in photos
        )
    kept.clear()
    device = describe(torch.device("cpu"))
    if options.json:
        names = ("torch", "treering", "webdataset", "open_clip_torch", "torchvision", "Pillow")
        versions = {name: importlib.metadata.version(name) for name in names}
        print(json.dumps({"benchmark": "loader", "device": device, "versions": versions, "figures": figures}))
        return
    print_table(figures, device, options.workers)


def print_table(figures: dict[str, Any], device: str, workers: int) -> None:
    print(f"{device}; {workers} processes; {figures['photos']} photos, median {figures['median_photo_kb']:.0f} kB")
    print(f"{'arm':12}{'photos/s':>10}{'ours / it':>22}{'per cpu':>10}{'MB a worker':>14}")
    for arm in ("ours", "webdataset", "ceiling"):
        name = f"ratio_to_{arm}"
        ratio = (
            f"{figures[name]:.2f} ({figures[name + '_low']:.2f}-{figures[name + '_high']:.2f})"
            if name in figures
            else ""
        )
        size = f"{figures[f'{arm}_worker_mb']:.0f}" if f"{arm}_worker_mb" in figures else ""
        busy = f"{figures[f'cpu_ratio_to_{arm}']:.2f}" if name in figures else ""
        print(f"{arm:12}{figures[f'{arm}_photos_per_second']:10.1f}{ratio:>22}{busy:>10}{size:>14}")
    print(
        f"pixels against Pillow's: PSNR median {figures['psnr_median_db']:.1f} dB, "
        f"least {figures['psnr_least_db']:.1f} dB"
    )


if __name__ == "__main__":
    main()
