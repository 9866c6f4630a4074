"""Suites and comparisons from the command line, on a commit in a store; suites of files while training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml
from PIL import Image

Command = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def suites(tmp_path: Path) -> list[str]:
    """A folder of two classes and a table of captions, as two suites."""
    rows = ["path,caption"]
    for i in range(9):
        path = tmp_path / "here" / "sets" / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
        rows.append(f"{path.relative_to(tmp_path / 'here' / 'sets')},picture {i}")
    sets = tmp_path / "here" / "sets"
    (sets / "captions.csv").write_text("\n".join(rows) + "\n")
    (sets / "classes").mkdir()
    for name in ("red", "blue"):
        (sets / name).rename(sets / "classes" / name)
    (sets / "captions.csv").write_text((sets / "captions.csv").read_text().replace("red/", "classes/red/"))
    (sets / "captions.csv").write_text((sets / "captions.csv").read_text().replace("blue/", "classes/blue/"))
    (sets / "colours.yaml").write_text(
        "name: colours\ndata: classes\nprotocol: {kind: zero_shot, templates: ['a {} picture', '{c}']}\n"
    )
    (sets / "nine.yaml").write_text("name: nine\ndata: captions.csv\nprotocol: retrieval\n")
    return ["sets/colours.yaml", "sets/nine.yaml"]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of embeddings of its own, the rest as it is."""
    from treering.data.storage import files
    from treering.training.evaluate import embedding_cache

    def folder(name: str) -> Path:
        own = tmp_path / "cache" / name
        own.mkdir(parents=True, exist_ok=True)
        return own if name == "embeddings" else files.cache_folder(name)

    monkeypatch.setattr(embedding_cache, "cache_folder", folder)
    return tmp_path / "cache" / "embeddings"


def test_a_built_in_suite_on_pictures_says_how_to_write_one(
    refused: Callable[..., str], treering: Command, tiny: Path, suites: list[str]
) -> None:
    """Folders of classes and tables of captions are read by suites of one's own, and shards by the built-in ones."""
    assert treering("train", str(tiny), "--out", "runs/tiny").returncode == 0
    for place, what in (("sets/classes", "a folder of pictures"), ("sets/captions.csv", "a table")):
        said = refused("eval", "runs/tiny", "--suite", "zero_shot", "--data", place)
        assert f"'{place}' is {what}, and the built-in suites read tar shards; pack it (treering data pack)" in said
        assert f"{{name: mine, data: {place}, protocol: zero_shot}}" in said
        assert said in refused("train", str(tiny), "eval.suites=[retrieval]", f"eval.data={place}", "--out", "other")


def test_one_command_evaluates_a_commit_on_three_suites(
    treering: Command, tiny: Path, tmp_path: Path, suites: list[str], cached: Path
) -> None:
    assert treering("train", str(tiny), "checkpoint.to=store/tiny").returncode == 0
    (commit,) = [path for path in (tmp_path / "here" / "store" / "tiny").iterdir() if path.is_dir()]
    asked = ["eval", f"store/tiny/{commit.name}", "--suite", ",".join([*suites, "retrieval"])]
    found = json.loads(treering(*asked, "--json").stdout)
    assert {name.split("/")[0] for name in found["scores"]} == {"colours", "nine", "retrieval"}
    of_captions = {key: found["sizes"][key] for key in ("retrieval", "retrieval/text_to_image")}
    assert found["sizes"] == {"colours": 9, "nine": 9, "nine/text_to_image": 9, **of_captions}
    assert set(found["intervals"]) == set(found["scores"])
    kept = sorted(cached.iterdir())
    assert len(kept) == 5  # three sets, the prompts, and the held-out loss
    shown = treering(*asked).stdout
    assert sorted(cached.iterdir()) == kept
    for name, score in found["scores"].items():
        low, high = found["intervals"][name]
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert " to " in line
        assert low <= score <= high


def test_the_held_out_loss_alone_is_evaluated_and_left_out_where_only_files_are_asked_for(
    treering: Command, tiny: Path, tmp_path: Path, suites: list[str]
) -> None:
    """A run without suites on data of its own; the same figure in its record and in the command, which has no table."""
    settings = ["eval={data: 'samples://emoji/held_out', held_out: 20}"]
    assert treering("train", str(tiny), *settings).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "here/runs/tiny/metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["event"] == "eval"]
    assert row["data"] == {}  # the set is not embedded as a whole
    recorded = row["held_out"]
    assert (recorded["samples"], recorded["batch"], recorded["training"]["lines"]) == (24, 8, 1)
    found = json.loads(treering("eval", "runs/tiny", "--json").stdout)
    assert found["scores"] == {}
    assert found["held_out"] == {name: value for name, value in recorded.items() if name != "training"}
    shown = treering("eval", "runs/tiny").stdout.splitlines()
    of = "on 24 samples of samples://emoji/held_out in batches of 8"
    assert shown[1:] == [f"held-out loss {recorded['loss']:.4g}, {of}"]
    assert json.loads(treering("eval", "runs/tiny", "--suite", suites[1], "--json").stdout)["held_out"] is None
    status = treering("status", "runs/tiny").stdout
    assert f"held-out loss  {recorded['loss']:.4g} (gap " in status


