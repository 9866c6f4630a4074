"""The order handed out as a WebDataset pipeline: sample by sample what our own loader gives."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from treering.data import DataConfig, DataError, Loader, as_webdataset, open_source
from treering.data.order import Mixture
from treering.training.recipe import Recipe

WriteSource = Callable[..., str]
PAGE = Path(__file__).parents[3] / "docs" / "other_loops.md"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_source: WriteSource) -> DataConfig:
    """Two sources, one of which has samples that cannot be used; `decode`, `read` and captions are where they fail."""
    folder = tmp_path_factory.mktemp("sources")
    bad = {
        1: [("png", b"no picture"), ("txt", b"one")],
        3: [("txt", b"alone")],
        12: [("png", b"\x89PNG\r\n\x1a\n"), ("txt", b"x"), ("json", b"{")],
    }
    urls = [write_source(folder / "one", 2, 7), write_source(folder / "two", 3, 10, bad)]
    sources = [{"source": url, "weight": weight} for url, weight in zip(urls, (1.0, 2.5), strict=True)]
    return DataConfig.model_validate({"train": sources, "batch": 8, "max_bad_fraction": 0.2})


def ours(config: DataConfig, step: int, steps: int, rank: int, world: int, **more: Any) -> list[tuple[str, str]]:
    """Keys and captions of our own loader."""
    loader = Loader(config, 24, 16, 5, rank, world, **more)
    batches = list(islice(loader.batches(step), steps))
    return [pair for batch in batches for pair in zip(batch.keys, batch.captions, strict=True)]


@pytest.mark.parametrize(("step", "rank", "world"), [(0, 0, 1), (3, 0, 2), (3, 1, 2), (40, 5, 8)])
def test_the_samples_of_our_loader(config: DataConfig, step: int, rank: int, world: int) -> None:
    samples = list(as_webdataset(config, seed=5, step=step, steps=6, rank=rank, world=world))
    assert [(each["__key__"], each["txt"].decode()) for each in samples] == ours(config, step, 6, rank, world)
    raw = [open_source(each.source) for each in config.train]
    stored = {(r.shard, r.key): r.fields for source in raw for r in map(source.record, range(len(source)))}
    for each in samples:
        fields = stored[each["__url__"], each["__key__"]]
        assert {k: v for k, v in each.items() if k not in ("__key__", "__url__", "txt")} == {
            k: v for k, v in fields.items() if k != "txt"
        }


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_take_batches_in_turn(config: DataConfig, workers: int) -> None:
    pipeline = as_webdataset(config, seed=5, step=2, steps=7, rank=1, world=2).to_tuple("__key__", "txt")
    expected = ours(config, 2, 7, 1, 2)
    loader = DataLoader(pipeline, batch_size=4, num_workers=workers, collate_fn=list)
    assert [(key, text.decode()) for batch in loader for key, text in batch] == expected
    batched = webdataset.WebLoader(pipeline.batched(4), batch_size=None, num_workers=workers)
    assert [(key, text.decode()) for batch in batched for key, text in zip(*batch, strict=True)] == expected


def test_given_twice_and_to_a_process_that_is_not_forked(config: DataConfig) -> None:
    pipeline = as_webdataset(config, seed=5, steps=2, rank=0, world=1)
    expected = [sample["__key__"] for sample in pipeline]
    assert [sample["__key__"] for sample in pipeline] == expected
    assert [sample["__key__"] for sample in pickle.loads(pickle.dumps(pipeline))] == expected


def test_a_recipe_gives_its_seed_and_mixtures(config: DataConfig) -> None:
    one = config.train[0].label
    recipe = Recipe.model_validate(
        {
            "name": "two-stages",
            "seed": 5,
            "data": config.model_dump(),
            "model": {
                "embed_dim": 8,
                "image": {"width": 8, "depth": 1, "heads": 1, "patch": 8, "resolution": 16},
                "text": {"width": 8, "depth": 1, "heads": 1, "context": 8},
            },
            "objectives": {"contrastive": {}},
            "stages": [{"samples": 32}, {"samples": 32, "mixture": {one: 1}}],
            "optimizer": {"lr": 1e-3},
        }
    )
    samples = [(s["__key__"], s["txt"].decode()) for s in as_webdataset(recipe, step=2, steps=6, rank=0, world=1)]
    assert samples == ours(config, 2, 6, 0, 1, mixtures=[Mixture(0, (1.0, 2.5)), Mixture(4, (1.0, 0.0))])
    assert samples != ours(config, 2, 6, 0, 1)


def test_rank_and_world_are_those_of_the_environment(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = [(s["__key__"], s["txt"].decode()) for s in as_webdataset(config, seed=5, steps=3)]
    assert found == ours(config, 0, 3, 3, 4)


def test_bad_samples_are_named_and_bounded(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    list(as_webdataset(config, seed=5, steps=8, rank=0, world=1))
    named = {re.search(r"key '(\d+)'", message)[1] for message in caplog.messages}  # type: ignore[index]
    assert named == {"00001", "00003", "00012"}
    with pytest.raises(DataError, match=r"2 of 30 samples are bad, at most 1 may be"):
        list(as_webdataset(config.model_copy(update={"max_bad_fraction": 0.05}), seed=5, steps=8, rank=0, world=1))


def test_what_cannot_be_is_refused(config: DataConfig) -> None:
    with pytest.raises(DataError, match="pass `batch`"):
        as_webdataset(config.train[0].source)
    with pytest.raises(DataError, match=r"batch = 16 differs from the recipe's data\.batch = 8"):
        as_webdataset(config, 16)
    with pytest.raises(DataError, match="batch = 8 must be a multiple of world = 3"):
        as_webdataset(config, rank=0, world=3)
    with pytest.raises(DataError, match="rank = 2 must be from 0 to world - 1 = 1"):
        as_webdataset(config, rank=2, world=2)
    with pytest.raises(DataError, match="step = -1"):
        as_webdataset(config, step=-1)


def test_the_page_s_example_trains(tmp_path: Path, write_source: WriteSource, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "shards", 2, 40)
    code = "\n".join(line[4:] for line in PAGE.read_text().split("\n") if line.startswith("    ") or not line)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), names)
    losses = names["losses"]
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5]) / 2
