"""TensorBoard output of a run: the figures of metrics.jsonl, pictures with their captions, and generated captions.

The x axis is samples seen, so that runs with different batch sizes are comparable. Scalars are grouped by topic: loss,
optimizer, speed, model, data, eval. Everything here is also in the run folder's records; these files are never read
back.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import readable
from ..report.readable import decimal, is_number, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_GROUPS = {
    "loss": "loss/total",
    "logit_scale": "loss/logit_scale",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "skipped": "optimizer/skipped_steps",
    "samples_per_second": "speed/samples_per_second",
    "data_wait": "speed/data_wait",
    "caption_length": "data/caption_length",
    "captions_cut": "data/captions_cut",
    "mfu": "speed/mfu",
    "flops": "speed/flops",
    "peak_memory": "speed/peak_memory",
    "parameters": "model/parameters",
    "bad_samples": "data/bad_samples",
}
_COMPARED = ("seed", "model", "objectives", "optimizer", "schedule", "engine", "stages")
_PICTURE = 96  # px, side of a picture in a strip
_STRIP = 480  # px, width of a strip: picture and captions


class TensorBoardLog:
    """Writes to `folder`. `purge_step`: samples seen at a resume; later figures of the previous attempt are hidden."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Write one `step` line of metrics.jsonl; figures that are null are skipped."""
        named = {_GROUPS[key]: value for key, value in line.items() if key in _GROUPS}
        named |= {f"loss/{name}": value for name, value in (line.get("losses") or {}).items()}
        named |= {f"gradient/{name}": value for name, value in (line.get("gradient_norms") or {}).items()}
        named |= {f"data/passes/{printable(name)}": value for name, value in (line.get("passes") or {}).items()}
        self._add(named, line["samples"])

    def growth(self, line: Mapping[str, Any]) -> None:
        """Write one `grow` line: a step in the number of parameters, and a text with the sizes that changed."""
        samples = line["samples"]
        self._add({"model/parameters": line.get("parameters_before")}, samples)
        self._add({"model/parameters": line.get("parameters_after")}, samples)
        before = line.get("from") or {}
        changes = [f"{key} {before.get(key)} → {value}" for key, value in (line.get("to") or {}).items()]
        self._writer.add_text("model/growth", _plain(", ".join(changes)), samples)

    def evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Write an evaluation in the form of `evaluations/step-N.json`: scores, retrieval strips, generated
        captions."""
        samples = evaluation["samples"]
        self._add({f"eval/{key}": value for key, value in (evaluation.get("scores") or {}).items()}, samples)
        held_out = evaluation.get("held_out") or {}
        losses = {"total": held_out.get("loss"), **(held_out.get("losses") or {})}
        self._add({f"held_out/{name}": value for name, value in losses.items()}, samples)
        examples = evaluation.get("examples") or {}
        for number, example in enumerate(examples.get("retrieval") or []):
            self._picture(f"retrieval/{number:02d}", example, _nearest(example), samples)
        captions = examples.get("captions") or []
        for number, example in enumerate(captions):
            lines = [
                f"generated: {example.get('generated', '')}",
                *(f"true: {text}" for text in example.get("true") or []),
            ]
            self._picture(f"captions/{number:02d}", example, lines, samples)
        if captions:
            self._writer.add_text("captions", _table(captions), samples)
        self._writer.flush()

    def points(self, rows: Tensor, names: Iterable[str], samples: int) -> None:
        """Write unit embeddings [k, e] for the projector; set its distance to cosine."""
        labels = [" ".join(printable(name).split()) for name in names]
        self._writer.add_embedding(rows, metadata=labels, global_step=samples, tag="pairs")

    def end(self, recipe: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write the hyperparameters (recipe blocks that affect the result) and the last scores, to compare runs by."""
        blocks = {name: recipe.get(name) for name in _COMPARED}
        values = {path: value for path, value in _leaves(blocks) if isinstance(value, bool | int | float | str)}
        self._writer.add_hparams(
            values, {f"eval/{key}": value for key, value in scores.items() if is_number(value)}, run_name="."
        )

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _add(self, named: Mapping[str, Any], samples: int) -> None:
        for tag, value in named.items():
            if is_number(value):
                self._writer.add_scalar(tag, value, samples)

    def _picture(self, tag: str, example: Mapping[str, Any], lines: Iterable[str], samples: int) -> None:
        strip = _strip(example.get("image"), lines)
        if strip is not None:
            self._writer.add_image(tag, strip, samples, dataformats="HWC")


def _nearest(example: Mapping[str, Any]) -> Iterator[str]:
    """The text lines next to a retrieval picture: the true caption and the nearest ones, with the right one marked."""
    yield f"true: {example.get('caption', '')}"
    for near in example.get("nearest") or []:
        mark = "=> " if near.get("correct") else "     "
        yield f"{mark}{decimal(readable.number(near.get('score')), 2)}  {near.get('caption', '')}"


def _strip(url: object, lines: Iterable[str]) -> NDArray[np.uint8] | None:
    """A picture from a `data:` URL with text next to it, uint8 [height, 480, 3]; None if the URL is not such a
    picture."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    found = (
        re.fullmatch(r"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/]+=*)", url) if isinstance(url, str) else None
    )
    if not found:
        return None
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(found[1], validate=True))).convert("RGB")
    except (binascii.Error, OSError, Image.DecompressionBombError):
        return None
    picture.thumbnail((_PICTURE, _PICTURE))
    texts = [" ".join(printable(line)[:400].split("\n")) for line in lines]
    strip = Image.new("RGB", (_STRIP, max(_PICTURE, 17 * len(texts)) + 12), "white")
    strip.paste(picture, (6 + (_PICTURE - picture.width) // 2, 6 + (_PICTURE - picture.height) // 2))
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(size=13)
    for row, text in enumerate(texts):
        pen.text((_PICTURE + 18, 6 + 17 * row), text, fill="black", font=font)
    return np.asarray(strip)


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested objects and lists, by dotted path."""
    if isinstance(tree, Mapping | list):
        for key, branch in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _leaves(branch, f"{path}.{printable(key)}" if path else str(key))
    else:
        yield path, tree


def _table(captions: Iterable[Mapping[str, Any]]) -> str:
    """Generated and true captions as a Markdown table."""
    rows = [(e.get("key", ""), e.get("generated", ""), "; ".join(map(str, e.get("true") or []))) for e in captions]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    return "\n".join(["| key | generated | true |", "|---|---|---|", *lines])


def _plain(text: object) -> str:
    """`text` escaped for Markdown and HTML: all but letters, digits and spaces as entities."""
    folded = " ".join(printable(text).split())
    return "".join(c if c.isalnum() or c == " " or ord(c) > 127 else f"&#{ord(c)};" for c in folded)
