"""The contestants of the loader benchmark: each yields the sizes of its batches, without end, from the same photos."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from treering.data import AugmentConfig, DataConfig, Loader, Source
from treering.data.shards.listing import IMAGE_KINDS

RESOLUTION, CONTEXT, BATCH = 224, 77, 64
AUGMENT = AugmentConfig()  # crops as open_clip's default: 0.9 to 1 of the area
Sizes = Iterator[int]


def installed(package: str) -> str | None:
    """The version of a peer, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def photo(fields: dict[str, bytes]) -> bytes:
    """The picture of a record, as it lies in the shard."""
    return next(fields[kind] for kind in IMAGE_KINDS if kind in fields)


def ours(url: str, workers: int, decode: str = "exact") -> Sizes:
    """The loader."""
    config = DataConfig.model_validate(
        {"train": [{"source": url}], "batch": BATCH, "workers": workers, "augment": AUGMENT, "decode": decode}
    )
    with closing(Loader(config, RESOLUTION, CONTEXT, seed=0).batches(0)) as batches:
        for batch in batches:
            yield len(batch.images)


def webdataset(shards: list[str], workers: int) -> Sizes:
    """The stages of open_clip_train 3.3.0's get_wds_dataset, with a shuffle buffer that such a small set can fill."""
    import webdataset as wds

    transform, tokens = _open_clip()
    stages = [
        wds.SimpleShardList(shards),
        wds.shuffle(100),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(64, initial=32),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=tokens),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=False),
    ]
    loader = wds.WebLoader(wds.DataPipeline(*stages).repeat(), batch_size=None, shuffle=False, num_workers=workers)
    yield from _sizes(loader)


def write_streaming(source: Source, folder: Path, count: int) -> None:
    """`count` photos, over and over the same, as MosaicML Streaming keeps them."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"image": "bytes", "text": "str"}, size_limit=1 << 23) as writer:
        for number in range(count):
            writer.write(_stored(source.record(number % len(source)).fields))


def streaming(folder: Path, workers: int) -> Sizes:
    """MosaicML Streaming, shuffled, with open_clip's transform and tokenizer."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    transform, tokens = _open_clip()

    class Photos(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return _opened(super().__getitem__(at), transform, tokens)

    photos = Photos(local=str(folder), shuffle=True, batch_size=BATCH)
    loader: Any = DataLoader(
        photos, batch_size=BATCH, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from _sizes(loader)


def write_litdata(source: Source, folder: Path, count: int) -> None:
    """`count` photos, over and over the same, as LitData keeps them."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=1 << 23)
    for number in range(count):
        writer[number] = _stored(source.record(number % len(source)).fields)
    writer.done()
    writer.merge(1)


def litdata(folder: Path, workers: int) -> Sizes:
    """LitData, shuffled, with open_clip's transform and tokenizer."""
    from litdata import StreamingDataLoader, StreamingDataset

    transform, tokens = _open_clip()
    photos = StreamingDataset(
        str(folder), shuffle=True, drop_last=True, transform=lambda sample: _opened(sample, transform, tokens)
    )
    loader = StreamingDataLoader(
        photos, batch_size=BATCH, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from _sizes(loader)


def _open_clip() -> tuple[Callable[[Any], Any], Callable[[str], Any]]:
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    return open_clip.image_transform(RESOLUTION, is_train=True), lambda text: tokenizer(text)[0]


def _stored(fields: dict[str, bytes]) -> dict[str, Any]:
    return {"image": photo(fields), "text": fields["txt"].decode()}


def _opened(sample: Any, transform: Callable[[Any], Any], tokens: Callable[[str], Any]) -> Any:
    return transform(Image.open(io.BytesIO(sample["image"])).convert("RGB")), tokens(sample["text"])


def _sizes(loader: Any) -> Sizes:
    """Ends the processes of the loader with the iteration."""
    batches = iter(loader)
    try:
        for images, _ in batches:
            yield len(images)
    finally:
        del batches


def ceiling(photos: list[bytes], workers: int, count: int) -> tuple[float, float]:
    """Photos per second, and per second of processor time, of nothing but decoding and resizing in `workers` bare
    loops over bytes in memory. Nothing of the loader is used."""
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(workers), context.SimpleQueue()
    share = count // workers

    def loop(worker: int) -> None:
        torch.set_num_threads(1)
        decode, random = bare_decoder(), np.random.default_rng(worker)
        ready.wait()
        begun, busy = time.perf_counter(), time.process_time()
        for n in range(worker * share, (worker + 1) * share):
            pixels = decode(photos[n % len(photos)])
            height, width = pixels.shape[:2]
            side = math.sqrt(random.uniform(0.9, 1))
            h, w = int(height * side), int(width * side)
            top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
            crop = torch.from_numpy(pixels[top : top + h, left : left + w])[None].permute(0, 3, 1, 2)
            torch.nn.functional.interpolate(crop, (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)
        results.put((time.perf_counter() - begun, time.process_time() - busy))

    processes = [context.Process(target=loop, args=(worker,)) for worker in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds, busy = zip(*(results.get() for _ in processes), strict=True)
    return workers * share / max(seconds), workers * share / sum(busy)


def bare_decoder() -> Callable[[bytes], np.ndarray]:
    """The fastest decoder that is there."""
    if importlib.util.find_spec("simplejpeg") is None:
        return lambda data: np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]

    def decode(data: bytes) -> np.ndarray:
        if data[:2] != b"\xff\xd8":
            return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
        return pixels

    return decode
