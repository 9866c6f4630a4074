"""What a training step costs: Treering's and open_clip's own model, loss and optimizer, in turns in one process.

    python -m tests.benchmarks.train_step [--quick] [--json] [--data FOLDER] [--models NAME,NAME] [--page FILE]

Both start from the same weights and see the same pictures and captions; the losses, and the norms of the gradients, are
compared before anything is timed. Each step is forward, loss, backward, clipping at norm 1 and AdamW. On a CPU one
thread computes in fp32 and its processor time is taken: a busy machine does not change it. On a GPU both compute in
bf16 under autocast. A ratio is the median over rounds of theirs over ours within a round.

FOLDER holds photos and a captions.tsv (file, tab, caption); they are repeated where a batch has more. Without it
pictures are noise and captions are made of the lengths of human ones; what is read of a caption is how many tokens it
has, and the mean is printed beside each figure. `full_context` repeats captions until they fill the 77 tokens that
open_clip pads all of them to.

Models are those of open_clip's configs, as it ships them, and Treering's that `treering import` makes of them.
`coca_b32` is CoCa with both losses. A name with `:compiled` compiles both.

Beside models there are things to ask of the device: `waits`, `repeat` (equal bits), `commit` (the stall at 2 GB),
`loop` (the loader in the loop, with --data) and `largest`, the largest batch of B/32 and of CoCa B/32, ours, by
doubling until the memory is full. A GPU is asked all of it unless --models says what. What fails says so, and the next
is begun; nothing is begun after seven minutes, so that all of it should take less than ten. `--page
docs/benchmarks/h200.md` writes the page anew after every row.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treering.models.flops import training_flops
from treering.models.interchange.architectures import config_named, spec_of
from treering.models.interchange.open_clip_import import import_open_clip
from treering.models.interchange.weights import to_open_clip
from treering.models.model import Model
from treering.models.spec import ModelSpec
from treering.tests.benchmarks.beside_the_step import commit_stall, looped, repeat, waits
from treering.tests.benchmarks.losses import MIB, peak_of
from treering.tests.benchmarks.train_step_page import Failures, Figures, page
from treering.training.device import device_name, peak_flops
from treering.training.engines.config import DdpConfig
from treering.training.engines.ddp import DdpEngine
from treering.training.engines.optimizer import OptimizerConfig
from treering.training.objectives.base import Inputs, Objective
from treering.training.objectives.caption import CaptionLoss
from treering.training.objectives.contrastive import Contrastive
from treering.training.world import World

LARGEST = 32_768
"""pairs: where the search for the largest batch ends"""
DISTINCT = 256
"""pictures of noise; a batch repeats them"""
STALL_BYTES = 2_000_000_000
LIMIT = 420
"""seconds after which nothing new is begun"""
CONTEXT, LR = 77, 0.0
"""a rate of zero keeps the weights equal; the optimizer does all of its work"""


@dataclass(frozen=True)
class Case:
    """A model of open_clip's zoo by the name of its config, and pairs of a batch."""

    name: str
    batch_cpu: int
    batch_gpu: int

    @property
    def config(self) -> dict[str, Any]:
        """open_clip's."""
        return dict(config_named(self.name))

    @property
    def spec(self) -> ModelSpec:
        """The same for Treering."""
        return spec_of(self.config)

    def objectives(self) -> list[Objective]:
        """The losses of open_clip's recipe for it."""
        return [Contrastive(1.0), CaptionLoss(2.0)] if self.spec.captioner else [Contrastive(1.0)]


MODELS = {
    "s32": Case("ViT-S-32", 32, 2048),
    "b32": Case("ViT-B-32", 32, 1024),
    "b16": Case("ViT-B-16", 16, 512),
    "l14": Case("ViT-L-14", 4, 128),
    "coca_b32": Case("coca_ViT-B-32", 8, 256),
}


ASKED = ("waits", "repeat", "commit", "loop", "largest")
ON_GPU = "b32,waits,repeat,commit,b16,l14,coca_b32,loop,b32:compiled,largest,s32,b32:full"
"""the most wanted first"""


