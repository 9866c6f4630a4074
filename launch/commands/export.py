"""`treering export`: writes a commit's weights for other programs, with the model's config and its lineage.

Format `safetensors` keeps our tensor names and our spec; format `open_clip` has open_clip's names, and the config from
which its `create_model` builds the model.
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
    """Write the commit at `url` (or the newest one of a run folder) into the new folder `out`, completely or not at
    all.

    `weights` is model or ema; None takes the average if the commit holds one, as evaluation does. Raises RecipeError,
    StoreError, and InterchangeError with every reason why open_clip cannot hold the model.
    """
    if to not in FORMATS:
        raise RecipeError(f"--to {show(to)} is not a known format; give {' or '.join(FORMATS)}")
    if weights not in (None, "model", "ema"):
        raise RecipeError(f"--weights {show(weights)} must be model or ema")
    if out.exists():
        raise RecipeError(f"--out {show(str(out))} exists; give a new folder")
    from safetensors.torch import save_file

    from ...training.checkpoint.commits import find_commit
    from ...training.logging.counting import counting, waiting

    commit = find_commit(url)
    manifest = commit.manifest
    averaged = any(part.kind == "ema" for part in manifest.parts)
    if weights == "ema" and not averaged:
        raise RecipeError(f"{safe_text(commit.url)} has no average of the weights; give --weights model")
    kind = weights or ("ema" if averaged else "model")
    config = _open_clip_config(manifest) if to == "open_clip" else {}  # raises before anything large is read
    with counting(f"{safe_text(commit.name)}: parts read") as progress:
        tensors = {path.partition("/")[2]: tensor for path, tensor in commit.tensors(kind, progress=progress).items()}
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
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.mkdir(parents=True)
        with waiting(f"writing {texts['model']}"):
            save_file(named, partial / texts["model"], metadata)
        (partial / texts["spec"]).write_text(json.dumps(config or manifest.spec.model_dump(mode="json"), indent=1))
        (partial / "lineage.json").write_text(json.dumps(lineage, indent=1), encoding="utf-8")
        partial.rename(out)
    except FileExistsError:
        raise RecipeError(f"{show(str(partial))} was left by an interrupted export; remove it") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {
        "commit": commit.url,
        "weights": kind,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        **{name: str(out / file) for name, file in texts.items()},
        "lineage": str(out / "lineage.json"),
    }


Files = tuple["dict[str, Tensor]", dict[str, str], dict[str, str]]
"""tensors, names of the weights file and the spec file, metadata of the weights file"""


def _own_files(manifest: Manifest, tensors: dict[str, Tensor]) -> Files:
    # The spec is also in the metadata, so that the file alone describes its model.
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
            f"this model uses the tokenizer {show(tokenizer)}; open_clip takes CLIP's, or one on the Hugging Face hub "
            f"by its name, which is not known here; export --to safetensors"
        )
    image = manifest.spec.image
    pictures = {
        "mean": image.mean,
        "std": image.std,
        "interpolation": image.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[image.resize],
    }
    return {"model_cfg": config_of(manifest.spec, words), "preprocess_cfg": pictures}
