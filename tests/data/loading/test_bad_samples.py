"""Every kind of broken sample in a run: each is in the ledger with its reason, and the good ones come as if none were.

The truth is put together here from plain `tarfile`, Pillow, numpy and open_clip's tokenizer. Two sources differ in the
broken samples alone, so the order of the clean one says what must lie where.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from treering.data import Batch, DataConfig, EvaluationSet, LedgerEntry, Loader
from treering.data.samples.draws import draw_rows

RESOLUTION, CONTEXT, BATCH, SEED = 16, 12, 12, 4
Members = dict[str, bytes]


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)


def photo(kind: str = "PNG", n: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(n)).save(file, kind)
    return file.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def good(n: int) -> Members:
    captions = [{"text": f"Alt text {n}!", "source": "alt"}, {"text": f"it's picture {n}", "source": "recaption"}]
    boxes = [{"box": [0.25 * i, 0.125, 0.25 * i + 0.5, 1], "text": f"part {i} of {n}"} for i in range(n % 3)]
    return {
        "png": photo(n=n),
        "txt": f"Alt text {n}!".encode(),
        "json": json.dumps({"captions": captions, "boxes": boxes}).encode(),
        "teacher.npy": npy(np.random.default_rng(n).normal(size=5).astype(np.float32)),
    }


def said(**changes: Any) -> Members:
    """A good sample with other metadata."""
    return {"json": json.dumps(json.loads(good(1)["json"]) | changes).encode()}


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


NEITHER = "picture does not decode: neither JPEG, PNG nor WebP"
CAPTIONS = "metadata is wrong: captions must be a list of texts or of {text, source, weight}"
FORM = "column teacher is wrong: "
# What is changed in a good sample (None: left out), and the reason; where it ends in "..." a decoder's words follow.
BROKEN: list[tuple[dict[str, bytes | None], str]] = [
    ({"png": None, "jpg": photo("JPEG")[:-200]}, "picture does not decode: ..."),
    ({"png": photo()[:-300]}, "picture does not decode: ..."),
    ({"png": None, "webp": photo("WEBP")[:-100]}, "picture does not decode: ..."),
    ({"png": b""}, NEITHER),
    ({"png": photo("GIF")}, NEITHER),
    ({"png": photo("TIFF")}, NEITHER),
    ({"png": b"<html>404"}, NEITHER),
    ({"png": huge_png()}, "picture too large: 9000 x 9000 pixels"),
    ({"png": None}, "no picture: found .txt, .json, .teacher.npy"),
    ({"png": None, "gif": photo("GIF")}, "no picture: found .gif, .txt, .json, .teacher.npy"),
    ({"png": None, "\x1b[2j": b"x"}, "no picture: found .\\x1b[2j, .txt, .json, .teacher.npy"),
    ({"txt": None, "json": None}, "no caption: neither .txt nor captions in .json"),
    ({"txt": None, "json": b"{}"}, "no caption: neither .txt nor captions in .json"),
    ({"txt": b" \n", "json": None}, "caption is empty"),
    ({"txt": b"\x00\x01", "json": None}, "caption is empty"),
    ({"txt": b"caf\xe9", "json": None}, "caption is not UTF-8: byte 0xe9 at 3"),
    ({"txt": b"a" * 2_000_000, "json": None}, "caption is too long: 2,000,000 bytes"),
    ({"txt": None} | said(captions=["\ud800"]), "caption is not Unicode: it holds half of a surrogate pair"),
    ({"json": b'{"a": '}, "metadata is not JSON: ..."),
    ({"json": b"[" * 50_000}, "metadata is not JSON: ..."),
    ({"json": b"[1]"}, "metadata is not JSON: an object is expected"),
    ({"json": b'{"a": "\xff"}'}, "metadata is not UTF-8: byte 0xff at 7"),
    ({"json": b" " * 5_000_000}, "metadata is too long: 5,000,000 bytes"),
    (said(captions="a text"), CAPTIONS),
    (said(captions=[{"source": "alt"}]), CAPTIONS),
    (
        said(captions=[{"text": "t", "source": "alt", "weight": -1}]),
        "metadata is wrong: a caption's weight must be a number from 0 to 1,000,000",
    ),
    (said(captions=[{"text": "t", "source": "blip"}]), "no caption from 'alt', 'recaption': found 'blip', 'untagged'"),
    (said(boxes={}), "boxes are wrong: they must be a list of at most 1,000"),
    (said(boxes=[{"box": [1, 2, 3], "text": "t"}]), "boxes are wrong: each must be {box: [x0, y0, x1, y1], text}"),
    (
        said(boxes=[{"box": [0.5, 0, 0.2, 1], "text": "t"}]),
        "boxes are wrong: [0.5, 0, 0.2, 1] must have left < right and top < bottom",
    ),
    (said(boxes=[{"box": [0, 0, 1, 1], "text": " "}]), "a box's text is empty"),
    ({"teacher.npy": None}, "no column teacher: the sample has no .teacher.npy or .npy"),
    ({"teacher.npy": b"\x80\x04c__builtin__\n"}, FORM + "it has no valid .npy header"),
    (
        {"teacher.npy": npy(np.array([None]), allow_pickle=True)},
        FORM + "its numbers are object instead of float16, float32, float64",
    ),
    ({"teacher.npy": npy(np.zeros((1, 5), "f4"))}, FORM + "float32 [1, 5] instead of float32 [5], as in '000'"),
    ({"teacher.npy": npy(np.zeros(4, "f4"))}, FORM + "float32 [4] instead of float32 [5], as in '000'"),
    ({"teacher.npy": npy(np.full(5, np.inf, "f4"))}, FORM + "it holds infinity or NaN"),
]
SAMPLES = 2 * len(BROKEN) + 32  # every second one is broken, as far as they go; the first is whole


def broken(n: int) -> tuple[dict[str, bytes | None], str] | None:
    return BROKEN[n // 2] if n % 2 and n // 2 < len(BROKEN) else None


def changed(n: int) -> Members:
    own = broken(n)
    members = good(n) | (own[0] if own else {})
    first = [kind for kind in members if kind not in good(n)]  # the picture comes first
    return {kind: data for kind in (*first, *good(n)) if (data := members[kind]) is not None}


@dataclass
class Source:
    url: str
    paths: list[Path]

    def members(self) -> Iterator[tuple[str, str, int, Members]]:
        """By plain tarfile: shard, key, where the first member's data lies, and all members."""
        for path in self.paths:
            samples: dict[str, tuple[int, Members]] = {}
            with tarfile.open(path) as tar:
                for info in tar:
                    key, _, kind = info.name.partition(".")
                    file = tar.extractfile(info)
                    assert file is not None
                    samples.setdefault(key, (info.offset_data, {}))[1][kind] = file.read()
            for key, (offset, members) in samples.items():
                yield str(path), key, offset, members


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> tuple[Source, Source]:
    """The clean one and the broken one."""
    made = []
    for make in (good, changed):
        folder, cuts = tmp_path_factory.mktemp(make.__name__), [0, 30, 65, SAMPLES]
        paths = [
            write_tar(
                folder / f"{i}.tar", [(f"{n:03}.{kind}", data) for n in range(*cut) for kind, data in make(n).items()]
            )
            for i, cut in enumerate(pairwise(cuts))
        ]
        made.append(Source(str(folder / "*.tar"), paths))
    return made[0], made[1]