# Pictures and captions


def made_captions(count: int) -> list[list[int]]:
    """Token lists of the lengths of human captions: 14.3 on average, from 7 to 40."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(count, generator=generator) * 4.4 + 14.3).round().clamp(7, 40).int().tolist()
    words = torch.randint(300, 40_000, (count, CONTEXT), generator=generator).tolist()
    return [[49406, *row[: length - 2], 49407] for row, length in zip(words, lengths, strict=True)]


def real_pairs(folder: Path, count: int) -> tuple[Tensor, list[list[int]]]:
    """Photos, centre-cropped to 224, and the first caption of each."""
    import numpy as np
    from PIL import Image

    from treering.data.samples.clip_tokenizer import Tokenizer

    tokenizer, pictures, captions = Tokenizer(), [], {}
    for line in (folder / "captions.tsv").read_text(encoding="utf-8").splitlines():
        name, _, caption = line.partition("\t")
        if (folder / name).is_file():
            captions.setdefault(name, caption)
    for name in sorted(captions)[:count]:
        picture = Image.open(folder / name).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        cropped = picture.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        pictures.append(torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1))
    if not pictures:
        raise SystemExit(f"{folder} has no photos with captions; give another --data")
    chosen = [tokenizer.encode(captions[name], CONTEXT) for name in sorted(captions)[:count]]
    return torch.stack(pictures), chosen


def pairs(folder: Path | None, count: int, full: bool) -> tuple[Tensor, list[list[int]]]:
    """uint8 pictures [count, 3, 224, 224] and token lists; `full` ones fill the context."""
    if folder is not None:
        images, captions = real_pairs(folder, count)
    else:
        generator = torch.Generator().manual_seed(1)
        few = min(count, DISTINCT)  # noise takes seconds a thousand
        images = torch.randint(0, 256, (few, 3, 224, 224), dtype=torch.uint8, generator=generator)
        captions = made_captions(count)
    images = images[torch.arange(count) % len(images)]
    captions = [captions[number % len(captions)] for number in range(count)]
    if full:
        words = [caption[1:-1] * CONTEXT for caption in captions]
        captions = [[49406, *row[: CONTEXT - 2], 49407] for row in words]
    return images, captions


# The two steps


class Ours:
    """Treering's engine."""

    def __init__(self, case: Case, device: torch.device, compiled: bool = False, deterministic: bool = False) -> None:
        precision = "bf16" if device.type == "cuda" else "fp32"
        engine = DdpConfig(precision=precision, compile=compiled, deterministic=deterministic)
        self.device, world = device, World(0, 1, device)
        self.engine = DdpEngine(case.spec, case.objectives(), engine, OptimizerConfig(), world, seed=0)

    def prepare(self, images: Tensor, captions: list[list[int]]) -> None:
        tokens = torch.tensor([token for caption in captions for token in caption])
        lengths, own = torch.tensor([len(caption) for caption in captions]), torch.arange(len(captions))
        columns = [x.to(self.device) for x in (images, tokens, lengths, own, own)]
        self.inputs = Inputs(*columns, host_lengths=lengths)  # type: ignore[misc]

    def step(self) -> tuple[Tensor, Tensor]:
        result = self.engine.step(self.inputs, LR)
        return torch.stack([o.weight * result.losses[o.name] for o in self.engine.objectives]).sum(), result.grad_norm


