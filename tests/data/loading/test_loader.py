"""The loader: one stream at any world size and worker count, and what happens to bad samples."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from treering.data import (
    Batch,
    DataConfig,
    DataError,
    EvaluationSet,
    LedgerEntry,
    Loader,
    Sample,
    Tokenizer,
    open_source,
)
from treering.data.samples.sample import caption_id
from treering.data.shards import opening

WriteSource = Callable[..., str]
RESOLUTION, CONTEXT = 24, 16


def loader(*urls: str, rank: int = 0, world: int = 1, seed: int = 5, **options: Any) -> Loader:
    sources = [{"source": url, "weight": weight} for url, weight in zip(urls, (1.0, 2.5), strict=False)]
    config = DataConfig.model_validate({"train": sources, "batch": 8, **options})
    return Loader(config, RESOLUTION, CONTEXT, seed, rank, world)


def read(each: Loader, step: int, count: int) -> list[Batch]:
    with closing(each.batches(step)) as batches:  # type: ignore[type-var]
        return list(islice(batches, count))


def rows(batch: Batch) -> list[tuple[Any, ...]]:
    """What a batch says of each of its pairs."""
    tokens = [tuple(part.tolist()) for part in batch.tokens.split(batch.lengths.tolist())]
    sums = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
    ids = zip(batch.image_ids.tolist(), batch.caption_ids.tolist(), strict=True)
    return list(zip(batch.keys, batch.captions, tokens, sums, ids, strict=True))


def global_rows(
    urls: list[str], step: int, count: int, world: int, **options: Any
) -> tuple[list[list[Any]], list[Any]]:
    """The global batches put together from the ranks, and the ledger."""
    ranks = [read(loader(*urls, rank=rank, world=world, **options), step, count) for rank in range(world)]
    batches = [[row for rank in ranks for row in rows(rank[i])] for i in range(count)]
    bad = [entry for i in range(count) for rank in ranks for entry in rank[i].bad]
    return batches, bad


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory, write_source: WriteSource) -> list[str]:
    folder = tmp_path_factory.mktemp("good")
    return [write_source(folder / "one", 2, 7), write_source(folder / "two", 1, 11)]


BAD = {
    1: [("png", b"no picture"), ("txt", b"one")],
    3: [("txt", b"alone")],
    8: [("txt", b"\xff\xfe")],
    12: [("png", b"\x89PNG\r\n\x1a\n"), ("json", b"{")],
}


@pytest.fixture(scope="module")
def bad_url(tmp_path_factory: pytest.TempPathFactory, write_source: WriteSource, picture: Callable[..., bytes]) -> str:
    bad = {n: ([("png", picture(n)), *members] if n == 8 else members) for n, members in BAD.items()}
    return write_source(tmp_path_factory.mktemp("bad"), 2, 10, bad)


def test_batches_are_what_the_order_says(urls: list[str]) -> None:
    each = loader(*urls)
    sources, tokenizer = [open_source(url) for url in urls], Tokenizer()
    for step, batch in enumerate(read(each, 0, 4)):
        assert batch.images.shape == (8, 3, RESOLUTION, RESOLUTION)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert [batch.tokens.dtype, batch.lengths.dtype, batch.caption_ids.dtype, batch.image_ids.dtype] == [
            torch.int64
        ] * 4
        assert each.keys(step) == list(batch.keys)
        assert batch.bad == ()
        assert not batch.cut.any()
        for place, (key, caption, tokens, _, _) in zip(each.order.places(step), rows(batch), strict=True):
            record = sources[place.source].record(place.number)
            assert record.key == key
            assert caption.startswith(record.fields["txt"].decode()[:-1])
            assert list(tokens) == tokenizer.encode(caption, CONTEXT)


@pytest.mark.parametrize(
    ("world", "workers"), [(1, 0), (2, 0), (4, 0), (8, 0), (1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2)]
)
def test_one_stream_at_any_world_size(urls: list[str], bad_url: str, world: int, workers: int) -> None:
    sources = [urls[0], bad_url]
    expected = global_rows(sources, 2, 5, world=1)
    assert len(expected[1]) > 3
    assert global_rows(sources, 2, 5, world=world, workers=workers) == expected


def test_a_resume_at_any_step_reads_on(urls: list[str]) -> None:
    whole, _ = global_rows(urls, 0, 8, world=1)
    for step in range(8):
        world = (1, 2, 4)[step % 3]
        assert global_rows(urls, step, 8 - step, world=world)[0] == whole[step:]


@pytest.mark.parametrize("workers", [0, 2])
def test_cut_captions_are_counted(urls: list[str], workers: int) -> None:
    config = DataConfig.model_validate({"train": [{"source": urls[0]}], "batch": 8, "workers": workers})
    cut = 0
    for batch in read(Loader(config, RESOLUTION, 6, seed=5), 0, 4):
        assert batch.cut.tolist() == [len(Tokenizer().encode(caption, 99)) > 6 for caption in batch.captions]
        assert batch.lengths.tolist() == [6] * 8
        cut += int(batch.cut.sum())
    assert 0 < cut < 32  # "picture 8 number 1" is six ids, "picture 10 number 1" is seven


def test_augmentation_and_captions_change_from_pass_to_pass(urls: list[str]) -> None:
    seen: dict[str, set[tuple[Any, ...]]] = {}
    captions: dict[str, set[str]] = {}
    for batch in read(loader(urls[1]), 0, 11):  # eight passes over eleven samples
        for key, caption, _, checksum, _ in rows(batch):
            seen.setdefault(key, set()).add(checksum)
            captions.setdefault(key, set()).add(caption)
    assert len(seen) == 11
    assert all(len(crops) >= 5 for crops in seen.values())  # of 48 x 40 pixels there are few different crops
    assert [len(captions[f"{n:05d}"]) for n in (0, 3, 6, 9)] == [1] * 4
    assert all(1 < len(captions[f"{n:05d}"]) <= 1 + n % 3 for n in (2, 5, 8))


def test_coverage_counts_distinct_samples(urls: list[str]) -> None:
    each, lengths = loader(*urls), [14, 11]
    seen: list[set[str]] = [set(), set()]
    for step, batch in enumerate(read(each, 0, 9)):
        passes = [each.coverage(step)[url] for url in urls]
        for done, keys, length in zip(passes, seen, lengths, strict=True):
            assert len(keys) == pytest.approx(min(done, 1) * length)
        for place, key in zip(each.order.places(step), batch.keys, strict=True):
            seen[place.source].add(key)
    assert [min(done, 1.0) for done in each.coverage(9).values()] == [1.0, 1.0]


def test_ids_are_equal_for_equal_things(urls: list[str]) -> None:
    pairs = [row for batch in read(loader(*urls), 0, 6) for row in rows(batch)]
    by_id: dict[int, set[str]] = {}
    for _, caption, _, _, (_, given) in pairs:
        assert given == caption_id(caption)
        by_id.setdefault(given, set()).add(caption)
    assert all(len(captions) == 1 for captions in by_id.values())
    # Both sources hold a sample 00000, which are not one picture to us; the order shows both of them several times.
    assert len({image_id for key, *_, (image_id, _) in pairs if key == "00000"}) == 2
    assert caption_id("A  Dog&amp;cat\n") == caption_id("a dog&cat")
    assert caption_id("a dog") != caption_id("a dogs")


def test_equal_keys_of_two_shards_are_two_pictures(
    tmp_path: Path, picture: Callable[..., bytes], write_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a million samples keys are not compared across shards, and writers begin anew in each."""
    monkeypatch.setattr(opening, "_MAX_COMPARED_KEYS", 0)
    for n in range(4):
        members = [(f"{k:06}.{kind}", data) for k in range(8) for kind, data in _pair(picture(8 * n + k), f"{n} {k}")]
        write_tar(tmp_path / f"{n}.tar", members)
    config = DataConfig.model_validate(
        {"train": [{"source": str(tmp_path / "*.tar")}, {"source": str(tmp_path / "0.tar")}], "batch": 128}
    )
    with closing(Loader(config, 24, 16, 0).batches(0)) as batches:
        batch = next(batches)
    assert len(set(batch.captions)) == 32
    by_id = dict(zip(batch.image_ids.tolist(), batch.captions, strict=True))
    assert len(by_id) == 32  # of a shard in two sources, too
    assert [by_id[i] for i in batch.image_ids.tolist()] == list(batch.captions)


