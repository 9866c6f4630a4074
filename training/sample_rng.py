"""Random numbers that belong to a sample: a function of seed, stream and the sample's number in the run.

Nothing is drawn one after another, so the world, micro-batches, resumes and replays cannot change what a sample gets.
The function is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), on the device, in int64 that wraps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.order import stable_hash

_GOLDEN, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SIGN = 1 << 63


def uniform(seed: int, name: str, numbers_b: Tensor, each: int = 1) -> Tensor:
    """`each` numbers in [0, 1) for every sample, float64 [b, each]; `numbers_b` is int64."""
    key = (stable_hash(seed, name) ^ _SIGN) - _SIGN  # as a signed number
    places = numbers_b[:, None] * each + torch.arange(each, device=numbers_b.device)
    mixed = _mix(_mix(places * _GOLDEN + key) + key)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as unsigned numbers do."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def kept(seed: int, name: str, numbers_b: Tensor, of: int, fraction: float) -> Tensor:
    """A fresh subset of 0 .. `of` - 1 for every sample, sorted, int64 [b, k]; k is `fraction` of `of`, at least one."""
    ranks = uniform(seed, name, numbers_b, of).argsort(1)
    return ranks[:, : count_of(of, fraction)].sort(1).values


def count_of(of: int, fraction: float) -> int:
    """The number of items in a `fraction` of `of` items, at least one."""
    return max(1, round(of * fraction))