class Theirs:
    """open_clip's model and loss, and the step of its training loop."""

    def __init__(self, case: Case, ours: Model, device: torch.device, compiled: bool = False) -> None:
        import_open_clip()
        import open_clip
        from open_clip.loss import ClipLoss, CoCaLoss

        config = {key: value for key, value in case.config.items() if key != "custom_text"}
        self.device, self.captioner, self.context = device, "multimodal_cfg" in config, case.spec.text.context
        self.model: Any = (open_clip.CoCa if self.captioner else open_clip.CLIP)(**config)
        self.model.load_state_dict(to_open_clip(ours.spec, ours.state_dict()))
        self.loss = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0) if self.captioner else ClipLoss()
        self.model.to(device).train()
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
        self.adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
        self.mean, self.std = ours.image_mean.to(device), ours.image_std.to(device)
        if compiled:
            self.model = torch.compile(self.model)

    def prepare(self, images: Tensor, captions: list[list[int]]) -> None:
        padded = torch.zeros(len(captions), self.context, dtype=torch.int64)
        for row, caption in zip(padded, captions, strict=True):
            row[: len(caption)] = torch.tensor(caption[: self.context])
        self.images = (images.to(self.device).float() / 255 - self.mean) / self.std
        self.tokens = padded.to(self.device)

    def step(self) -> tuple[Tensor, Tensor]:
        self.adam.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model(self.images, self.tokens)
            if self.captioner:
                names = ("image_features", "text_features", "logits", "labels", "logit_scale")
                loss = sum(self.loss(*(output[name] for name in names)))
            else:
                loss = self.loss(*output)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        return loss.detach(), norm


# Measuring


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Seconds a step."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = clock()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begun) / steps


def compared(name: str, folder: Path | None, rounds: int, how: str, device: torch.device) -> dict[str, float]:
    """Both steps on one batch; `how`: full (captions), compiled, or nothing."""
    case = MODELS[name]
    on_gpu, compiled = device.type == "cuda", how == "compiled"
    batch, spec = case.batch_gpu if on_gpu else case.batch_cpu, case.spec
    images, captions = pairs(folder, batch, how == "full")
    ours = Ours(case, device, compiled)
    theirs = Theirs(case, ours.engine.model.cpu(), device, compiled)
    ours.engine.model.to(device)
    both: dict[str, Ours | Theirs] = {"ours": ours, "open_clip": theirs}
    first = {}
    for who, one in both.items():
        one.prepare(images, captions)
        loss, norm = one.step()
        first[who] = loss.item(), norm.item()
    difference = max(abs(a / b - 1) for a, b in zip(first["ours"], first["open_clip"], strict=True))
    if difference > (2e-2 if on_gpu else 1e-3):
        raise ValueError(f"the steps do not agree: loss and gradient norm are {first}")
    peaks = {}
    for who, one in both.items():
        peaks[who] = peak_of(lambda one=one: one.step(), device)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {who: [] for who in both}
    for _ in range(rounds):
        for who, one in both.items():
            seconds[who].append(timed(one.step, device, 5 if on_gpu else 1))
    gc.collect()
    tokens = sum(map(len, captions)) / batch
    best = {who: min(values) for who, values in seconds.items()}
    peak = peak_flops(device)
    return {
        "tokens": tokens,
        "batch": float(batch),
        "ratio": statistics.median(b / a for a, b in zip(seconds["ours"], seconds["open_clip"], strict=True)),
        "difference": difference,
        **{f"samples_per_second_{who}": batch / value for who, value in best.items()},
        **{f"peak_mib_{who}": value / MIB for who, value in peaks.items()},
        **({"mfu": batch * training_flops(spec, tokens) / best["ours"] / peak} if peak else {}),
    }


