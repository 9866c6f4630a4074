"""The report of a run: one self-contained HTML page.

`reading` reads a run folder into a `RecordedRun`; `sections` and `history` compute the content of each part of the
page;
`charts` and `drawings` draw SVG; `page` renders page.html. `comparison_page` is the page that compares models, with the
plots of `forest`; `sweep_page` is that of a sweep. Nothing here imports torch, and the pages need no network.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ...data.storage.atomic_write import atomic_write


def write_report(folder: Path) -> Path:
    """Write `report.html` for the run or the sweep in `folder` and return its path.

    Works at any time during a run; the page is replaced atomically. If the run belongs to a sweep, the sweep's page is
    updated too. Raises ValueError if `folder` is neither a run nor a sweep.
    """
    from .page import render
    from .reading import read_run
    from .sweep_page import SWEEP_FILE, read_sweep, render_sweep

    if (folder / SWEEP_FILE).is_file():
        return _write(folder, render_sweep(folder.resolve().name, read_sweep(folder)))
    page = _write(folder, render(read_run(folder)))
    if (folder.absolute().parent / SWEEP_FILE).is_file():
        with contextlib.suppress(OSError, ValueError):  # a problem with the sweep's folder must not fail this run
            write_report(folder.absolute().parent)
    return page


def _write(folder: Path, page: str) -> Path:
    target = folder / "report.html"
    atomic_write(target, page)
    return target
