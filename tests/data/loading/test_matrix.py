"""Promise 1: the same global batches at every world size, worker count and resume; no sample lost or seen twice."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering.data import Batch, DataConfig, Loader, open_source
from treering.data.order import Mixture

WriteSource = Callable[..., str]
Truth = dict[int, tuple[list[list[Any]], list[Any]]]  # by `shuffle`: the global batches, and the ledger
BATCH, STEPS = 24, 7
WORLDS, WORKERS = (1, 2, 3, 4, 6, 8), (0, 1, 3)
SHUFFLES = {"whole": 131_072, "lanes": 20}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory, write_source: WriteSource) -> list[str]:
    """60 and 29 samples, a bad one in each; seven batches of 24 reach into the third pass."""
    folder = tmp_path_factory.mktemp("matrix")
    one = write_source(folder / "one", 4, 15, {17: [("txt", b"alone")]})
    two = write_source(folder / "two", 1, 29, {3: [("png", b"x"), ("txt", b"y")]})
    return [one, two]


def config(urls: list[str], workers: int, shuffle: int) -> DataConfig:
    sources = [{"source": url, "weight": weight} for url, weight in zip(urls, (2.0, 0.7), strict=True)]
    return DataConfig.model_validate(
        {
            "train": sources,
            "batch": BATCH,
            "workers": workers,
            "shuffle_window": shuffle,
            "lanes": 6,
            "max_bad_fraction": 0.5,
        }
    )


def seen(batch: Batch) -> list[tuple[Any, ...]]:
    """Key, caption, tokens and a checksum of the pixels of each pair."""
    tokens = [tuple(part.tolist()) for part in batch.tokens.split(batch.lengths.tolist())]
    sums = [zlib.crc32(image.numpy().tobytes()) for image in batch.images]
    return list(zip(batch.keys, batch.captions, tokens, sums, batch.image_ids.tolist(), strict=True))


def global_batches(
    urls: list[str], world: int, workers: int, shuffle: int, step: int, count: int
) -> tuple[list[list[Any]], list[Any]]:
    """The ranks' batches put together, and their ledgers."""
    batches: list[list[Any]] = [[] for _ in range(count)]
    bad = []
    for rank in range(world):
        loader = Loader(config(urls, workers, shuffle), 24, 16, 5, rank, world, [Mixture(0, (2.0, 0.7))])
        with closing(loader.batches(step)) as stream:
            for i, batch in enumerate(islice(stream, count)):
                batches[i] += seen(batch)
                bad += batch.bad
    return batches, sorted(bad, key=lambda entry: (entry.position, entry.key))


@pytest.fixture(scope="module")
def truth(urls: list[str]) -> Truth:
    """One process that decodes in line and is never stopped."""
    return {shuffle: global_batches(urls, 1, 0, shuffle, 0, STEPS) for shuffle in SHUFFLES.values()}


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
def test_no_sample_is_lost_or_seen_twice(urls: list[str], truth: Truth, shuffle: int) -> None:
    """In the first pass over each source, with the bad one counted where its place was."""
    loader = Loader(config(urls, 0, shuffle), 24, 16, 5)
    for source, url in enumerate(urls):
        length = len(open_source(url))
        drawn: Counter[str] = Counter()
        for step, batch in enumerate(truth[shuffle][0]):
            for place, row in zip(loader.order.places(step), batch, strict=True):
                if place.source == source and place.draw < length:
                    entries = [entry for entry in truth[shuffle][1] if entry.position == place.position]
                    drawn[entries[0].key if entries else row[0]] += 1
        assert drawn.total() == min(length, loader.order.counts(STEPS)[source])
        assert set(drawn.values()) == {1}
    assert loader.order.counts(STEPS)[0] > 60
    assert len(truth[shuffle][1]) >= 2


def check(urls: list[str], truth: Truth, world: int, workers: int, shuffle: int, steps: Iterable[int]) -> None:
    """Read on from each of the steps by a new loader of this world, as after a resume from any other."""
    for step in steps:
        batches, bad = global_batches(urls, world, workers, shuffle, step, STEPS - step)
        assert batches == truth[shuffle][0][step:]
        assert bad == [entry for entry in truth[shuffle][1] if entry.position >= step * BATCH]


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_stream_is_one(urls: list[str], truth: Truth, world: int, shuffle: int) -> None:
    check(urls, truth, world, 0, shuffle, range(STEPS))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_stream_is_one_with_workers(urls: list[str], truth: Truth, workers: int) -> None:
    check(urls, truth, 2 * workers, workers, SHUFFLES["lanes"], [0, 3])


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_whole_matrix(urls: list[str], truth: Truth, world: int, workers: int, shuffle: int) -> None:
    check(urls, truth, world, workers, shuffle, range(STEPS))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([0.3, 1.0, 2.5])), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(0, 5),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sources(
    tmp_path_factory: pytest.TempPathFactory,
    write_source: WriteSource,
    sources: list[tuple[int, int, float]],
    world: int,
    shuffle: int,
    lanes: int,
    step: int,
) -> None:
    """Any shards, weights and lanes: the ranks' batches put together are the global ones, and those are the order's."""
    folder: Path = tmp_path_factory.mktemp("any")
    train = [
        {"source": write_source(folder / str(i), shards, each), "weight": weight}
        for i, (shards, each, weight) in enumerate(sources)
    ]
    options = {"train": train, "batch": BATCH, "shuffle_window": shuffle, "lanes": lanes}
    whole = Loader(DataConfig.model_validate(options), 24, 16, 7)
    with closing(whole.batches(step)) as stream:
        (expected,) = [seen(batch) for batch in islice(stream, 1)]
    found = []
    for rank in range(world):
        with closing(Loader(DataConfig.model_validate(options), 24, 16, 7, rank, world).batches(step)) as stream:
            found += seen(next(stream))
    assert found == expected
    assert [row[0] for row in found] == whole.keys(step)
    drawn = np.bincount([place.source for n in range(step) for place in whole.order.places(n)], minlength=len(sources))
    assert drawn.tolist() == whole.order.counts(step)
