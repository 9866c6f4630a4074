"""`treering export`: a commit's weights as one file, with the model's spec and the lineage beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .errors import RecipeError, clean, show

FORMATS = ("safetensors",)


def export_commit(url: str, to: str, out: Path, weights: str | None = None) -> dict[str, Any]:
    """Write the commit at `url` (or the newest one of a run folder) into the new folder `out`, whole or not at all.

    `weights` is model or ema; None takes the average if the commit holds one, as evaluation does. Raises RecipeError,
    StoreError.
    """
    if to not in FORMATS:
        raise RecipeError(f"--to {show(to)} is no format; there is {', '.join(FORMATS)}")
    if weights not in (None, "model", "ema"):
        raise RecipeError(f"--weights {show(weights)} is not there; give model or ema")
    if out.exists():
        raise RecipeError(f"--out {show(str(out))} exists; give a new folder")
    from safetensors.torch import save_file

    from ..training.commits import find_commit

    commit = find_commit(url)
    manifest = commit.manifest
    averaged = any(part.kind == "ema" for part in manifest.parts)
    if weights == "ema" and not averaged:
        raise RecipeError(f"{clean(commit.url)} holds no average of the weights; give --weights model")
    kind = weights or ("ema" if averaged else "model")
    tensors = {path.partition("/")[2]: tensor for path, tensor in commit.tensors(kind).items()}
    spec = manifest.spec.model_dump(mode="json")
    state = manifest.state
    lineage = {
        "commit": commit.url,
        "weights": kind,
        "step": state.step,
        "samples": state.samples,
        "events": [event.model_dump(mode="json") for event in state.lineage],
        "recipe": manifest.recipe,
    }
    passing = out.with_name(f"{out.name}.partial")
    try:
        passing.mkdir(parents=True)
        # The spec inside as well: the file alone says what model it is of.
        save_file(tensors, passing / "model.safetensors", {"format": "pt", "spec": json.dumps(spec)})
        (passing / "spec.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
        (passing / "lineage.json").write_text(json.dumps(lineage, indent=1), encoding="utf-8")
        passing.rename(out)
    except FileExistsError:
        raise RecipeError(f"{show(str(passing))} is there from an export that was cut off; remove it") from None
    except BaseException:
        shutil.rmtree(passing, ignore_errors=True)
        raise
    return {
        "commit": commit.url,
        "weights": kind,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "model": str(out / "model.safetensors"),
        "spec": str(out / "spec.json"),
        "lineage": str(out / "lineage.json"),
    }
