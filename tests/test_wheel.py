"""The wheel: it has every file of the product and none of the tests, and works where there is no checkout.

It is installed into an environment of its own that sees the packages of this one but not what is installed from a
checkout, and runs in an empty folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from treering import __version__
from treering.tests.launch.conftest import TINY

ROOT = Path(__file__).parents[1]
PRODUCT = ("launch", "training", "models", "data", "slurm")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
Treering = Callable[..., "subprocess.CompletedProcess[str]"]


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
    """The command `treering` of an environment that has the wheel."""
    environment = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    # The packages here, by a path that is searched after the environment's own and whose .pth files (a checkout
    # installed with -e) are not read.
    (Path(site) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run(*PIP, "--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return environment / "bin" / "treering"


@pytest.fixture
def treering(installed: Path, tmp_path: Path) -> Treering:
    """Runs the installed command in an empty folder, without what leads to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return _run(str(installed), *arguments, cwd=tmp_path, env=environment | {"COLUMNS": "200"})

    return run


def _run(*command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **settings)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    found: subprocess.CompletedProcess[str] = done
    return found


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


def test_the_installed_command_knows_its_version_and_looks_at_the_machine(treering: Treering) -> None:
    assert treering("--version").stdout == f"treering {__version__}\n"
    assert "samples://emoji" in treering("doctor").stdout


def test_ten_steps_from_the_wheel(treering: Treering, tmp_path: Path, installed: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("samples: 32", "samples: 80"))
    treering("train", "tiny.yaml", "--processes", "2")
    assert '"step": 10,' in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
    where = "import treering; print(treering.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = _run(str(installed.with_name("python")), "-P", "-c", where, cwd=tmp_path, env=environment)
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1])
