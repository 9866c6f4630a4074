"""A run folder that no run wrote, with everything in it that a report can show; and a page, parsed."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from treering.training.report import write_report

BEGAN = 1_795_363_200.0  # 22 November 2026, 16:00 UTC
RECIPE = """\
name: emoji
seed: 0
data:
  train: [{source: 'samples://emoji', weight: 1.0}]
  batch: 256
model:
  embed_dim: 256
  image: {width: 192, depth: 4, heads: 3, mlp_ratio: 4.0, patch: 8, resolution: 64}
  text: {width: 192, depth: 3, heads: 3, mlp_ratio: 4.0, context: 64, vocabulary: 49408}
  captioner: {depth: 2}
objectives: {contrastive: {weight: 1.0}, caption: {weight: 2.0}}
stages:
  - {samples: 20000, grow: {}}
  - {samples: 40000, grow: {image.depth: 8, text.depth: 6}}
checkpoint: {to: 's3://ACCESS:SECRET@bucket/runs', every: [2min], keep: 3}
"""
NAMES = [
    "woman firefighter: dark skin tone",
    "man mage: light skin tone",
    "person in lotus position",
    "man cook: medium skin tone",
]


def picture(number: int) -> str:
    """A face, drawn, as an embedded PNG."""
    image = Image.new("RGB", (72, 72), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((6, 6, 66, 66), fill=["#f5c542", "#8a5a3b", "#f2d0b0", "#c58c5b"][number % 4])
    pen.ellipse((22, 26, 30, 36), fill="black")
    pen.ellipse((42, 26, 50, 36), fill="black")
    pen.arc((22, 30, 50, 54), 20, 160, fill="black", width=3)
    pen.rectangle((18, 4, 54, 14), fill=["#b33", "#339", "#393", "#eee"][number // 2 % 4])
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def scores_at(samples: int) -> dict[str, float]:
    share = samples / 60416
    return {
        "retrieval/image_to_text@1": 0.002 + 0.2137 * share,
        "retrieval/image_to_text@5": 0.008 + 0.4821 * share,
        "retrieval/image_to_text@10": 0.016 + 0.5973 * share,
        "retrieval/text_to_image@1": 0.002 + 0.1891 * share,
        "retrieval/text_to_image@5": 0.008 + 0.4512 * share,
        "retrieval/text_to_image@10": 0.016 + 0.5712 * share,
        "zero_shot/skin_tone": 0.2 + 0.5932 * share,
        "zero_shot/role": 0.04 + 0.5733 * share,
    }


CHANCE = dict(zip(scores_at(0), (0.0016, 0.0082, 0.0163, 0.0016, 0.0082, 0.0163, 0.2, 0.0417), strict=True))


def evaluation(step: int, samples: int, names: list[str] = NAMES) -> dict[str, Any]:
    """The evaluation file of a step."""
    retrieval = [
        {
            "key": f"k{n}",
            "image": picture(n),
            "caption": name,
            "nearest": [
                {"caption": other, "score": 0.41 - 0.06 * r, "correct": other == name}
                for r, other in enumerate([*names[n - 1 :], *names[: n - 1], "flag: Iceland"][: 3 if n % 4 == 3 else 5])
            ],
        }
        for n, name in enumerate(names * 2)
    ]
    captions = [
        {"key": f"k{n}", "image": picture(n), "true": [name, "alias " + name], "generated": f"{name[:4]} at {samples}"}
        for n, name in enumerate(names)
    ]
    return {
        "step": step,
        "samples": samples,
        "scores": scores_at(samples),
        "chance": CHANCE,
        "examples": {"retrieval": retrieval, "captions": captions},
    }


FLIPS = {"zero_shot/role": {"lost": 17, "won": 43, "queries": 612, "p_value": 0.00104}}


def lines_of_a_run() -> list[dict[str, Any]]:
    """Every line of a run of 236 steps that grew after 79 and was resumed on fewer processes after 150."""
    lines: list[dict[str, Any]] = []
    clock = BEGAN

    def add(event: str, step: int, passed: float, **more: Any) -> None:
        nonlocal clock
        clock += passed
        lines.append({"event": event, "step": step, "samples": step * 256, "time": clock, **more})

    start = {"imports": 3.1, "find": 0.2, "read": 0.4, "build": 1.3}
    add("start", 0, 5.0, world=2, hosts=["node-1"], device="cpu", commit=None, seconds=start, attempt=1)
    small, large = 10_240_512, 14_091_264
    for step in range(1, 237):
        grown = step > 79
        if step % 5 == 0 or step == 236:
            contrastive, caption = 5.5 * math.exp(-step / 90) + 0.9, 6.0 * math.exp(-step / 60) + 1.1
            wobble = 0.12 * math.sin(step * 1.7)
            add(
                "step",
                step,
                8.2 if grown else 5.1,
                stage=int(grown),
                loss=contrastive + 2 * caption + wobble,
                losses={"contrastive": contrastive + wobble, "caption": caption},
                lr=1e-3 * min(1, step / 8) * min(1.0, (241 - step) / 48),
                logit_scale=14 + step / 12,
                grad_norm=1.4 + math.cos(step) * 0.3,
                skipped=0,
                bad_samples=int(step > 60),
                samples_per_second=160.0 if grown else 255.0,
                data_wait=0.04,
                mfu=None,
                flops=3.1e11 * step,
                peak_memory=1_812_000_000,
                parameters=large if grown else small,
                seconds={"data": 0.3, "compute": 7.8 if grown else 4.7},
            )
        if step in (79, 158, 236):
            add(
                "eval",
                step,
                6.5,
                scores=scores_at(step * 256),
                chance=CHANCE,
                sizes={"retrieval": 612, "zero_shot/skin_tone": 5, "zero_shot/role": 24},
                seconds=6.5,
                **({"flips": FLIPS, "since": 20_224} if step > 79 else {}),
            )
        if step in (40, 60, 79, 110, 150, 190, 236):
            reason = {79: "growth", 236: "end"}.get(step, "interval")
            add(
                "commit",
                step,
                0.9,
                url=f"s3://ACCESS:SECRET@bucket/runs/emoji/commits/step-{step:09d}",
                bytes=170_000_000,
                seconds=0.8,
                reason=reason,
            )
        if step == 79:
            add(
                "grow",
                step,
                0.4,
                **{"from": {"image.depth": 4, "text.depth": 3}, "to": {"image.depth": 8, "text.depth": 6}},
                parameters_before=small,
                parameters_after=large,
                seconds=0.35,
                logit_difference=3.2e-7,
            )
        if step == 150:
            clock += 3600
            add(
                "resume",
                step,
                6.0,
                world=1,
                hosts=["node-2"],
                device="cpu",
                commit="step-000000150",
                seconds=start | {"read": 1.9},
                attempt=2,
            )
    add("end", 236, 0.1, seconds=400.0)
    return lines


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    evaluations: list[dict[str, Any]] = (),
    ledger: list[dict[str, Any]] = (),
    recipe: str = RECIPE,
) -> Path:  # type: ignore[assignment]
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in ledger))
    for e in evaluations:
        (folder / "evaluations" / f"step-{e['step']:09d}.json").write_text(json.dumps(e))
    return folder


def bad(reason: str, number: int) -> dict[str, Any]:
    return {
        "step": 61,
        "position": 15700 + number,
        "source": "samples://emoji",
        "shard": "emoji-00001.tar",
        "key": f"0{number}",
        "offset": 512,
        "reason": reason,
    }


class Page(HTMLParser):
    """Every element with its attributes, and all visible text."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source, self.elements, self.text, self.open = (
            text,
            list[tuple[str, dict[str, str | None]]](),
            "",
            list[str](),
        )
        self.style, self.rows = "", list[str]()
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("tr", "li"):
            self.rows.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if self.rows and ("tr" in self.open or "li" in self.open):
            self.rows[-1] += data + " "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, start: str) -> str:
        """The one row or list item whose text starts so, white space folded."""
        found = [" ".join(r.split()) for r in self.rows if " ".join(r.split()).startswith(start)]
        assert len(found) == 1, f"{start!r} starts {len(found)} rows"
        return found[0]


def page_of(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))
