"""When to grow: compares the loss's slope per FLOP with the slope expected of the next size.

The rule is that of Staged Training (Shen et al., arXiv 2203.06211): train a size as long as its loss falls faster per
FLOP than a larger size's would. The first slope is measured. The second follows from a power law: at compute-optimal
sizes the loss falls as C^-exponent in the FLOPs C spent (Kaplan et al., arXiv 2001.08361), and the optimal size grows
as the square root of C (Hoffmann et al., arXiv 2203.15556). A size with r times the FLOPs per sample is therefore
optimal at r^2 C, and until then the loss falls by

    expected = loss (1 - r^(-2 exponent)) / (C (r^2 - 1))   per FLOP.

The figures are those of `training.tally`, so the decision is the same at any world size and after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import expm1, fsum, log

from ...models.flops import training_flops
from ...models.spec import ModelSpec


@dataclass(frozen=True)
class Slopes:
    """The two slopes that the rule compares, in loss per FLOP; positive if the loss falls."""

    loss: float
    """mean over the window"""
    slope: float
    expected: float

    @property
    def flat(self) -> bool:
        """Whether it is time to grow."""
        return self.slope < self.expected

    def json(self) -> dict[str, float]:
        """As a plain object."""
        return asdict(self)


def slopes(
    window: Sequence[tuple[float, float]],
    spec: ModelSpec,
    following: ModelSpec,
    batch: int,
    spent: float,
    exponent: float,
) -> Slopes:
    """The slopes over a `window` of at least two steps: (loss, mean caption length in tokens) each.

    `spec` is the current size and `following` the next one; `spent` is the FLOPs of the run so far. The measured slope
    is that of the least-squares line through the losses of the window.
    """
    losses, lengths = [loss for loss, _ in window], [length for _, length in window]
    each = [batch * training_flops(spec, length) for length in lengths]
    flops = list(accumulate(each))
    mean, centre = fsum(losses) / len(window), fsum(flops) / len(window)
    rise = fsum((x - centre) * (y - mean) for x, y in zip(flops, losses, strict=True))
    slope = -rise / fsum((x - centre) ** 2 for x in flops)
    length = fsum(lengths) / len(lengths)
    return Slopes(
        mean, slope, expected(mean, spent, training_flops(following, length) / training_flops(spec, length), exponent)
    )


def expected(loss: float, spent: float, ratio: float, exponent: float) -> float:
    """Expected loss decrease per FLOP of a size with `ratio` times the FLOPs per sample, after `spent` FLOPs.

    A `ratio` of 1 or less gives the limit at 1.
    """
    growth = log(max(ratio, 1 + 1e-9))
    return -expm1(-2 * exponent * growth) / expm1(2 * growth) * loss / spent
