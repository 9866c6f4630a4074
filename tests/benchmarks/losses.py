"""What the contrastive loss over all pairs costs: memory over ranks, and memory and time of one large batch.

    python -m tests.benchmarks.losses [--quick] [--json]

Two questions, each asked of Treering's tiled losses and of open_clip's `ClipLoss`:

- *Saved for the backward pass* at 512 pairs a rank and 512 channels, on 1, 2, 4 and 8 gloo ranks: bytes of the distinct
  tensor storages that autograd keeps, on rank 0. `memory_over_open_clip_w8` is against the flags of open_clip that need
  least (local_loss, gather_with_grad); its default flags need more, and are in the table.
- *Peak memory and time* of forward and backward over one batch in one process, 32,768 pairs (8,192 with `--quick`), in
  turns; the least time of the rounds counts. open_clip makes all logits of the batch: it is the dense reference.
  On a CPU one thread computes, and its processor time is taken: a busy machine does not change it. Peak is what the
  process (on a GPU: the allocator) held at most beyond what it held before, gradients included.

Losses and gradients of both are compared before anything is printed. The default needs 20 GB of free memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from torch import Tensor

from treering.models.interchange.open_clip_import import import_open_clip
from treering.training.device import device_name
from treering.training.objectives.pairwise import sigmoid_losses, softmax_losses
from treering.training.objectives.scores import Relations
from treering.training.world import World

PAIRS_A_RANK, CHANNELS, SCALE = 512, 512, 14.3
WORLDS = (1, 2, 4, 8)
LARGE, LARGE_QUICK = 32_768, 8_192
DENSE_BYTES = 18
"""of memory for each pair of pairs: four fp32 matrices, and room"""
MIB = 1 << 20
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(image_be, text_be, scale, ids_bg) -> this rank's loss"""


def ours(world: World) -> Loss:
    """As the contrastive objective calls it, with the ids that exclude duplicates."""

    def loss(image_be: Tensor, text_be: Tensor, scale: Tensor, ids_bg: Tensor) -> Tensor:
        image_losses_b, text_losses_b = softmax_losses(image_be, text_be, scale, Relations.of(ids_bg), world)
        return (image_losses_b + text_losses_b).sum() / (2 * len(image_be) * world.size)

    return loss


def ours_sigmoid(world: World) -> Loss:
    """The sigmoid objective's."""

    def loss(image_be: Tensor, text_be: Tensor, scale: Tensor, ids_bg: Tensor) -> Tensor:
        bias = torch.full_like(scale, -10.0).requires_grad_()
        return sigmoid_losses(image_be, text_be, scale, bias, Relations.of(ids_bg), world).sum() / (
            len(image_be) * world.size
        )

    return loss


def open_clip_loss(world: World, **flags: bool) -> Loss:
    """open_clip's softmax loss."""
    import_open_clip()
    from open_clip.loss import ClipLoss

    module = ClipLoss(rank=world.rank, world_size=world.size, **flags)
    return lambda image_be, text_be, scale, ids_bg: module(image_be, text_be, scale)


