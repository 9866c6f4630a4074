"""The command that is to run on a GPU, whenever one is at hand, run with tiny models on the CPU."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.tests.benchmarks import train_step
from treering.tests.benchmarks.train_step_page import page

HEADING = "| model | batch | caption tokens |"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shallow models, a device with a peak, and a search that ends at 256 pairs."""
    real = train_step.config_named

    def shallow(name: str) -> dict[str, Any]:
        config = copy.deepcopy(dict(real(name)))
        small = {"width": 64, "layers": 1, "heads": 1, "patch_size": 32, "attn_pooler_heads": 2}
        for part in (config["vision_cfg"], config["text_cfg"], config.get("multimodal_cfg", {})):
            part |= {key: value for key, value in small.items() if key in part}
        return config | {"embed_dim": 64}

    monkeypatch.setattr(train_step, "config_named", shallow)
    monkeypatch.setattr(
        train_step, "MODELS", {name: train_step.Case(case.name, 4, 4) for name, case in train_step.MODELS.items()}
    )
    monkeypatch.setattr(train_step, "LARGEST", 256)
    monkeypatch.setattr(train_step, "peak_flops", lambda device: 1e12)


def test_every_model_and_the_page(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that a GPU would be asked for, but the search for the largest batch, is in the object and on the page."""
    models = "b32,b16,l14,coca_b32,s32,b32:full,waits,repeat,commit,loop"
    written = tmp_path / "out" / "h200.md"
    given = ["--quick", "--json", "--models", models, "--page", str(written), "--data", str(photos(tmp_path))]
    train_step.main(given)
    report = json.loads(capsys.readouterr().out)
    figures = report["figures"]
    assert report["failures"] == {}
    for label in ("b32", "b16", "l14", "coca_b32", "s32", "full_context"):
        assert figures[f"ratio_{label}"] > 0
        assert 0 < figures[f"mfu_{label}"] < 1
        assert figures[f"difference_{label}"] < 1e-4
    assert figures["waits"] == 0
    assert figures["equal_bits_as_they_come"] == figures["equal_bits_deterministic"] == 1, "a CPU repeats every bit"
    assert 10e6 < figures["commit_bytes"] < 26e6
    assert figures["loop_samples_per_second"] > 0
    text = written.read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[0].startswith(HEADING)
    assert len(table) == 1 + 6
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert "largest batch" not in text
    assert "had equal bits" in " ".join(text.split())
    figures |= {"largest_batch_b32": 4096.0, "largest_batch_coca_b32": 2048.0}
    assert "2,048 for CoCa B/32, 1/2 " in " ".join(page(figures, {}, "a GPU", {}, "it").split())


def photos(folder: Path) -> Path:
    """Fewer photos than a batch has, of which one has no caption."""
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (60, 40), (80 * number, 90, 10)).save(folder / f"{number}.jpg")
    (folder / "captions.tsv").write_text("0.jpg\ta dog on the grass\n1.jpg\ta cat\n9.jpg\tno such photo\n")
    return folder


def test_what_fails_costs_no_figure_of_another(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that has no memory, packages that are not installed, a kill in the middle: the page has what was measured
    before."""

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    written, real = tmp_path / "page.md", train_step.compared

    def compared(name: str, *given: Any) -> dict[str, float]:
        if name == "b16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "coca_b32":
            assert "| s32 |" in written.read_text()
            raise KeyboardInterrupt
        return real(name, *given)

    monkeypatch.setattr(train_step, "compared", compared)
    with pytest.raises(KeyboardInterrupt):
        train_step.main(["--quick", "--models", "b16,loop,s32,coca_b32", "--page", str(written)])
    text = written.read_text()
    assert "b16: OutOfMemoryError: CUDA out of memory." in text
    assert "loop: ValueError: it needs photos; give --data." in text
    assert "treering a checkout" in text
    assert "| s32 | 4 |" in text
    assert "b16: OutOfMemoryError" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_step.main(["--models", "b33"])
    assert "--models b33 is not known" in capsys.readouterr().err


def test_the_largest_batch_is_found(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By doubling, until the memory is full."""
    device = torch.device("cpu")
    assert train_step.largest_batch("b32", device) == 256
    monkeypatch.setattr(train_step, "LARGEST", 1024)
    real = train_step.Ours.step

    def step(self: train_step.Ours) -> Any:
        if len(self.inputs.lengths) > 256:
            raise torch.OutOfMemoryError
        return real(self)

    monkeypatch.setattr(train_step.Ours, "step", step)
    assert train_step.largest_batch("coca_b32", device) == 256


def test_nothing_is_begun_when_the_time_is_over(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "LIMIT", -1)
    with pytest.raises(SystemExit, match="nothing was measured"):
        train_step.main(["--models", "b16,l14"])
    said = capsys.readouterr().out
    assert "b16: left out" in said
    assert "l14: left out" in said