def _pair(picture: bytes, caption: str) -> list[tuple[str, bytes]]:
    return [("png", picture), ("txt", caption.encode())]


def test_bad_samples_are_replaced_and_written_down(bad_url: str) -> None:
    each = loader(bad_url)
    source = open_source(bad_url)
    reasons = {
        "00001": "picture does not decode",
        "00003": "no picture",
        "00008": "caption is not UTF-8",
        "00012": "metadata is not JSON",
    }
    found = set()
    for step, batch in enumerate(read(each, 0, 5)):
        assert len(batch.keys) == 8
        assert not set(batch.keys) & set(reasons)
        for place, planned, key in zip(each.order.places(step), each.keys(step), batch.keys, strict=True):
            own = [entry for entry in batch.bad if entry.position == place.position]
            assert [planned, key][bool(own)] == key
            assert planned == (own[0].key if own else key)
            replaced_by = [source.key(each.order.spare(place, n) or 0) for n in range(len(own))]
            assert [entry.key for entry in own[1:]] + [key] * bool(own) == replaced_by
        for entry in batch.bad:
            assert entry.reason.startswith(reasons[entry.key])
            assert (entry.source, entry.shard) == (bad_url, source.shard(int(entry.key)))
            assert entry.offset == source.offset(int(entry.key))
            found.add(entry.key)
    assert found == set(reasons)