def loader(url: str, rank: int = 0, world: int = 1, workers: int = 0) -> Loader:
    source = {"source": url, "caption_weights": {"alt": 2, "recaption": 1}, "boxes": "relative"}
    augment = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    config = DataConfig.model_validate(
        {"train": [source], "batch": BATCH, "columns": {"teacher": "npy"}, "augment": augment, "workers": workers}
    )
    return Loader(config, RESOLUTION, CONTEXT, SEED, rank, world)


def pairs_of(batch: Batch) -> list[dict[str, Any]]:
    """What a batch says of each pair."""
    tokens = [part.tolist() for part in batch.tokens.split(batch.lengths.tolist())]
    boxes = batch.boxes
    assert boxes is not None
    counts = boxes.counts
    parts = zip(boxes.corners.split(counts.tolist()), (counts.cumsum(0) - counts).tolist(), strict=True)
    texts = [part.tolist() for part in boxes.tokens.split(boxes.lengths.tolist())]
    return [
        {
            "key": key,
            "caption": caption,
            "tokens": ids,
            "image": image.permute(1, 2, 0).numpy().tobytes(),
            "teacher": teacher.tolist(),
            "boxes": [(box.tolist(), texts[start + i]) for i, box in enumerate(own)],
        }
        for key, caption, ids, image, teacher, (own, start) in zip(
            batch.keys, batch.captions, tokens, batch.images, batch.columns["teacher"], parts, strict=True
        )
    ]


