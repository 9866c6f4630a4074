"""What may take long says how far it is: every command that reads or writes weights or samples, and a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from treering.data.shards.parallel import Progress
from treering.launch.commands import data_batch, data_output, export, grow, import_, plan
from treering.launch.commands import eval as evaluation
from treering.launch.recipe.load import read_recipe
from treering.tests.support.open_clip_models import published
from treering.tests.support.tiny_runs import SIZES
from treering.training import loop
from treering.training.logging import counting as module
from treering.training.logging.run_log import RunLog

Told = dict[str, list[tuple[int, int]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What was counted, by its name with `*` for names of files and URLs; and what was waited for, as []."""
    found: Told = {}

    @contextmanager
    def counting(what: str, *_: object) -> Iterator[Progress]:
        rows = found.setdefault(what.rpartition(": ")[2], [])
        yield lambda done, total: rows.append((done, total))

    @contextmanager
    def waiting(what: str, *_: object) -> Iterator[None]:
        found.setdefault(what.partition(" ")[0], [])
        yield

    monkeypatch.setattr(module, "counting", counting)
    monkeypatch.setattr(module, "waiting", waiting)
    monkeypatch.setattr(data_output, "counting", counting)
    monkeypatch.setattr(RunLog, "counting", lambda self, what: counting(what))
    return found


def complete(told: Told, *names: str) -> None:
    """These were counted up to their end, in order."""
    for name in names:
        rows = told[name]
        assert rows, name
        assert [done for done, _ in rows] == sorted(done for done, _ in rows), name
        assert rows[-1][0] in (rows[-1][1], rows[-1][1] - 1), (name, rows[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    more = ["stages=[{samples: 36}]", "eval={suites: [retrieval], held_out: 30}"]
    loop.train(read_recipe("emoji", [*SIZES, *more]).recipe, out)
    return out


def test_a_run_counts_its_evaluation_and_its_commit(told: Told, tmp_path: Path) -> None:
    settings = [*SIZES, "stages=[{samples: 36}]", "eval={suites: [retrieval, captioning], held_out: 30}"]
    recipe = read_recipe("emoji", settings).recipe
    loop.train(recipe, tmp_path / "run")
    complete(told, "samples embedded", "samples of the held-out loss", "pictures captioned")
    assert told["samples of the held-out loss"][-1] == (36, 36)
    assert "parts of the commit written" in told
    told.clear()
    loop.train(recipe, tmp_path / "run")  # it has ended, and only reads its commit
    complete(told, "parts of the commit read")


def test_commands_that_read_and_write_weights(
    told: Told, run: Path, tmp_path: Path, open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation.evaluate_commit(str(run), ["retrieval"], None)
    complete(told, "parts read")
    told.clear()
    export.export_commit(str(run), "safetensors", tmp_path / "weights")
    complete(told, "parts read")
    assert "writing" in told
    told.clear()
    grow.grow_offline(str(run), ["image.depth=2"], [], ["samples=120"], str(tmp_path / "grown"))
    complete(told, "parts read", "tensors grown")
    told.clear()
    theirs = published(open_clip, tmp_path / "theirs", "ViT-B-32-quickgelu")
    import_.import_weights(f"open_clip:local-dir:{theirs}", str(tmp_path / "imported"), None, None)
    assert {"reading", "parts of the commit written"} <= told.keys()


def test_commands_that_read_samples(told: Told, tmp_path: Path) -> None:
    recipe = read_recipe("emoji", SIZES).recipe
    plan.measure(recipe)
    assert told["samples read"]
    told.clear()
    data_batch.batch_of("emoji", list(SIZES), 1, 1)
    assert told["samples read"][-1] == (12, 12)
    told.clear()
    data_output.inspect_url("samples://emoji", 20, tmp_path / "sheet.html", 1)
    complete(told, "samples", "pictures of the sheet")
