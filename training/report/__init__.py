"""The report of a run: one self-contained HTML page that a person reads.

`reading` turns a run folder into a `Run`; `sections` and `history` say what each part of the page shows; `charts` and
`drawings` draw it as SVG; `page` sets it into page.html. `comparison` is the page of several models, with the plots of
`forest`. Nothing here needs torch, and the pages need no network.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_report(run: Path) -> Path:
    """Write `report.html` for the run folder `run` and return its path.

    Works at any time of a run's life; the page is replaced in one piece. Raises ValueError if `run` is no run folder.
    """
    from .page import render
    from .reading import read_run

    page = render(read_run(run))
    target = run / "report.html"
    handle, temporary = tempfile.mkstemp(dir=run, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
