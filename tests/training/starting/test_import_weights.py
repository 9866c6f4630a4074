"""Published weights through the whole house: import, use from Python, train, evaluate, grow, export; the truth is
open_clip on the same folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import treering
from treering.data.errors import BadSample
from treering.launch.commands.eval import evaluate_commit
from treering.launch.commands.export import export_commit
from treering.launch.commands.grow import grow_offline
from treering.launch.commands.import_ import import_weights
from treering.launch.errors import RecipeError
from treering.launch.recipe.load import read_recipe
from treering.models.interchange.errors import InterchangeError
from treering.models.interchange.files import picture_settings
from treering.tests.support.open_clip_models import PICTURES, published
from treering.training.checkpoint.commits import find_commit
from treering.training.checkpoint.store import StoreError
from treering.training.loop import train

TEXTS = ["a red circle", "Two dogs, running!! through   the grass", "&amp; caf\u00e9 " + "long " * 40]


@pytest.fixture(scope="module")
def imported(coca: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    return import_weights(f"open_clip:local-dir:{coca}", str(tmp_path_factory.mktemp("ours") / "coca"), None, None)


def picture(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@torch.no_grad()
def theirs(open_clip: ModuleType, where: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a picture and of the texts by open_clip's own model, transform and tokenizer."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{where}")
    tokens = open_clip.get_tokenizer(f"local-dir:{where}")(TEXTS)
    side = model.visual.image_size[0]
    return model.eval().encode_image(transform(picture(side))[None]), model.encode_text(tokens)


def test_python_gives_what_open_clip_gives(open_clip: ModuleType, coca: Path, imported: dict[str, Any]) -> None:
    """From the commit, from the run folder, from the export of either format and from open_clip's folder."""
    image, text = (F.normalize(x, dim=-1) for x in theirs(open_clip, coca))
    run = str(Path(imported["recipe"]).parent)
    export_commit(imported["commit"], "safetensors", Path(run) / "ours")
    export_commit(imported["commit"], "open_clip", Path(run) / "back")
    places = (imported["commit"], run, Path(run) / "ours", Path(run) / "back", coca, f"open_clip:local-dir:{coca}")
    for place in places:
        model = treering.load(place)
        pixels = model.preprocess(picture(model.spec.image.resolution))
        assert (model.encode_image(pixels, True) - image).abs().max() < 1e-5
        assert (model.encode_text(TEXTS, normalize=True) - text).abs().max() < 1e-5
        assert (model.encode_text(TEXTS[0], True) - text[:1]).abs().max() < 1e-5
        ids = [model.tokenizer.encode(one, model.spec.text.context) for one in TEXTS]
        assert torch.equal(model.encode_text(ids), model.encode_text(TEXTS))
    assert model.logit_bias == 0.0
    assert model.logit_scale == pytest.approx(
        load_file(coca / "open_clip_model.safetensors")["logit_scale"].exp().item()
    )


@torch.no_grad()
def test_captions_are_the_likeliest_tokens_of_open_clip(open_clip: ModuleType, coca: Path) -> None:
    ours, model = treering.load(coca), open_clip.create_model(f"local-dir:{coca}").eval()
    pixels = ours.preprocess(picture(ours.spec.image.resolution))
    normal = (pixels / 255 - torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1)) / torch.tensor([0.5, 0.4, 0.5]).view(3, 1, 1)
    ids = [49406]
    while len(ids) < 9 and ids[-1] != 49407:
        logits = model(normal[None], torch.tensor([ids]), output_labels=False)["logits"]
        ids.append(int(logits[0, -1].argmax()))
    assert ours.caption(pixels, longest=9) == [ours.tokenizer.decode(ids)]
    assert len(ours.caption(torch.stack([pixels, pixels]), "beam", 6)) == 2


