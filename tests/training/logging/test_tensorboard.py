"""The TensorBoard files, read back by tensorboard itself: tags, values, x axis, pictures and captions."""

from __future__ import annotations

import base64
import html
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown import markdown
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from treering.training.logging.tensorboard import TensorBoardLog

HOSTILE = "a | b <script>alert(1)</script> **bold** [x](http://evil.example) `c`"


def step(number: int, **more: Any) -> dict[str, Any]:
    """A step line as metrics.jsonl has it."""
    return {
        "event": "step",
        "step": number,
        "samples": number * 256,
        "time": 1.0,
        "stage": 0,
        "loss": 5.0 / number,
        "losses": {"contrastive": 2.0 / number, "caption": 1.5 / number},
        "lr": 1e-3,
        "logit_scale": 14.3,
        "grad_norm": 1.25,
        "skipped": 0,
        "bad_samples": 3,
        "samples_per_second": 256.0,
        "data_wait": 0.125,
        "caption_length": 11.5,
        "captions_cut": 0.25,
        "mfu": None,
        "flops": 1e12,
        "peak_memory": 1_000_000,
        "parameters": 1000,
        "seconds": {"data": 0.1, "compute": 0.9},
    } | more


def picture(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def evaluation(samples: int) -> dict[str, Any]:
    nearest = [
        {"caption": "wrong", "score": 0.5, "correct": False},
        {"caption": "right", "score": 0.25, "correct": True},
    ]
    return {
        "step": samples // 256,
        "samples": samples,
        "scores": {"retrieval/image_to_text@1": 0.25, "zero_shot/role": 0.5},
        "chance": {},
        "examples": {
            "retrieval": [
                {"key": "a", "image": picture("red"), "caption": "right", "nearest": nearest},
                {"key": "b", "image": "http://evil.example/x.png", "caption": "b", "nearest": []},
            ],
            "captions": [{"key": "c", "image": picture("blue"), "true": ["one", "two"], "generated": HOSTILE}],
        },
    }


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    return events


def values(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_scalars_are_grouped_over_samples(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path)
    board.scalars(step(1))
    board.scalars(step(2, loss=None, grad_norm=math.inf))
    board.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "loss/total",
        "loss/contrastive",
        "loss/caption",
        "loss/logit_scale",
        "optimizer/lr",
        "optimizer/grad_norm",
        "optimizer/skipped_steps",
        "speed/samples_per_second",
        "speed/data_wait",
        "speed/flops",
        "speed/peak_memory",
        "model/parameters",
        "data/bad_samples",
        "data/caption_length",
        "data/captions_cut",
    }
    assert values(events, "loss/total") == [(256, 5.0)]
    assert values(events, "optimizer/grad_norm") == [(256, 1.25)]
    assert values(events, "loss/contrastive") == [(256, 2.0), (512, 1.0)]
    assert values(events, "speed/data_wait") == [(256, 0.125), (512, 0.125)]


def test_growth_is_a_step_in_the_parameters(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path)
    board.scalars(step(1))
    board.growth(
        {
            "samples": 300,
            "from": {"image.depth": 4},
            "to": {"image.depth": 8},
            "parameters_before": 1000,
            "parameters_after": 1800,
        }
    )
    board.scalars(step(2, parameters=1800))
    board.close()
    events = read(tmp_path)
    assert values(events, "model/parameters") == [(256, 1000), (300, 1000), (300, 1800), (512, 1800)]
    text = events.Tensors("model/growth/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "image.depth 4 → 8" in html.unescape(markdown(text))


def test_evaluation_writes_scores_strips_and_captions(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path)
    board.evaluation(evaluation(512))
    board.close()
    events = read(tmp_path)
    assert values(events, "eval/retrieval/image_to_text@1") == [(512, 0.25)]
    assert values(events, "eval/zero_shot/role") == [(512, 0.5)]
    assert events.Tags()["images"] == ["retrieval/00", "captions/00"]  # a picture that is not embedded is skipped
    (image,) = events.Images("retrieval/00")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    assert (image.step, pixels.shape) == (512, (108, 480, 3))
    assert (pixels[54, 54] == (255, 0, 0)).all()  # the picture on the left
    assert (pixels[:, 120:].min(axis=2) < 100).any(axis=1).sum() > 20  # writing on the right


def test_hostile_captions_stay_text_in_markdown(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path)
    board.evaluation(evaluation(512))
    board.close()
    text = read(tmp_path).Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode()
    page = markdown(text, extensions=["tables"])  # what TensorBoard renders with
    assert page.count("<td>") == 3
    for tag in ("<script", "<strong", "<a ", "<code"):
        assert tag not in page
    assert "one&#59; two" in page


def test_resume_hides_what_the_killed_attempt_wrote_later(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path)
    for number in (1, 2, 3):
        board.scalars(step(number))
    board.close()
    board = TensorBoardLog(tmp_path, purge_step=512)
    board.scalars(step(2, loss=9.0))
    board.close()
    assert values(read(tmp_path), "loss/total") == [(256, 5.0), (512, 9.0)]


@pytest.mark.parametrize(
    "url", [None, 3, "data:image/png;base64,AAAA", "data:image/png;base64,A", "data:image/svg+xml;base64,AAAA"]
)
def test_what_is_no_picture_is_left_out(tmp_path: Path, url: object) -> None:
    board = TensorBoardLog(tmp_path)
    board.evaluation({"samples": 1, "examples": {"retrieval": [{"image": url, "caption": "x"}]}})
    board.close()
    assert read(tmp_path).Tags()["images"] == []


def test_runs_can_be_compared_by_their_recipes(tmp_path: Path) -> None:
    """In the one file of the run, as the HParams page reads it; nulls and values that are not settings are skipped."""
    board = TensorBoardLog(tmp_path)
    recipe = {"seed": 3, "name": "x", "optimizer": {"lr": 0.5, "ema": None}, "stages": [{"grow": {"image.depth": 4}}]}
    board.end(recipe, {"zero_shot/role": 0.25})
    board.close()
    files = EventAccumulator(str(tmp_path)).Reload()
    plugin = files.summary_metadata["_hparams_/session_start_info"].plugin_data
    started = HParamsPluginData.FromString(plugin.content).session_start_info
    found = {name: value.number_value for name, value in started.hparams.items()}
    assert found == {"seed": 3.0, "optimizer.lr": 0.5, "stages.0.grow.image.depth": 4.0}
    assert [event.value for event in files.Scalars("eval/zero_shot/role")] == [0.25]


def test_the_projector_gets_rows_and_names(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    board = TensorBoardLog(tmp_path)
    board.points(rows, ["picture: a cat", "picture: two\tdogs\nrun", "text: a cat", "text: two dogs run"], 512)
    board.close()
    assert 'tensor_name: "pairs:00512"' in (tmp_path / "projector_config.pbtxt").read_text()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    found = np.loadtxt(next(folder.rglob("tensors.tsv")), delimiter="\t")
    assert np.allclose(found, rows.numpy(), atol=1e-6)
    names = next(folder.rglob("metadata.tsv")).read_text().splitlines()
    assert names == ["picture: a cat", "picture: two dogs run", "text: a cat", "text: two dogs run"]
