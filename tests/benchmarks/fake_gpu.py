"""What a training step asks of a GPU, counted on a device that holds nothing: no GPU is needed.

    python -m tests.benchmarks.fake_gpu [--quick] [--json] [--cases NAME,NAME] [--operators]

Each row is one whole step of the engine: calls that launch kernels, FLOPs of matrix products and attention in bf16 and
in fp32, bytes of all other calls, and what these take at best on an H200 (700 TFLOP/s of bf16 products, 48 of fp32,
4.0 TB/s, nothing overlapping; 6 us of the host a call). A step that waits for the device, or mixes devices, fails.
The second table is the contrastive loss alone, on one rank of W.

Times and MFU are estimates, and say which of two steps is better, not how long either takes.
"""

from __future__ import annotations

from treering.tests.support.fake_cuda import loading

loading.load()  # before anything imports torch

# ruff: noqa: E402
import argparse
import json
import logging

import torch

from treering.tests.support.fake_cuda.cases import TABLE, Figures, loss_measured, measured, objective
from treering.tests.support.fake_cuda.counting import Count

QUICK = ("b32_128", "emoji2")
WORLDS = ((1, 1024), (8, 1024), (8, 128), (64, 512), (256, 128), (512, 64), (1, 8192))
"""ranks, and pairs of each"""


def figures_of(name: str, found: Figures) -> dict[str, float]:
    """By the name of the case."""
    values = {
        "launches": float(found.launches),
        "bf16_tflop": found.bf16_flops / 1e12,
        "fp32_tflop": found.fp32_flops / 1e12,
        "other_gb": found.other_bytes / 1e9,
        "gpu_ms": found.gpu_ms,
        "host_ms": found.host_ms,
        "mfu": found.mfu,
    }
    return {f"{key}_{name}": value for key, value in values.items()}


def print_operators(count: Count) -> None:
    """The operators that touch most bytes, and those called most."""
    for key, touched in sorted(count.bytes.items(), key=lambda item: -item[1])[:16]:
        print(f"    {touched / 1e9:8.1f} GB {count.calls[key]:6d}  {key}")
    for key, calls in count.calls.most_common(12):
        print(f"    {count.bytes[key] / 1e9:8.1f} GB {calls:6d}  {key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK)} alone")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", help=f"of {', '.join(TABLE)}; commas between")
    parser.add_argument("--operators", action="store_true", help="under each row the operators that ask for most")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    figures: dict[str, float] = {}
    said = (lambda *words: None) if options.json else lambda *words: print(*words, flush=True)
    said("| case | pairs | launches | bf16 TFLOP | fp32 TFLOP | other bytes GB | GPU ms | host ms | MFU |")
    said("|---|---|---|---|---|---|---|---|---|")
    for name in options.cases.split(",") if options.cases else QUICK if options.quick else TABLE:
        case = TABLE[name]()
        found, count = measured(case)
        figures |= figures_of(name, found)
        times = f"{found.products_ms:.0f} + {found.gpu_ms - found.products_ms:.0f} = {found.gpu_ms:.0f}"
        said(
            f"| {case.title}{f', {case.tokens:.0f} tokens' if case.tokens > 50 else ''} | {case.pairs:,} | "
            f"{found.launches:,} | {found.bf16_flops / 1e12:.1f} | {found.fp32_flops / 1e12:.2f} | "
            f"{found.other_bytes / 1e9:.0f} | {times} | {found.host_ms:.0f} | {found.mfu:.0%} |"
        )
        if options.operators:
            print_operators(count)
    said("\n| ranks | pairs a rank | launches of the loss | collectives |\n|---|---|---|---|")
    for size, pairs in WORLDS:
        count = loss_measured(size, pairs, objective("contrastive"))
        collectives = sum(count.collectives.values())
        figures |= {
            f"loss_launches_w{size}_b{pairs}": count.launches,
            f"loss_collectives_w{size}_b{pairs}": collectives,
        }
        kinds = ", ".join(f"{calls} {name}" for name, calls in sorted(count.collectives.items()))
        said(f"| {size} | {pairs:,} | {count.launches:,} | {f'{collectives:,} ({kinds})' if kinds else '0'} |")
    if options.json:
        report = {
            "benchmark": "fake_gpu",
            "device": "none",
            "versions": {"torch": torch.__version__},
            "figures": figures,
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
