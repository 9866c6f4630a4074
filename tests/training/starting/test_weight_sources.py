"""Where weights are read from: names, files, downloads, and refusals that say what to do."""

from __future__ import annotations

import pickle
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from treering.data.samples import clip_tokenizer
from treering.launch.commands.eval import evaluate_commit
from treering.launch.commands.import_ import import_weights
from treering.launch.errors import RecipeError
from treering.models.interchange import architectures, open_clip_files
from treering.models.interchange.errors import InterchangeError
from treering.models.interchange.files import open_weights, read_state
from treering.tests.support.open_clip_models import sized


def with_architecture(monkeypatch: pytest.MonkeyPatch, name: str, **words: Any) -> None:
    """The architecture `name` at a small size, in place of its own."""
    config = sized(name)
    config["text_cfg"] |= words
    monkeypatch.setattr(architectures, "architectures", lambda: {name: config})


def test_files_by_the_name_of_the_architecture(
    open_clip: ModuleType, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .safetensors, a .pt with optimizer and epoch beside the weights, a tag that says how pictures are made."""
    with_architecture(monkeypatch, "ViT-B-32-quickgelu")
    state = load_file(clip / "open_clip_model.safetensors")
    trained = {"epoch": 3, "state_dict": {f"module.{k}": t for k, t in state.items()}, "optimizer": {"state": {}}}
    torch.save(trained, tmp_path / "epoch_3.pt")
    plain = open_weights(f"open_clip:ViT-B-32-quickgelu={clip}/open_clip_model.safetensors")
    checkpoint = open_weights(f"open_clip:ViT-B-32-quickgelu/openai={tmp_path}/epoch_3.pt")
    assert plain.spec == checkpoint.spec
    assert all(torch.equal(plain.tensors[key], checkpoint.tensors[key]) for key in plain.tensors)
    assert plain.spec.image.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": Hostile()}, tmp_path / "hostile.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    for name in ("hostile.pt", "bare.pt", "cut.safetensors"):
        with pytest.raises(InterchangeError, match="does not hold weights alone"):
            read_state(tmp_path / name)
    assert "it ran" not in capsys.readouterr().out
    torch.save([1], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(InterchangeError, match="does not hold a state dict"):
        read_state(tmp_path / "list.pt")
    with pytest.raises(InterchangeError, match="does not hold tensors by name"):
        read_state(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "open_clip:ViT-B-32",
            r"does not name weights; give open_clip:ViT-B-32/TAG with a tag \(openai, laion400m_e31",
        ),
        ("open_clip:ViT-B-32/laion9b", "no weights 'laion9b' of ViT-B-32; it has openai"),
        ("open_clip:ViT-B-32/openai", "was trained with QuickGELU; use open_clip:ViT-B-32-quickgelu/openai"),
        ("open_clip:ViT-B-16-SigLIP/webli", "its image tower is timm's"),
        ("open_clip:ViT-B-33/x", "no architecture 'ViT-B-33'"),
        (
            "open_clip:ViT-L-14-CLIPA=file.pt",
            "do not all preprocess pictures as CLIP does; .*ViT-L-14-CLIPA/datacomp1b=FILE",
        ),
        ("open_clip:ViT-B-32=/nowhere.pt", "/nowhere.pt does not exist"),
        ("open_clip:local-dir:/nowhere", "its open_clip_config.json cannot be read"),
        ("ViT-B-32", "cannot be imported; write open_clip:ARCHITECTURE/TAG"),
    ],
)
def test_sources_that_cannot_be_read(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((InterchangeError, RecipeError), match=message):
        import_weights(source, str(tmp_path / "out"), None, None)
    assert not (tmp_path / "out").exists()


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(entry: dict[str, Any]) -> str:
        raise FileNotFoundError(f"Failed to download {entry['hf_hub']}")

    monkeypatch.setattr(open_clip_files._tables(), "download_pretrained", offline)
    for cut_off, reason in ((False, "FileNotFoundError"), (True, "no network")):
        monkeypatch.setattr(open_clip_files, "_offline", lambda value=cut_off: value)
        with pytest.raises(
            InterchangeError, match=rf"downloaded \({reason}\).*CLIP-ViT-B-32-laion2B-s34B-b79K/ and name"
        ):
            open_weights("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_a_fetched_file_is_read(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_architecture(monkeypatch, "ViT-B-32-quickgelu")
    asked: list[dict[str, Any]] = []
    file = clip / "open_clip_model.safetensors"
    monkeypatch.setattr(open_clip_files, "_offline", lambda: False)
    monkeypatch.setattr(
        open_clip_files._tables(), "download_pretrained", lambda entry: (asked.append(entry), str(file))[1]
    )
    weights = open_weights("open_clip:ViT-B-32-quickgelu/OpenAI")
    assert weights.file == str(file)
    assert asked[0]["hf_hub"].startswith("timm/")


def test_without_a_network_what_was_fetched_earlier_serves(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_architecture(monkeypatch, "ViT-B-32-quickgelu")
    monkeypatch.setattr(open_clip_files, "_offline", lambda: True)
    repository, _, name = open_clip_files.published("ViT-B-32-quickgelu")["openai"]["hf_hub"].rpartition("/")
    kept = tmp_path / f"models--{repository.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("abc")
    (kept / "snapshots/abc").mkdir(parents=True)
    file = kept / "snapshots/abc" / (name or "open_clip_model.safetensors")
    file.write_bytes((clip / "open_clip_model.safetensors").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert open_weights("open_clip:ViT-B-32-quickgelu/openai").file == str(file)


def test_a_name_that_is_not_resolved_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unresolved(*arguments: Any) -> None:
        raise OSError("Name or service not known")

    for word in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", unresolved)
    assert open_clip_files._offline()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert not open_clip_files._offline()


def test_what_cannot_be_fetched_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_files, "_offline", lambda: True)
    with pytest.raises(InterchangeError, match=r"ViT-B-32/laion2b_s34b_b79k could not be downloaded \(no network\)"):
        evaluate_commit("open_clip:ViT-B-32/laion2b_s34b_b79k", ["retrieval"], None)


def test_the_installed_version_of_open_clip_is_one_that_was_tested() -> None:
    """Add it to `TESTED` when the whole suite has passed with it."""
    assert version("open_clip_torch") in open_clip_files.TESTED
    assert open_clip_files.version() == version("open_clip_torch")
    assert len(open_clip_files.architectures()) > 100
    assert open_clip_files.published("ViT-B-32")["openai"]["hf_hub"]
    assert clip_tokenizer._merges_file().is_relative_to(open_clip_files.package_folder())


def test_a_version_that_keeps_its_weights_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(open_clip_files._tables(), "_PRETRAINED")
    with pytest.raises(InterchangeError, match=r"keeps its published weights elsewhere than .*; install one of these"):
        open_clip_files.published("ViT-B-32")


def test_a_torch_file_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """Its parts are never compressed by torch; they are refused before they are unpacked."""
    import zipfile

    torch.save({"a": torch.zeros(4)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for name in good.namelist():
            bomb.writestr(name, bytes(3_000_000) if name.endswith("data.pkl") else good.read(name))
    assert read_state(tmp_path / "good.pt")["a"].tolist() == [0, 0, 0, 0]
    with pytest.raises(InterchangeError, match="a decompression bomb of 3,000,"):
        read_state(tmp_path / "bomb.pt")


@pytest.mark.parametrize("config", ["[" * 200_000, '{"model_cfg": ' + "[" * 200_000, "[]", '"x"', "\0"])
def test_a_folder_with_another_config_is_not_one_of_open_clip(config: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(config)
    with pytest.raises(InterchangeError, match=r"open_clip_config\.json cannot be read"):
        open_weights(f"open_clip:local-dir:{tmp_path}")


def test_a_lone_file_in_a_folder_is_read_whatever_its_name(clip: Path, tmp_path: Path) -> None:
    """As a training leaves it: a folder with one .pt, with a config beside it or the architecture named."""
    truth = open_weights(f"open_clip:local-dir:{clip}").tensors
    own = tmp_path / "own"
    own.mkdir()
    torch.save({"state_dict": load_file(clip / "open_clip_model.safetensors")}, own / "epoch_3.pt")
    (own / "open_clip_config.json").write_text((clip / "open_clip_config.json").read_text())
    found = open_weights(f"open_clip:local-dir:{own}").tensors
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    (own / "epoch_4.pt").write_bytes((own / "epoch_3.pt").read_bytes())
    with pytest.raises(InterchangeError, match=r"holds 2 files of weights \(epoch_3.pt, epoch_4.pt\); leave one"):
        open_weights(f"open_clip:local-dir:{own}")
    (own / "open_clip_config.json").unlink()
    with pytest.raises(InterchangeError, match=rf"name the architecture of the weights, open_clip:ARCHITECTURE={own}"):
        open_weights(f"open_clip:local-dir:{own}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InterchangeError, match=r"holds no file of weights; their names end in .safetensors, .pt"):
        open_weights(f"open_clip:ViT-B-32={tmp_path / 'empty'}")
    with pytest.raises(InterchangeError, match="for a model of your own give open_clip:local-dir:FOLDER"):
        open_weights("open_clip:MyModel/best")
