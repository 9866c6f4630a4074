"""The report of a run: one self-contained HTML page that a person reads.

`reading` turns a run folder into a `Run`; `sections` and `history` say what each part of the page shows; `charts` and
`drawings` draw it as SVG; `page` sets it into page.html. `comparison` is the page of several models, with the plots of
`forest`; `sweep` that of the runs of a sweep. Nothing here needs torch, and the pages need no network.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ...data.storage.atomic_write import atomic_write


def write_report(folder: Path) -> Path:
    """Write `report.html` for the run or the sweep in `folder` and return its path.

    Works at any time of a run; the page is replaced in one piece. The page of the sweep that a run belongs to is
    written anew with its own. Raises ValueError if `folder` is neither.
    """
    from .page import render
    from .reading import read_run
    from .sweep_page import SWEEP_FILE, read_sweep, render_sweep

    if (folder / SWEEP_FILE).is_file():
        return _write(folder, render_sweep(folder.resolve().name, read_sweep(folder)))
    page = _write(folder, render(read_run(folder)))
    if (folder.absolute().parent / SWEEP_FILE).is_file():
        with contextlib.suppress(OSError, ValueError):  # what is wrong there is no fault of this run
            write_report(folder.absolute().parent)
    return page


def _write(folder: Path, page: str) -> Path:
    target = folder / "report.html"
    atomic_write(target, page)
    return target
