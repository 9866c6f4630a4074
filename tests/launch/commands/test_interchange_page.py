"""What docs/interchange.md says: its commands, its list of architectures, its lines of Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from PIL import Image

import treering as package
from treering.launch.recipe.load import read_recipe
from treering.models.flops import parameters
from treering.models.interchange.architectures import architectures, claimed, refused, spec_of
from treering.tests.support.open_clip_models import published
from treering.training.checkpoint.commits import find_commit

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
    images = [here / "cat.jpg", here / "dog.jpg"]
    texts = model.encode_text(["a cat", "a dog"], True)
    logits = model.logit_scale * model.encode_image(images, True) @ texts.T
    larger = package.load(here / "handed-back")
    again = larger.logit_scale * larger.encode_image(images, True) @ larger.encode_text(["a cat", "a dog"], True).T
    assert (logits - again).abs().max() < 1e-5


def test_what_a_person_reads(open_clip: ModuleType, treering: Run, refused: Callable[..., str], here: Path) -> None:
    published(open_clip, here / "coca", "coca_ViT-B-32")
    done = treering("import", "open_clip:local-dir:coca", "--to", "runs/coca")
    assert done.returncode == 0
    begins = "next         treering train runs/coca/recipe.yaml --out runs/coca-trained"
    assert f"{begins} 'data.train=[{{source: YOUR-SHARDS/*.tar}}]'\n" in done.stdout  # not emoji, silently
    # The recipe leaves its data open and says so; whatever would read them asks for them, until an override names them.
    assert "  train: []  # to be filled in: your shards" in (here / "runs/coca/recipe.yaml").read_text()
    asks = "data.train is empty; name the shards to train on, as in 'data.train=[{source:"
    for command in (["train", "--out", "runs/a"], ["explain"], ["plan"], ["submit", "--dry-run"]):
        assert asks in refused(command[0], "runs/coca/recipe.yaml", *command[1:])
    given = ["runs/coca/recipe.yaml", "data.train=[{source: samples://emoji}]"]
    assert treering("explain", *given).returncode == 0
    short = refused("grow", "runs/coca", "--to", "image.depth=3", "--out", "runs/deep", "samples=64")
    assert "ends the run before its schedule.warmup = 20000 does; give samples=20001 or more" in short
    done = treering("grow", "runs/coca", "--to", "image.depth=3", "--out", "runs/deep", "samples=20001")
    assert done.stdout.endswith("runs/deep-trained 'data.train=[{source: YOUR-SHARDS/*.tar}]'\n"), done.stderr
    assert asks in refused("train", "runs/deep/recipe.yaml", "--out", "runs/a")
    assert "samples://emoji/held_out" in treering("eval", "runs/coca", "--suite", "retrieval").stdout
    done = treering("import", "open_clip:local-dir:coca", "--to", "runs/with", "--data", "shards/*.tar")
    assert done.stdout.endswith("runs/coca-trained\n")
    assert "has commits already" in refused("import", "open_clip:local-dir:coca", "--to", "runs/coca")
    assert "its image tower is a ResNet" in refused("import", "open_clip:RN50/openai", "--to", "runs/rn")
    assert "give safetensors or open_clip" in refused("export", "runs/coca", "--to", "onnx", "--out", "out")


def test_the_recipe_of_grown_weights_is_that_of_the_grown_model(
    open_clip: ModuleType, treering: Run, refused: Callable[..., str], here: Path
) -> None:
    """It trains as it is, and in the README's form, with fewer samples; `next` names a folder of its own."""
    published(open_clip, here / "published", "ViT-B-32")
    small = ["data.batch=8", "schedule.warmup=8", "eval.suites=[]", "stages=[{samples: 32}]"]
    small.append("data.train=[{source: samples://emoji}]")
    asks = "'data.train=[{source: YOUR-SHARDS/*.tar}]'"
    assert treering("import", "open_clip:local-dir:published", "--to", "runs/b32").returncode == 0
    for source, to, out in (("runs/b32", "image.depth=3", "runs/b32-deep"), ("runs/b32-deep", "text.depth=3", "both")):
        done = treering("grow", source, "--to", to, "--out", out, "samples=64000", "width_init=duplicate")
        assert done.stdout.strip().endswith(f"--out runs/{Path(out).name}-trained {asks}"), done.stderr
    recipe = read_recipe(str(here / "both/recipe.yaml"), small[-1:]).recipe
    assert (recipe.model.image.depth, recipe.model.text.depth) == (3, 3)
    assert [(stage.samples, stage.grow, stage.width_init) for stage in recipe.stages] == [(64000, {}, "noise")]
    done = treering("train", "both/recipe.yaml", "--out", "runs/both-trained", *small)
    assert done.returncode == 0, done.stderr
    assert find_commit(str(here / "runs/both-trained")).manifest.spec == recipe.model

    # What refuses a changed recipe says how to begin with its weights, and that works at once.
    changed = ["train", "both/recipe.yaml", *small, "optimizer.lr=1e-4"]
    said = refused(*changed, "--out", "runs/both-trained")
    begins = re.search(r"'(init_from=\{commit: \S+\})'$", said.strip())
    assert begins, said
    done = treering(*changed, "--out", "runs/faster", begins[1])
    assert done.returncode == 0, done.stderr

    # So does what refuses another shape.
    old = ["train", "runs/b32/recipe.yaml", *small, "--from", "both", "--out", "runs/again"]
    done = treering(*old)
    shape = re.search(r"give the recipe that shape, by (.*), or bring", done.stderr)
    assert shape, done.stderr
    done = treering(*old, *shlex.split(shape[1]))
    assert done.returncode == 0, done.stderr