def largest_batch(name: str, device: torch.device) -> int:
    """The largest power of two of pairs that a step of ours has the memory for."""
    ours, fits = Ours(MODELS[name], device), 0
    batch = 256
    while batch <= LARGEST:
        try:
            ours.prepare(*pairs(None, batch, False))
            timed(ours.step, device, 1)
        except torch.OutOfMemoryError:
            break
        fits, batch = batch, 2 * batch
    del ours
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def asked(entry: str, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """The figures of one entry of --models, by the names of the report."""
    name, _, how = entry.partition(":")
    whole = not options.quick and device.type == "cuda"
    case = MODELS["b32" if device.type == "cuda" else "s32"]
    if name == "largest":
        return {f"largest_batch_{one}": float(largest_batch(one, device)) for one in ("b32", "coca_b32")}
    if name == "commit":
        return commit_stall(device, STALL_BYTES if whole else STALL_BYTES // 100)
    if name in ("waits", "repeat", "loop"):
        ours = Ours(case, device)
        pairs_ = case.batch_gpu if whole else case.batch_cpu
        ours.prepare(*pairs(options.data, pairs_, False))
        if name == "waits":
            return waits(ours.engine, ours.inputs)
        if name == "repeat":
            return repeat(lambda exactly: Ours(case, device, deterministic=exactly).engine, ours.inputs)
        if options.data is None:
            raise ValueError("it needs photos; give --data")
        return looped(ours.engine, options.data, pairs_, 20 if whole else 2)
    label = {"": name, "full": "full_context" if name == "b32" else f"{name}_full"}.get(how, f"{name}_{how}")
    found = compared(name, options.data, 1 if options.quick else 3, how, device)
    return {f"{key}_{label}": value for key, value in found.items()}


def measured(
    entries: list[str], options: argparse.Namespace, device: torch.device, keep: Callable[[Figures, Failures], None]
) -> tuple[Figures, Failures]:
    """All figures, told as they come, and why entries have none; `keep` is given them after each."""
    begun, figures, failures = time.monotonic(), Figures(), Failures()
    said = print if not options.json else (lambda *words, **how: None)
    said(f"{device_name(device)}, {'bf16' if device.type == 'cuda' else 'fp32, one thread'}; ours and open_clip's")
    for entry in entries:
        if time.monotonic() - begun > LIMIT:
            failures[entry] = f"left out, {LIMIT} s are over"
        else:
            try:
                found = asked(entry, options, device)
                figures |= found
                said(f"{entry:14}" + ", ".join(f"{key} {value:,.4g}" for key, value in found.items()), flush=True)
            except Exception as error:  # whatever one fails with, the others are worth having
                failures[entry] = f"{type(error).__name__}: {error}".splitlines()[0]
        if entry in failures:
            said(f"{entry}: {failures[entry]}", flush=True)
        figures["minutes"] = (time.monotonic() - begun) / 60
        keep(figures, failures)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return figures, failures


def versions() -> dict[str, str]:
    """Of what is measured; a checkout on the path has none."""
    found = {}
    for name in ("torch", "open_clip_torch", "treering"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "a checkout"
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-S/32 and one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", type=Path, help="folder with photos and captions.tsv")
    parser.add_argument(
        "--models",
        help=f"of {', '.join(MODELS)}, each also with :full or :compiled, and {', '.join(ASKED)}; commas between",
    )
    parser.add_argument("--page", type=Path, help="write the figures there, as a page of docs/benchmarks")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "s32,b32,b32:full" if device.type == "cpu" else ON_GPU
    entries = (options.models or ("s32" if options.quick else default)).split(",")
    if unknown := [entry for entry in entries if not known(entry)]:
        parser.error(f"--models {unknown[0]} is not known; known are {', '.join((*MODELS, *ASKED))}")
    found = versions()
    given = "".join(f" --{name} {value}" for name in ("data", "models") if (value := getattr(options, name)))
    command = f"python -m tests.benchmarks.train_step{given} --page {options.page}"

    def keep(figures: Figures, failures: Failures) -> None:
        if options.page:
            options.page.parent.mkdir(parents=True, exist_ok=True)
            options.page.write_text(page(figures, failures, device_name(device), found, command), encoding="utf-8")

    figures, failures = measured(entries, options, device, keep)
    if options.json:
        report = {"benchmark": "train_step", "device": device_name(device), "versions": found, "figures": figures}
        print(json.dumps(report | {"failures": failures}))
    if failures and not figures.keys() - {"minutes"}:
        raise SystemExit("nothing was measured")


def known(entry: str) -> bool:
    """Whether an entry of --models is one."""
    name, _, how = entry.partition(":")
    return entry in ASKED or (name in MODELS and how in ("", "full", "compiled"))


if __name__ == "__main__":
    main()
