"""A run whose commits are in a bucket, and whose shards are too, continues on a machine that has neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from treering.data.shards.source import open_source
from treering.launch.recipe.load import read_recipe
from treering.training import loop
from treering.training.checkpoint.commits import find_commit
from treering.training.loop import train


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def test_train_from_a_bucket_into_a_bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    torch.set_num_threads(1)
    shard = Path(open_source("samples://emoji/held_out").shard(0))
    s3fs.S3FileSystem().put_file(str(shard), f"{s3.removeprefix('s3://')}/data/{shard.name}")
    recipe = read_recipe(
        "emoji",
        [
            "data.batch=4",
            "model={embed_dim: 8, image: {width: 8, depth: 1, heads: 1, patch: 12, resolution: 12}, "
            "text: {width: 8, depth: 1, heads: 1, context: 8}, captioner: {depth: 1}}",
            "stages=[{samples: 12}, {grow: {image.depth: 2}, samples: 20}]",
            "schedule.warmup=4",
            "checkpoint.every=8",
            f"checkpoint.to={s3}/commits",
            f"data.train=[{{source: '{s3}/data/*.tar'}}]",
            "eval={suites: [retrieval], data: samples://emoji/held_out, examples: 0}",
            "log.every=1",
        ],
    ).recipe
    whole = train(recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"to": None})}), tmp_path)

    def dies(run: loop.Run, batch: object) -> None:
        if run.state.step == 6:
            raise KeyboardInterrupt
        step(run, batch)

    step = loop.Run.step
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    second = train(recipe, tmp_path / "second")
    assert second.scores == whole.scores
    again = losses(tmp_path / "second")
    assert min(again) in (5, 7)  # the commit of step 6 may have been on its way
    assert again == {s: v for s, v in losses(tmp_path).items() if s >= min(again)}
    ours, theirs = find_commit(f"{s3}/commits").tensors(), find_commit(str(tmp_path)).tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
