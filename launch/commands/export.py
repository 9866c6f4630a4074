"""`treering export`: a commit's weights for other programs, with what the model is and the lineage beside it.

As `safetensors` the tensors have our names, with our spec; as `open_clip` they have open_clip's, with the config that
its `create_model` builds the model from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, safe_text, show

if TYPE_CHECKING:
    from torch import Tensor

    from ...training.checkpoint.manifest import Manifest

FORMATS = ("safetensors", "open_clip")


def export_commit(url: str, to: str, out: Path, weights: str | None = None) -> dict[str, Any]:
    """Write the commit at `url` (or the newest one of a run folder) into the new folder `out`, whole or not at all.

    `weights` is model or ema; None takes the average if the commit holds one, as evaluation does. Raises RecipeError,
    StoreError, and InterchangeError with every reason why open_clip cannot hold the model.
    """
    if to not in FORMATS:
        raise RecipeError(f"--to {show(to)} is no format; there is {', '.join(FORMATS)}")
    if weights not in (None, "model", "ema"):
        raise RecipeError(f"--weights {show(weights)} is not there; give model or ema")
    if out.exists():
        raise RecipeError(f"--out {show(str(out))} exists; give a new folder")
    from safetensors.torch import save_file

    from ...training.checkpoint.commits import find_commit

    commit = find_commit(url)
    manifest = commit.manifest
    averaged = any(part.kind == "ema" for part in manifest.parts)
    if weights == "ema" and not averaged:
        raise RecipeError(f"{safe_text(commit.url)} holds no average of the weights; give --weights model")
    kind = weights or ("ema" if averaged else "model")
    config = _open_clip_config(manifest) if to == "open_clip" else {}  # refuses before anything large is read
    tensors = {path.partition("/")[2]: tensor for path, tensor in commit.tensors(kind).items()}
    state = manifest.state
    lineage = {
        "commit": commit.url,
        "weights": kind,
        "step": state.step,
        "samples": state.samples,
        "events": [event.model_dump(mode="json") for event in state.lineage],
        "recipe": manifest.recipe,
    }
    named, texts, metadata = _open_clip_files(manifest, tensors, config) if config else _own_files(manifest, tensors)
    passing = out.with_name(f"{out.name}.partial")
    try:
        passing.mkdir(parents=True)
        save_file(named, passing / texts["model"], metadata)
        (passing / texts["spec"]).write_text(json.dumps(config or manifest.spec.model_dump(mode="json"), indent=1))
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
        **{name: str(out / file) for name, file in texts.items()},
        "lineage": str(out / "lineage.json"),
    }


Files = tuple["dict[str, Tensor]", dict[str, str], dict[str, str]]
"""tensors, names of the files of weights and spec, metadata of the file of weights"""


def _own_files(manifest: Manifest, tensors: dict[str, Tensor]) -> Files:
    # The spec inside as well: the file alone says what model it is of.
    spec = json.dumps(manifest.spec.model_dump(mode="json"))
    return tensors, {"model": "model.safetensors", "spec": "spec.json"}, {"format": "pt", "spec": spec}


def _open_clip_files(manifest: Manifest, tensors: dict[str, Tensor], config: dict[str, Any]) -> Files:
    from ...models.interchange.weights import to_open_clip

    files = {"model": "open_clip_model.safetensors", "spec": "open_clip_config.json"}
    return to_open_clip(manifest.spec, tensors), files, {"format": "pt", "config": json.dumps(config)}


def _open_clip_config(manifest: Manifest) -> dict[str, Any]:
    """The open_clip_config.json of a commit's model. Raises InterchangeError, RecipeError."""
    from ...models.interchange.architectures import config_of
    from ...training.starting.import_weights import tokenizer_of

    words = tokenizer_of(manifest.state)
    tokenizer = manifest.recipe["data"]["tokenizer"]
    if tokenizer != "clip" and not words:
        raise RecipeError(
            f"this model reads the tokens of {show(tokenizer)}; open_clip takes CLIP's, or those of a model on the "
            f"Hugging Face hub by its name, which is not known here; export --to safetensors"
        )
    image = manifest.spec.image
    pictures = {
        "mean": image.mean,
        "std": image.std,
        "interpolation": image.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[image.resize],
    }
    return {"model_cfg": config_of(manifest.spec, words), "preprocess_cfg": pictures}
