"""The command that is to run on a GPU, whenever one is at hand, run with tiny models on the CPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from treering.tests.benchmarks import train_step

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
    models = "b32,b16,l14,coca_b32,s32,b32:full"
    written = tmp_path / "h100.md"
    train_step.main(["--quick", "--json", "--models", models, "--page", str(written)])
    figures = json.loads(capsys.readouterr().out)["figures"]
    for label in ("b32", "b16", "l14", "coca_b32", "s32", "full_context"):
        assert figures[f"ratio_{label}"] > 0
        assert 0 < figures[f"mfu_{label}"] < 1
        assert figures[f"difference_{label}"] < 1e-4
    text = written.read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[0].startswith(HEADING)
    assert len(table) == 1 + 6
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert "largest batch" not in text
    figures |= {"largest_batch_b32": 4096.0, "largest_batch_coca_b32": 2048.0}
    assert "2,048 for CoCa B/32, 1/2 " in " ".join(train_step.page(figures, "a GPU", {}, "it").split())


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
    train_step.main(["--models", "b16,l14"])
    said = capsys.readouterr().out
    assert "b16: left out" in said
    assert "l14: left out" in said
