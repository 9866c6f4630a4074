"""The page of docs/benchmarks that train_step writes, from whatever figures there are so far."""

from __future__ import annotations

Figures = dict[str, float]
"""by their names in the report"""
Failures = dict[str, str]
"""why an entry has no figures"""

_TITLES = {"full_context": "ViT-B/32, full context", "coca_b32": "CoCa ViT-B/32"}
_PAGE = """# The training step on a GPU: ours and open_clip's

**What.** Forward, losses, backward, clipping and AdamW of one batch in bf16 under autocast, by Treering's engine and by
open_clip's own model, loss and optimizer, from the same weights on the same batch, in turns in one process; as
[on a CPU](train_step.md), which says how the two are made one function.

**Device.** {device}. **Versions.** {versions}. **Commit.** the one before this file. **Command.**
`{command}` ({minutes:.1f} minutes)

| model | batch | caption tokens | samples/s, ours | open_clip | ratio | MFU | peak MiB, ours | open_clip | agree to |
|---|---|---|---|---|---|---|---|---|---|
{rows}

{beside}**What it means.** The goals were a ratio of 2 and an MFU of 50% for B/16 and L/14; MFU counts what our
step has to compute, without padding and without what the last text block leaves out, against the dense bf16 peak.

**What was not measured.** More than one GPU.{failures}
"""


def page(figures: Figures, failures: Failures, device: str, versions: dict[str, str], command: str) -> str:
    """The figures of a GPU as a page."""
    labels = [key.removeprefix("ratio_") for key in figures if key.startswith("ratio_")]
    missing = "".join(f" {entry}: {why}." for entry, why in failures.items())
    return _PAGE.format(
        device=device,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        command=command,
        rows="\n".join(_row(label, figures) for label in labels),
        beside="".join(f"{line}\n\n" for line in _beside(figures)),
        minutes=figures.get("minutes", 0.0),
        failures=missing,
    )


def _row(label: str, figures: Figures) -> str:
    keys = ("batch", "tokens", "ratio", "difference", "mfu")
    of = {key: figures[f"{key}_{label}"] for key in keys if f"{key}_{label}" in figures}
    who = ("ours", "open_clip")
    ours, theirs = ((figures[f"samples_per_second_{w}_{label}"], figures[f"peak_mib_{w}_{label}"]) for w in who)
    mfu = f"{of['mfu']:.1%}" if "mfu" in of else "-"
    return (
        f"| {_TITLES.get(label, label)} | {of['batch']:.0f} | {of['tokens']:.1f} | {ours[0]:,.0f} | {theirs[0]:,.0f} | "
        f"{of['ratio']:.2f} | {mfu} | {ours[1]:,.0f} | {theirs[1]:,.0f} | {of['difference']:.1e} |"
    )


def _beside(figures: Figures) -> list[str]:
    """What was asked beside the steps, in sentences."""
    lines = []
    if "largest_batch_b32" in figures:
        clip, coca = figures["largest_batch_b32"], figures["largest_batch_coca_b32"]
        lines.append(
            f"The largest batch, by doubling until the memory is full: {clip:,.0f} pairs for CLIP B/32, {coca:,.0f} "
            f"for CoCa B/32, 1/{clip / max(coca, 1):.0f} (the goal was 1/2)."
        )
    if "waits" in figures:
        lines.append("Three steps of B/32 asked the device for nothing (`set_sync_debug_mode` raises otherwise).")
    if "equal_bits_deterministic" in figures:
        lines.append(
            f"Of weights and moments after two equal steps of B/32 {figures['equal_bits_as_they_come']:.4%} had equal "
            f"bits, with `engine.deterministic` {figures['equal_bits_deterministic']:.4%}, where a step takes "
            f"{figures['deterministic_over_as_they_come']:.2f} times as long."
        )
    if "commit_stall" in figures:
        lines.append(
            f"A commit of {figures['commit_bytes'] / 1e9:.1f} GB to a local folder stops training for "
            f"{figures['commit_stall']:.3f} s, the first, which makes the pinned memory, for "
            f"{figures['commit_stall_first']:.3f} s."
        )
    if "loop_samples_per_second" in figures:
        lines.append(
            f"With the loader in the loop, {figures['loop_workers']:.0f} decoding processes: "
            f"{figures['loop_samples_per_second']:,.0f} samples/s of B/32, {figures['loop_waited']:.0%} of the time "
            f"waiting for pictures."
        )
    return lines
