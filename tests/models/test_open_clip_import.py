"""open_clip is imported whatever build of torchvision lies beside torch; `treering doctor` says when to help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from treering.launch.commands import doctor
from treering.models.interchange import open_clip_import
from treering.models.interchange.errors import InterchangeError


def python(words: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process, which looks for packages in `folders` first."""
    before = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n"
    return subprocess.run([sys.executable, "-c", before + words], capture_output=True, text=True, timeout=250)


def test_scripts_get_open_clip() -> None:
    """The model runs, so its transforms and its layers were there."""
    words = (
        "import treering\nopen_clip = treering.import_open_clip()\nassert treering.import_open_clip() is open_clip\n"
        "import open_clip as again\nassert again is open_clip\n"
        "assert open_clip.tokenize(['a cat']).shape == (1, 77)\nprint(open_clip.__version__)"
    )
    done = python(words)
    assert done.returncode == 0, done.stderr


def test_a_library_that_loads_is_used(tmp_path: Path) -> None:
    """Operators are named only where the compiled ones are not there: two definitions would be an error."""
    for kind, library in (("loads", b""), ("broken", b"no library")):
        package = tmp_path / kind / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "_C.so").write_bytes(library)
    words = (
        "import torch\nfrom treering.models.interchange import open_clip_import as module\nloaded = []\n"
        "real = torch.ops.load_library\n"
        "def load(path):\n    loaded.append(path)\n    return None if '/loads/' in path else real(path)\n"
        "torch.ops.load_library = load\nmodule._named_operators()\nassert len(loaded) == 1\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))"
    )
    for kind, named in (("loads", "False"), ("broken", "True")):
        done = python(words, tmp_path / kind)
        assert done.stdout.strip() == named, done.stderr


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip_import.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InterchangeError, match="not installed; run `pip install open_clip_torch`"):
        open_clip_import.import_open_clip()


@pytest.mark.parametrize(
    ("code", "error", "state", "said"),
    [
        (0, "", "ok", ""),
        (1, "RuntimeError: operator torchvision::nms does not exist\n", "note", "treering.import_open_clip()"),
        (1, "ImportError: cannot import name 'timm'\n", "note", "pip check"),
        (-9, "", "note", "pip check"),
    ],
)
def test_doctor_tries_it(code: int, error: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], code, "", error)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *arguments, **words: done)
    check = doctor._open_clip()
    assert check.state == state
    assert said in check.remedy