def test_too_many_bad_samples_end_the_run(bad_url: str) -> None:
    entries = [entry for batch in read(loader(bad_url), 0, 5) for entry in batch.bad]
    loader(bad_url, max_bad_fraction=0.2).check_bad(entries)  # 4 of 20
    tolerant = loader(bad_url, max_bad_fraction=0.2)
    tolerant.check_bad(entries)
    tolerant.check_bad(entries)  # the same ones again, as after a resume
    with pytest.raises(DataError, match=r"4 of 20 samples are bad, at most 3 may be") as error:
        loader(bad_url, max_bad_fraction=0.19).check_bad(entries)
    assert "picture does not decode (first: key '00001' in" in str(error.value)
    with pytest.raises(DataError, match=r"1 of 20 samples are bad, at most 0 may be"):
        loader(bad_url).check_bad(entries[:1])
    with pytest.raises(DataError, match="5 of 20"):
        tolerant.check_bad([LedgerEntry(bad_url, "shard", "\x1b[2Jkey", 0, "x: y", 3)])


def test_counting_bad_samples_looks_at_the_new_ones_alone(urls: list[str]) -> None:
    """However many are known: nothing walks over them, or it would meet the one that cannot be walked over."""

    class Unwalkable(dict[Any, Any]):
        def __iter__(self) -> Any:
            raise AssertionError("all known bad samples are walked over")

        items = values = keys = __iter__

    each = loader(*urls, max_bad_fraction=0.5)
    each.check_bad([LedgerEntry(urls[0], "shard", "a", 0, "x: y", 3)])
    known = each._bad[urls[0]]
    object.__setattr__(known, "samples", Unwalkable(known.samples))
    each.check_bad([LedgerEntry(urls[0], "shard", "b", 0, "x: y", 4), LedgerEntry(urls[1], "shard", "c", 0, "x: y", 5)])
    assert len(known.samples) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_left_to_stand_in(tmp_path: Path, write_source: WriteSource, workers: int) -> None:
    url = write_source(tmp_path, 1, 3, {n: [("png", b"x"), ("txt", b"y")] for n in range(3)})
    with pytest.raises(DataError, match=r"no usable sample in 3 drawn") as error:
        read(loader(url, workers=workers), 0, 1)
    assert "Traceback" not in str(error.value)
    assert "3  picture does not decode" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_is_an_error(tmp_path: Path, write_source: WriteSource, workers: int) -> None:
    each = loader(write_source(tmp_path, 1, 9), workers=workers)
    os.remove(tmp_path / "part-000.tar")
    with pytest.raises(DataError, match="not found"):
        read(each, 0, 1)


def test_evaluation_set(tmp_path: Path, write_source: WriteSource, picture: Callable[..., bytes]) -> None:
    url = write_source(tmp_path, 1, 9, {4: [("txt", b"x")]})
    each = EvaluationSet(url, 40, CONTEXT)
    read = [each.sample(number) for number in range(len(each))]
    assert [entry.key for entry in read] == [f"{number:05}" for number in range(9)]
    assert [entry.position for entry in read if isinstance(entry, LedgerEntry)] == [-1]
    sample = read[2]
    assert isinstance(sample, Sample)
    pixels = np.asarray(Image.open(io.BytesIO(picture(2))))
    assert np.array_equal(sample.image, pixels[:, 4:44])
    assert sample.captions == ("picture 2 number 0", "picture 2 number 1", "picture 2 number 2")
    assert sample.caption == sample.captions[0]
    assert sample.tokens == Tokenizer().encode(sample.caption, CONTEXT)
