"""What docs/interchange.md says: its commands, its list of architectures, its lines of Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image

import treering as package
from treering.models.flops import parameters
from treering.models.interchange.architectures import architectures, claimed, refused, spec_of
from treering.tests.support.open_clip_models import published

PAGE = Path(__file__).parents[3] / "docs/interchange.md"
Run = Callable[..., object]


def test_the_list_is_that_of_the_code() -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) x (\d+), (\d+) x (\d+) \| ([\d,]+) \| (\S+) \|", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(claimed())
    assert f"\n{len(claimed())} of open_clip" in text
    for name, *sizes, millions, tokens in rows:
        spec = spec_of(architectures()[name])
        assert [int(size) for size in sizes] == [spec.image.width, spec.image.depth, spec.text.width, spec.text.depth]
        assert int(millions.replace(",", "")) == round(parameters(spec) / 1e6)
        assert tokens == (architectures()[name]["text_cfg"].get("hf_tokenizer_name") or "CLIP")
    timm = sum("timm" in why for why in refused().values())
    assert f"{timm} image towers built by timm" in text


def test_the_commands_of_the_page(open_clip: ModuleType, treering: Run, here: Path) -> None:
    published(open_clip, here / "published", "ViT-B-32")
    commands = re.findall(r"^\$ treering (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        done = treering(*shlex.split(command))
        assert done.returncode == 0, (command, done.stderr)
    open_clip.create_model(f"local-dir:{here / 'handed-back'}")
    model = package.load(here / "runs/imported", device="cpu")
    for name in ("cat", "dog"):
        Image.new("RGB", (30, 20), "red").save(here / f"{name}.jpg")
    images = torch.stack([model.preprocess(here / "cat.jpg"), model.preprocess(here / "dog.jpg")])
    texts = model.encode_text(["a cat", "a dog"], True)
    logits = model.logit_scale * model.encode_image(images, True) @ texts.T
    larger = package.load(here / "handed-back")
    again = larger.logit_scale * larger.encode_image(images, True) @ larger.encode_text(["a cat", "a dog"], True).T
    assert (logits - again).abs().max() < 1e-5


def test_what_a_person_reads(open_clip: ModuleType, treering: Run, refused: Callable[..., str], here: Path) -> None:
    published(open_clip, here / "coca", "coca_ViT-B-32")
    done = treering("import", "open_clip:local-dir:coca", "--to", "runs/coca")
    assert done.returncode == 0
    assert "next         treering train runs/coca/recipe.yaml --out runs/coca-trained" in done.stdout
    assert "has commits already" in refused("import", "open_clip:local-dir:coca", "--to", "runs/coca")
    assert "its image tower is a ResNet" in refused("import", "open_clip:RN50/openai", "--to", "runs/rn")
    assert "give safetensors or open_clip" in refused("export", "runs/coca", "--to", "onnx", "--out", "out")