def test_handed_back_the_bits_are_the_same(open_clip: ModuleType, coca: Path, imported: dict[str, Any]) -> None:
    out = Path(imported["recipe"]).parent / "bits"
    found = export_commit(imported["commit"], "open_clip", out)
    before, after = load_file(coca / "open_clip_model.safetensors"), load_file(out / "open_clip_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for one, other in zip(theirs(open_clip, coca), theirs(open_clip, out), strict=True):
        assert torch.equal(one, other)
    assert json.loads((out / "open_clip_config.json").read_text())["preprocess_cfg"] == PICTURES
    assert found["parameters"] == imported["parameters"]


def test_the_commit_evaluates_and_a_run_begins_with_it(imported: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(
        imported["recipe"],
        [
            "data.batch=8",
            "stages.0.samples=16",
            "schedule.warmup=8",
            "log.every=1",
            "data.train=[{source: samples://emoji}]",
        ],
    ).recipe
    assert recipe.objectives.caption
    assert train(recipe, tmp_path / "run").finished
    commit = find_commit(str(tmp_path / "run"))
    begun = commit.manifest.state.lineage[0]
    assert (begun.event, begun.detail["commit"]) == ("from", imported["commit"])
    assert begun.detail["lineage"][0]["event"] == "import"
    scores = evaluate_commit(imported["commit"], ["retrieval"], None)
    assert scores["sizes"]["retrieval"] > 100
    assert 0 <= scores["scores"]["retrieval/image_to_text@1"] < 0.2
    with pytest.raises(StoreError, match=r"holds weights alone.* another --out and 'init_from={commit: \S+}'"):
        train(recipe.model_copy(update={"init_from": None}), Path(imported["recipe"]).parent)


def test_grown_offline_it_gives_the_same_and_exports_again(open_clip: ModuleType, clip: Path, tmp_path: Path) -> None:
    found = import_weights(f"open_clip:local-dir:{clip}", str(tmp_path / "clip"), None, None)
    to = ["image.width=48,image.depth=3", "text.width=32,text.depth=4"]
    grown = grow_offline(found["commit"], to, [], [], str(tmp_path / "large"))
    export_commit(grown["commit"], "open_clip", tmp_path / "back")
    for one, other in zip(theirs(open_clip, clip), theirs(open_clip, tmp_path / "back"), strict=True):
        assert (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).abs().max() < 1e-5
    recipe = read_recipe(
        grown["recipe"],
        ["data.batch=8", "stages.0.samples=16", "schedule.warmup=8", "data.train=[{source: samples://emoji}]"],
    ).recipe
    assert recipe.init_from
    assert recipe.init_from.commit == grown["commit"]
    assert train(
        recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"suites": ()})}), tmp_path / "r"
    ).finished