def features(pairs: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaves: unit features in which a text resembles its image, the scale, and ids without duplicates."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(pairs, CHANNELS, generator=generator)
    texts = images + 3 * torch.randn(pairs, CHANNELS, generator=generator)
    sides = [torch.nn.functional.normalize(x, dim=1).to(device).requires_grad_() for x in (images, texts)]
    ids = torch.arange(2 * pairs, device=device).view(pairs, 2) + 2 * pairs * seed
    return sides[0], sides[1], torch.tensor([SCALE], device=device, requires_grad=True), ids


# Over ranks


def saved_bytes(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(*inputs).backward()
    return sum(storages.values())


def one_rank(rank: int, size: int, port: int, results: Queue[dict[str, int]]) -> None:
    """What a rank of `over_ranks` runs; the first one's findings count."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = World.join()
    losses = {
        "ours": ours(world),
        "ours_sigmoid": ours_sigmoid(world),
        "open_clip_local": open_clip_loss(world, local_loss=True, gather_with_grad=True),
        "open_clip_default": open_clip_loss(world),
    }
    inputs = features(PAIRS_A_RANK, rank, torch.device("cpu"))
    found = {name: saved_bytes(loss, inputs) for name, loss in losses.items()}
    if world.is_first:
        results.put(found)
    world.barrier()
    world.leave()


def over_ranks(size: int) -> dict[str, int]:
    """Saved bytes of rank 0 by loss, on `size` gloo ranks of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # torch and open_clip are imported once
    results: Queue[dict[str, int]] = context.Queue()
    ranks = [context.Process(target=one_rank, args=(rank, size, port, results)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        return results.get(timeout=300)
    finally:
        for process in ranks:
            process.join(10)
            if process.is_alive():
                process.kill()


# One large batch


def proc_bytes(file: str, field: str) -> int:
    """A line in kB of a file under /proc."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except FileNotFoundError:
        raise SystemExit("memory is read from /proc: run this on Linux, or on a GPU") from None
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """Bytes held at most while `work` ran, beyond those held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # else what an earlier loss freed serves this one, unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    before = proc_bytes("self/status", "VmRSS")
    work()
    return proc_bytes("self/status", "VmHWM") - before


def check_memory(pairs: int, device: torch.device) -> None:
    """Say so before the dense loss takes the machine down."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else proc_bytes("meminfo", "MemAvailable")
    needed = DENSE_BYTES * pairs**2
    if free < needed:
        raise SystemExit(
            f"the dense loss of {pairs:,} pairs needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free; "
            f"take a larger machine, or --quick"
        )


def one_batch(pairs: int, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Peak bytes, least seconds, loss and largest relative gradient difference of each loss."""
    check_memory(pairs, device)
    world = World(0, 1, device)
    losses = {"ours": ours(world), "ours_sigmoid": ours_sigmoid(world), "open_clip": open_clip_loss(world)}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    inputs = features(pairs, 0, device)
    leaves = inputs[:3]
    found: dict[str, dict[str, float]] = {name: {"seconds": float("inf"), "peak": 0.0} for name in losses}
    gradients: dict[str, list[Tensor]] = {}
    for _ in range(rounds):
        for name, loss in losses.items():
            for leaf in leaves:
                leaf.grad = None

            def work(name: str = name, loss: Loss = loss) -> None:
                begun = clock()
                value = loss(*inputs)
                value.backward()
                found[name]["loss"] = value.item()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                found[name]["seconds"] = min(found[name]["seconds"], clock() - begun)

            found[name]["peak"] = max(found[name]["peak"], peak_of(work, device))
            if name not in gradients:
                gradients[name] = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    difference = max(
        float((mine - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(gradients["ours"], gradients["open_clip"], strict=True)
    )
    if difference > 1e-4 or abs(found["ours"]["loss"] - found["open_clip"]["loss"]) > 1e-4:
        raise SystemExit(f"the losses do not agree: {found}; gradients differ by {difference:.2g}")
    found["ours"]["difference"] = difference
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*deprecated", category=FutureWarning)  # open_clip's gather
    open_clip_loss(World(0, 1, torch.device("cpu")))
    saved = {size: over_ranks(size) for size in WORLDS}  # before anything touches a GPU, which a fork does not survive
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs, rounds = (LARGE_QUICK, 1) if options.quick else (LARGE, 2)
    large = one_batch(pairs, rounds, device)
    figures = {f"saved_{name}_w{size}": float(count) for size in WORLDS for name, count in saved[size].items()}
    figures |= {f"{what}_{name}": value for name, one in large.items() for what, value in one.items()}
    figures |= {
        "pairs": float(pairs),
        "memory_w8_over_w1": saved[8]["ours"] / saved[1]["ours"],
        "memory_over_open_clip_w8": saved[8]["ours"] / saved[8]["open_clip_local"],
        "memory_over_open_clip_default_w8": saved[8]["ours"] / saved[8]["open_clip_default"],
        "memory_over_dense_32k": large["ours"]["peak"] / large["open_clip"]["peak"],
        "time_over_dense_32k": large["ours"]["seconds"] / large["open_clip"]["seconds"],
    }
    if options.quick:  # names say 32k: a smaller batch's figures get their own
        for name in ("memory_over_dense", "time_over_dense"):
            figures[f"{name}_8k"] = figures.pop(f"{name}_32k")
    if options.json:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "treering")}
        report = {"benchmark": "losses", "device": device_name(device), "versions": versions, "figures": figures}
        print(json.dumps(report))
        return
    print(f"saved for backward, MiB on rank 0 ({PAIRS_A_RANK} pairs a rank, {CHANNELS} channels, fp32)")
    print(f"{'':20}" + "".join(f"{f'{size} ranks':>10}" for size in WORLDS))
    for name in saved[1]:
        print(f"{name:20}" + "".join(f"{saved[size][name] / MIB:10.2f}" for size in WORLDS))
    print(f"\nforward and backward over {pairs:,} pairs in one process on {device_name(device)}")
    print(f"{'':20}{'peak MiB':>10}{'of dense':>10}{'seconds':>10}{'of dense':>10}")
    dense = large["open_clip"]
    for name, one in large.items():
        memory, slower = one["peak"] / dense["peak"], one["seconds"] / dense["seconds"]
        print(f"{name:20}{one['peak'] / MIB:10.0f}{memory:10.3f}{one['seconds']:10.2f}{slower:10.3f}")
    print(f"ours and open_clip: losses {large['ours']['loss']:.6f} and {dense['loss']:.6f}, ", end="")
    print(f"gradients differ by at most {large['ours']['difference']:.1e} of the largest")


if __name__ == "__main__":
    main()
