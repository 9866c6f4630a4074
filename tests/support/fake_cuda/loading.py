"""Builds `guard.cpp` for the installed torch and loads it, before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def load() -> None:
    """Give a torch without CUDA a device that does nothing; a torch with CUDA has all that autograd asks for.

    Raises RuntimeError if torch is imported already, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the fake device must be loaded before torch is imported")
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch = Path(found.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        return
    guard = _built(torch)
    for library in (torch / "lib" / "libc10.so", torch / "lib" / "libtorch_cpu.so", guard):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _built(torch: Path) -> Path:
    """The shared library, built once for each torch and source."""
    key = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes() + str(torch).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"treering-fake-cuda-{os.getuid()}"
    guard = folder / f"{key[:16]}.so"
    if guard.exists():
        return guard
    found = compiler()
    if found is None:
        raise RuntimeError("the fake device needs a C++ compiler ($CXX or g++)")
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"{key[:16]}.{os.getpid()}"
    command = [found, "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{torch}/include", str(SOURCE), "-o", str(made)]
    subprocess.run([*command, f"-L{torch}/lib", "-lc10"], check=True)
    made.rename(guard)
    return guard