def test_pictures_are_made_as_the_weights_want_them(open_clip: ModuleType, tmp_path: Path) -> None:
    """Squashed and bilinear: within a grey level or two of open_clip's transform, and far from the crop."""
    pictures = PICTURES | {"interpolation": "bilinear", "resize_mode": "squash"}
    where = published(open_clip, tmp_path / "squash", "ViT-B-32", pictures)
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 200, 3), dtype=np.uint8))
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{where}")
    mean, std = (torch.tensor(PICTURES[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = (transform(wide) * std + mean) * 255
    model = treering.load(where)
    assert (model.preprocess(wide).float() - expected).abs().max() <= 2
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    assert torch.equal(model.preprocess(buffer.getvalue()), model.preprocess(np.asarray(wide)))
    found = import_weights(f"open_clip:local-dir:{where}", str(tmp_path / "ours"), None, None)
    assert [note.split(" ")[1] for note in found["notes"]] == ["squashes", "resizes", "recipe"]
    cropping = deepcopy(model.spec.image).model_copy(update={"resize": "crop"})
    model.model.spec = model.spec.model_copy(update={"image": cropping})
    assert (model.preprocess(wide).float() - expected).abs().max() > 20
    with pytest.raises(InterchangeError, match="resize_mode = 'longest'"):
        picture_settings({"resize_mode": "longest"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_another_device_it_gives_the_same(coca: Path) -> None:
    here, there = treering.load(coca), treering.load(coca, device="cuda")
    pixels = here.preprocess(picture(here.spec.image.resolution))
    assert (here.encode_image(pixels, True) - there.encode_image(pixels, True).cpu()).abs().max() < 1e-4
    assert (here.encode_text(TEXTS, True) - there.encode_text(TEXTS, True).cpu()).abs().max() < 1e-4
    assert there.caption(pixels, longest=5)
    assert there.to("cpu").device.type == "cpu"


def test_what_is_slow_to_import_comes_late() -> None:
    """The package without torch; the models, a run and `load` without open_clip, torchvision and timm."""
    code = "import sys, treering; assert 'torch' not in sys.modules; treering.load; import treering.training.loop; "
    code += "assert not {'open_clip', 'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_bad_use_says_what_to_give(coca: Path, clip: Path) -> None:
    model = treering.load(clip)
    with pytest.raises(ValueError, match=r"images are float32 \[1, 3, 12, 12\]; give uint8 \[b, 3, 12, 12\]"):
        model.encode_image(torch.rand(3, 12, 12))
    with pytest.raises(ValueError, match="has no captioner"):
        model.caption(torch.zeros(3, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a picture is uint8"):
        model.preprocess(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="no text"):
        model.encode_text([])
    with pytest.raises(ValueError, match="context of 16"):
        model.encode_text([[1] * 17])
    with pytest.raises(StoreError, match="no commit"):
        treering.load(coca.parent / "nothing")
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        treering.laod  # noqa: B018


def tokenizer_file(where: Path, end: str) -> Path:
    """A word tokenizer that puts [CLS] before and `end` after a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "dog": 5}, "[UNK]"))
    made.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [("[CLS]", 1), (end, made.token_to_id(end))]
    made.post_processor = processors.TemplateProcessing(single=f"[CLS] $A {end}", special_tokens=specials)
    made.save(str(where))
    return where


def test_weights_with_another_tokenizer(open_clip: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIPA: texts of BERT's tokens without their end, filled, seen from both sides; the names go back to open_clip."""
    where = published(open_clip, tmp_path / "clipa", "ViT-L-14-CLIPA")
    source, out = f"open_clip:local-dir:{where}", str(tmp_path / "out")
    with pytest.raises(InterchangeError, match=r"uses the tokenizer bert-base-uncased; get the tokenizer\.json"):
        import_weights(source, out, None, None)
    sep, pad = tokenizer_file(tmp_path / "sep.json", "[SEP]"), tokenizer_file(tmp_path / "pad.json", "[PAD]")
    with pytest.raises(InterchangeError, match="ends a text with id 2, and clipa was trained with 0 there"):
        import_weights(source, out, None, str(sep))
    found = import_weights(source, out, None, str(pad))
    assert yaml.safe_load(Path(found["recipe"]).read_text())["data"]["tokenizer"] == str(pad)
    assert "does not" in found["notes"][-2]
    model = open_clip.create_model(f"local-dir:{where}").eval()
    with torch.no_grad():
        expected = model.encode_text(torch.tensor([[1, 4, 5] + [0] * 13]))
    assert (treering.load(out).encode_text("a dog") - expected).abs().max() < 1e-5
    assert (treering.load(where, tokenizer=str(pad)).encode_text("a dog") - expected).abs().max() < 1e-5
    export_commit(found["commit"], "open_clip", tmp_path / "back")
    text = json.loads((tmp_path / "back/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["hf_tokenizer_name"], text["tokenizer_kwargs"]) == ("bert-base-uncased", {"strip_sep_token": True})
    clip = published(open_clip, tmp_path / "clip", "ViT-B-32")
    with pytest.raises(InterchangeError, match="reads CLIP's tokens; leave --tokenizer"):
        import_weights(f"open_clip:local-dir:{clip}", str(tmp_path / "no"), None, str(pad))


def test_a_model_that_open_clip_cannot_hold_is_refused_with_every_reason(tmp_path: Path) -> None:
    tiny = [
        "data.batch=8",
        "model={embed_dim: 8, image: {width: 16, depth: 1, heads: 2, patch: 12, resolution: 24}, text: {width: 8, "
        "depth: 1, heads: 2, context: 16}, captioner: {depth: 1}}",
        "stages=[{samples: 8}]",
        "schedule.warmup=0",
        "eval.suites=[]",
    ]
    assert train(read_recipe("emoji", tiny).recipe, tmp_path / "run").finished
    with pytest.raises(
        InterchangeError, match=r"class_token = false.*patch_bias = true.*cross_attention = inside.*16 channels"
    ):
        export_commit(str(tmp_path / "run"), "open_clip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert treering.load(tmp_path / "run").caption(torch.zeros(3, 24, 24, dtype=torch.uint8), longest=4)


def test_a_model_of_our_own_with_their_parts_goes_to_open_clip(open_clip: ModuleType, tmp_path: Path) -> None:
    """Trained here from nothing, with what docs/interchange.md says such a recipe needs."""
    own = [
        "data.batch=8",
        "model={embed_dim: 16, image: {width: 16, depth: 1, heads: 2, patch: 12, resolution: 24, class_token: true, "
        "pool: class, patch_bias: false}, text: {width: 16, depth: 1, heads: 2, context: 16}, captioner: {depth: 1, "
        "cross_attention: after}}",
        "stages=[{samples: 8}, {grow: {image.depth: 2, text.depth: 2, captioner.depth: 2}, samples: 8}]",
        "schedule.warmup=0",
        "eval.suites=[]",
    ]
    assert train(read_recipe("emoji", own).recipe, tmp_path / "run").finished
    export_commit(str(tmp_path / "run"), "open_clip", tmp_path / "out")
    model, ours = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval(), treering.load(tmp_path / "run")
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    normal = (pixels / 255 - ours.model.image_mean) / ours.model.image_std
    ids = ours.tokenizer.encode("a red circle", 16)
    with torch.no_grad():
        assert (model.encode_image(normal, False) - ours.encode_image(pixels)).abs().max() < 1e-5
        padded = torch.tensor([ids + [0] * (16 - len(ids))] * 2)
        assert (model.encode_text(padded, False) - ours.encode_text([ids, ids])).abs().max() < 1e-5
        logits = model(normal, padded, output_labels=False)["logits"][:, : len(ids)]
        output = ours.model(pixels, torch.tensor(ids * 2), torch.tensor([len(ids)] * 2))
        assert (output.caption @ ours.model.output_table.T - logits.flatten(0, 1)).abs().max() < 1e-5


def test_open_clip_weights_are_evaluated_as_if_they_had_been_imported(clip: Path, coca: Path, tmp_path: Path) -> None:
    for name, folder in (("clip", clip), ("coca", coca)):
        imported = import_weights(f"open_clip:local-dir:{folder}", str(tmp_path / name), None, None)
        truth = evaluate_commit(imported["commit"], ["retrieval"], None)
        found = evaluate_commit(f"open_clip:local-dir:{folder}", ["retrieval"], None)
        assert found["commit"] == f"open_clip:local-dir:{folder}"
        for figure in ("scores", "intervals", "chance", "sizes", "data"):
            assert found[figure] == truth[figure]


def test_kept_embeddings_are_of_the_very_weights(open_clip: ModuleType, tmp_path: Path) -> None:
    """Other weights under the same name have other scores."""
    where, found = published(open_clip, tmp_path / "clip", "ViT-B-32-quickgelu"), []
    for _ in range(2):
        found.append(evaluate_commit(f"open_clip:local-dir:{where}", ["geometry"], None)["scores"])
        state = load_file(where / "open_clip_model.safetensors")
        save_file(
            state | {"visual.proj": state["visual.proj"].flip(0).contiguous()}, where / "open_clip_model.safetensors"
        )
    assert found[0] != found[1]


def test_weights_with_another_tokenizer_are_to_be_imported_first(open_clip: ModuleType, tmp_path: Path) -> None:
    where = published(open_clip, tmp_path / "clip", "ViT-B-32-quickgelu")
    tree = json.loads((where / "open_clip_config.json").read_text())
    tree["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert-base-uncased"
    (where / "open_clip_config.json").write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match=r"uses the tokenizer bert-base-uncased; import it with its tokenizer\.json"):
        evaluate_commit(f"open_clip:local-dir:{where}", ["retrieval"], None)


def test_python_takes_pictures_as_they_are(coca: Path, tmp_path: Path) -> None:
    model = treering.load(coca)
    names = [str(tmp_path / "a.jpg"), tmp_path / "b.png"]
    for side, name in enumerate(names):
        picture(40 + 9 * side).save(name)
    rows = torch.stack([model.preprocess(name) for name in names])
    truth, said = model.encode_image(rows), model.caption(rows)
    opened = [Image.open(name) for name in names]
    read = [Path(name).read_bytes() for name in names]
    arrays = [np.asarray(each.convert("RGB")) for each in opened]
    for given in (names, tuple(names), opened, read, arrays, list(rows), [names[0], opened[1]]):
        assert torch.equal(model.encode_image(given), truth)
        assert model.caption(given) == said
    torch.testing.assert_close(model.encode_image(names[0]), truth[:1])  # another batch, other sums
    assert model.caption(opened[1]) == said[1:]
    with pytest.raises(ValueError, match="there is no picture"):
        model.caption([])
    with pytest.raises(ValueError, match="images are float32"):
        model.encode_image(rows.float())
    with pytest.raises(FileNotFoundError):
        model.encode_image(["none.jpg"])
    assert torch.equal(model.encode_image(Path(name) for name in names), truth)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(BadSample, match=r"notes.txt': picture does not decode"):
        model.caption([tmp_path / "notes.txt"])
    with pytest.raises(ValueError, match="is a URL, and pictures are read from paths"):
        model.encode_image("https://example.org/a.jpg")
    for wrong in (None, 5, [None], {"a": 1}):
        with pytest.raises(ValueError, match=r"a picture is one of PIL, a path, bytes or uint8 \[H, W, 3\], not"):
            model.encode_image(wrong)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="is a file, and a commit is a folder"):
        treering.load(tmp_path / "notes.txt")