def reference(members: Members, key: str, position: int, tokenizer: Any) -> dict[str, Any]:
    """A pair as it must come: the draws are written out by hand, the crop is the whole picture."""

    def ids(text: str) -> list[int]:
        padded = tokenizer(text, CONTEXT)[0].tolist()
        return padded[: padded.index(49407) + 1]

    metadata = json.loads(members["json"])
    caption = metadata["captions"][int(3 * draw_rows(SEED, "sample", np.array([position]), 1)[0][0]) // 2]["text"]
    return {
        "key": key,
        "caption": caption,
        "tokens": ids(caption),
        "image": np.asarray(Image.open(io.BytesIO(members["png"]))).tobytes(),
        "teacher": np.load(io.BytesIO(members["teacher.npy"]), allow_pickle=False).tolist(),
        "boxes": [(each["box"], ids(each["text"])) for each in metadata["boxes"]],
    }


def matches(reason: str, expected: str) -> bool:
    return reason.startswith(expected[:-3]) if expected.endswith("...") else reason == expected


STEPS = SAMPLES // BATCH + 1  # more than a pass


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_a_run_over_broken_samples(
    sources: tuple[Source, Source], open_clip_tokenizer: ModuleType, world: int, workers: int
) -> None:
    clean, dirty = sources
    tokenizer = open_clip_tokenizer.SimpleTokenizer()
    whole = {key: members for _, key, _, members in clean.members()}
    places = {key: (shard, offset) for shard, key, offset, _ in dirty.members()}
    bad = {f"{n:03}": own[1] for n in range(SAMPLES) if (own := broken(n))}
    assert len(bad) == len(BROKEN) >= 20
    ranks = []
    for rank in range(world):
        with closing(loader(dirty.url, rank, world, workers).batches(0)) as batches:
            ranks.append(list(islice(batches, STEPS)))
    planned, order = loader(clean.url), loader(dirty.url).order
    met = set()
    for step in range(STEPS):
        keys = planned.keys(step)
        assert loader(dirty.url).keys(step) == keys
        positions = order.places(step).position.tolist()
        found = [row for rank in ranks for row in pairs_of(rank[step])]
        entries: dict[int, list[LedgerEntry]] = {}
        for entry in (entry for rank in ranks for entry in rank[step].bad):
            entries.setdefault(entry.position, []).append(entry)
            assert matches(entry.reason, bad[entry.key]), entry
            assert (entry.source, entry.shard, entry.offset) == (dirty.url, *places[entry.key])
            met.add(entry.key)
        for key, position, row in zip(keys, positions, found, strict=True):
            own = entries.pop(position, [])
            assert bool(own) == (key in bad)
            assert not own or own[0].key == key
            shown = row["key"] if own else key
            assert shown not in bad
            assert row == reference(whole[shown], shown, position, tokenizer)
        assert not entries
    assert met == set(bad)


def test_the_spares_are_the_same_at_any_world_size(sources: tuple[Source, Source]) -> None:
    runs = []
    for world in (1, 2, 4):
        ranks = []
        for rank in range(world):
            with closing(loader(sources[1].url, rank, world).batches(2)) as batches:
                ranks.append(list(islice(batches, 4)))
        pairs = [row for step in range(4) for rank in ranks for row in pairs_of(rank[step])]
        ledger = [entry for step in range(4) for rank in ranks for entry in rank[step].bad]
        runs.append((pairs, ledger))
    assert runs[0] == runs[1] == runs[2]


def test_evaluation_names_what_it_needs(sources: tuple[Source, Source]) -> None:
    """Tags, boxes and columns, and the metadata that holds them, are the recipe's wishes for training; the rest of the
    reasons are the same."""
    each = EvaluationSet(sources[1].url, RESOLUTION, CONTEXT)
    for n in range(SAMPLES):
        found, own = each.sample(n), broken(n)
        wishes = own is not None and own[1].startswith(
            ("boxes", "a box", "column", "no column", "metadata", "no caption from")
        )
        if own is None or wishes:
            assert not isinstance(found, LedgerEntry)
        else:
            assert isinstance(found, LedgerEntry)
            assert matches(found.reason, own[1])


def test_nothing_was_written(sources: tuple[Source, Source]) -> None:
    for source in sources:
        folder = source.paths[0].parent
        assert sorted(os.listdir(folder)) == [path.name for path in source.paths]
