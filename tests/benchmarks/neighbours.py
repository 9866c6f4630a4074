"""How many samples of a batch are neighbours in their shard, and what each order reads from a store.

    python -m tests.benchmarks.neighbours [--quick] [--json]

A source of ten million samples in 1,000 shards, on eight nodes of eight processes. Before: a shuffle window of 131,072
samples whatever the batch; now: the default. Reads are counted by a cache of blocks like that of a node, least recently
used out first, over a whole pass of one node.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict

import numpy as np

from treering.data.order import Mixture, Order, default_window

SHARDS, EACH = 1000, 10_000
NODES, PROCESSES = 8, 8
SAMPLE, BLOCK, LIMIT = 50_000, 8 << 20, 50 * 10**9
"""bytes of a sample, of a block, and of a node's cache"""
BEFORE = 131_072


def order(batch: int, window: int) -> Order:
    """The order of the source."""
    return Order(0, [np.full(SHARDS, EACH)], [Mixture(0, (1.0,))], batch, window)


def neighbours(batch: int, window: int, steps: int) -> float:
    """The fraction of samples of a batch with another one at most five places further on."""
    found = order(batch, window)
    last = SHARDS * EACH // batch - 1
    numbers = (np.sort(found.places(step).number) for step in np.linspace(2, last, steps).astype(int).tolist())
    return float(np.mean([(np.diff(each) <= 5).mean() for each in numbers]))


def blocks_read(batch: int, window: int, part: float) -> float:
    """Bytes that one node reads in a `part` of a pass, as a multiple of those of its samples."""
    found, cache, misses, samples = order(batch, window), OrderedDict[int, None](), 0, 0
    for step in range(int(SHARDS * EACH // batch * part)):
        numbers = np.concatenate([found.places(step, rank, NODES * PROCESSES).number for rank in range(PROCESSES)])
        samples += len(numbers)
        for block in (numbers * SAMPLE // BLOCK).tolist():
            if block in cache:
                cache.move_to_end(block)
                continue
            misses += 1
            cache[block] = None
            if len(cache) > LIMIT // BLOCK:
                cache.popitem(last=False)
    return misses * BLOCK / (samples * SAMPLE)


def measure(quick: bool) -> dict[str, float]:
    """All figures."""
    figures = {}
    for batch in (4_096, 32_768):
        uniform = 1 - (1 - 5 / (SHARDS * EACH)) ** batch
        figures[f"uniform_{batch}"] = uniform
        for name, window in (("before", BEFORE), ("now", default_window(batch))):
            figures[f"neighbours_{name}_{batch}"] = neighbours(batch, window, 3 if quick else 20)
            figures[f"reads_{name}_{batch}"] = blocks_read(batch, window, 0.05 if quick else 1.0)
    return figures


def main() -> None:
    """Print the figures."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--quick", action="store_true")
    words.add_argument("--json", action="store_true")
    given = words.parse_args()
    figures = measure(given.quick)
    if given.json:
        print(json.dumps({"benchmark": "neighbours", "device": "none", "versions": {}, "figures": figures}))
        return
    print(f"{'batch':>8} {'':8} {'window':>10} {'neighbours':>11} {'reads':>7}")
    for batch in (4_096, 32_768):
        for name, window in (("before", BEFORE), ("now", default_window(batch))):
            near, read = figures[f"neighbours_{name}_{batch}"], figures[f"reads_{name}_{batch}"]
            print(f"{batch:8,} {name:8} {window:10,} {near:11.1%} {read:7.3f}")
        print(f"{batch:8,} {'uniform':8} {'':10} {figures[f'uniform_{batch}']:11.1%}")


if __name__ == "__main__":
    main()