def test_two_processes_say_once_what_one_says(treering: Command, tiny: Path, tmp_path: Path, suites: list[str]) -> None:
    assert treering("train", str(tiny)).returncode == 0
    asked = ["eval", "runs/tiny", "--suite", ",".join(suites), "--json"]
    one = json.loads(treering(*asked).stdout)
    launcher = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "treering.launch"]
    two = subprocess.run(
        [sys.executable, *launcher, *asked],
        cwd=tmp_path / "here",
        env=os.environ | {"OMP_NUM_THREADS": "1", "TREERING_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout) == one


def test_runs_are_compared(treering: Command, refused: Command, tiny: Path, tmp_path: Path, cached: Path) -> None:
    for seed in (0, 1):
        assert treering("train", str(tiny), "--out", f"runs/{seed}", f"seed={seed}").returncode == 0
    same = json.loads(treering("compare", "runs/0", "runs/0", "--suite", "retrieval", "--json").stdout)
    assert all(task["changes"][0]["value"] == task["changes"][0]["lost"] == 0 for task in same["tasks"])
    asked = ["compare", "runs/0", "runs/1", "runs/0", "--suite", "retrieval,geometry", "--out", "pages.html"]
    found = json.loads(treering(*asked, "--json").stdout)
    assert [model["name"] for model in found["models"]] == ["0", "1", "0 (3)"]
    assert len(found["tasks"]) == 6 + 4
    page = (tmp_path / "here" / "pages.html").read_text()
    assert "Treering comparison" in page
    shown = treering(*asked).stdout.splitlines()
    line = next(line for line in shown if line.startswith("retrieval/image_to_text@10 "))
    assert " pp to " in line
    losses = [model["held_out"]["loss"] for model in found["models"]]
    assert losses[0] == losses[2] != losses[1]
    assert shown[-2] == f"Held-out loss: 0 {losses[0]:.4g}, 1 {losses[1]:.4g}, 0 (3) {losses[2]:.4g}"
    assert f"Held-out loss: 0 {losses[0]:.4g}" in page
    assert "Held-out loss" in page
    assert shown[-1] == "page  pages.html"
    assert "two or more" in refused("compare", "runs/0")
    assert "no captioner" in refused("compare", "runs/0", "runs/1", "--suite", "captioning")
    assert "no captioner" in refused("eval", "runs/0", "--suite", "captioning")
    assert "suite 'foo' is not known" in refused("compare", "runs/0", "runs/1", "--suite", "foo")


def test_a_run_is_evaluated_on_suites_of_files(
    treering: Command, refused: Command, tiny: Path, tmp_path: Path, suites: list[str]
) -> None:
    named = f"eval.suites=[retrieval, {', '.join(suites)}]"
    assert treering("train", str(tiny), named, "eval.examples=0").returncode == 0
    run = tmp_path / "here" / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    line = next(row for row in rows if row["event"] == "eval")
    assert {"colours/accuracy@1", "nine/image_to_text@1", "retrieval/image_to_text@1"} <= set(line["scores"])
    assert set(line["intervals"]) == set(line["scores"])
    page = (run / "report.html").read_text()
    assert "nine: image → text" in page
    assert " to " in page
    # The run's own recipe holds the suites: the files may go, and the run continues.
    for suite in suites:
        (tmp_path / "here" / suite).unlink()
    again = treering("train", str(run / "recipe.yaml"), "--out", "runs/tiny")
    assert again.returncode == 0, again.stderr
    (tmp_path / "here" / "sets" / "classes" / "red" / "notes.txt").write_text("x")
    assert "notes.txt is not .jpg" in refused("train", str(run / "recipe.yaml"), "--out", "runs/more")
    assert "cannot be read" in refused("train", str(tiny), named)


def test_the_suites_of_the_manual_can_be_read(tmp_path: Path) -> None:
    """Every block of docs/evaluation.md that is a suite, and every protocol that is written on a line of it."""
    from treering.training.evaluate.config import EvalConfig, SuiteConfig

    text = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    blocks = re.findall(r"(?m)^    name: .*\n(?:    .*\n)+", text)
    assert len(blocks) == 3
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(textwrap.dedent(block))
        EvalConfig(suites=(str(tmp_path / f"{number}.yaml"),))
    for kind in re.findall(r"`(\{kind: [^`]*\})`", text.replace("\n", " ")):
        protocol = yaml.safe_load(kind)
        train = "x" if "probe" in protocol["kind"] else None
        SuiteConfig.model_validate({"name": "x", "data": {"source": "x", "train": train}, "protocol": protocol})


def test_a_long_evaluation_says_how_far_it_is(
    treering: Command, tiny: Path, suites: list[str], cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treering.training.logging import counting

    assert treering("train", str(tiny), "eval.suites=[]", "eval.batch=4").returncode == 0
    ask = ("eval", "runs/tiny", "--suite", ",".join(suites))
    assert "embedded" not in treering(*ask).stderr
    for file in cached.iterdir():
        file.unlink()
    seconds = iter(range(0, 10**6, 20))  # every look at the clock is 20 seconds later
    monkeypatch.setattr(counting, "counting", partial(counting.counting, clock=lambda: float(next(seconds))))
    done = treering(*ask)
    assert re.search(r"captions.csv: samples embedded: 4 of 9, 25 s left\n.*: 8 of 9", done.stderr), done.stderr
    assert "embedded" not in done.stdout
