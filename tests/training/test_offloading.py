"""A model in several places is the model in one: bit for bit, with some of its blocks on the disk."""

from __future__ import annotations

import gc
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import treering
from treering.data.shards.tar_writer import write_shards
from treering.models.model import build
from treering.models.spec import CaptionerSpec, ImageSpec, ModelSpec, SharedSpec, TextSpec
from treering.training.evaluate.config import EvalConfig
from treering.training.evaluate.suites import evaluate
from treering.training.world import World

SPEC = ModelSpec(
    embed_dim=12,
    image=ImageSpec(width=16, depth=4, heads=2, patch=8, resolution=16, experts=3, experts_per_token=1),
    text=TextSpec(width=16, depth=3, heads=2, context=9, layer_scale=0.5),
    captioner=CaptionerSpec(depth=2),
    shared=SharedSpec(width=8, depth=1, heads=2),
)
BLOCKS = sum(p.numel() * 4 for name, p in build(SPEC, 0).named_parameters() if ".blocks." in name)
OUTSIDE = sum(p.numel() * 4 for name, p in build(SPEC, 0).named_parameters() if ".blocks." not in name)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "spec.json").write_text(SPEC.model_dump_json())
    (folder / "lineage.json").write_text(json.dumps({"recipe": {}}))
    save_file(build(SPEC, 3).state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    samples = []
    for number in range(24):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, "PNG")
        samples.append((f"{number:03}", {"png": file.getvalue(), "txt": f"picture number {number}".encode()}))
    write_shards(folder, "set", samples, 24, 24)
    return f"{folder}/*.tar"


def places(loaded: treering.Loaded) -> list[str]:
    """Of each block."""
    where = loaded.model.hf_device_map
    return [str(place) for name, place in where.items() if name.endswith(".attention_norm")]


@pytest.mark.parametrize("share", [0.3, 0.6, 2.0])
def test_a_model_in_several_places_is_the_model_in_one(export: Path, shards: str, share: float, tmp_path: Path) -> None:
    room = OUTSIDE + int(BLOCKS * share)
    whole = treering.load(export)
    spread = treering.load(export, device_map="auto", max_memory={"cpu": room}, offload_folder=tmp_path)
    on_disk = places(spread).count("disk")
    assert len(places(spread)) == 10
    assert on_disk > 0 if share < 1 else on_disk == 0
    held = sum(p.numel() * 4 for p in spread.model.parameters() if p.device.type != "meta")
    assert held <= room
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["one", "two and three", "a much longer text than the context of nine tokens has room for"]
    assert torch.equal(spread.encode_image(images), whole.encode_image(images))
    assert torch.equal(spread.encode_text(texts), whole.encode_text(texts))
    assert spread.caption(images, longest=5) == whole.caption(images, longest=5)
    world, config = World(0, 1, torch.device("cpu")), EvalConfig(suites=("retrieval", "geometry"), examples=0)
    ours, theirs = (evaluate(each.model, config, shards, world) for each in (spread, whole))
    assert ours.scores == theirs.scores
    assert len(ours.scores) > 4
    del spread
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"max_memory": {"cpu": "200"}},
            "max_memory: {cpu: '200'} must be bytes or a size such as 20GB, for cpu or cpu",
        ),
        ({"max_memory": {"cuda:0": "20GB"}}, "max_memory: {cuda:0: '20GB'} must be bytes or a size"),
        ({"max_memory": {"cpu": 1000}}, "bytes of the model lie outside of its blocks and have to be on cpu"),
        ({"device_map": "balanced"}, "device_map = 'balanced' must be 'auto'"),
        ({"device_map": None, "max_memory": {"cpu": 1 << 30}}, "device_map = None must be 'auto'"),
    ],
)
def test_what_cannot_be_is_refused(export: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        treering.load(export, **{"device_map": "auto", **given})


def test_it_cannot_be_moved(export: Path) -> None:
    with pytest.raises(ValueError, match="cannot be moved; load it for another device"):
        treering.load(export, device_map="auto").to("cpu")
