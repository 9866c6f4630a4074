"""When to grow: compares the loss's slope per FLOP with the slope expected of the next size.

The rule is that of Staged Training (Shen et al., arXiv 2203.06211): train a size as long as its loss falls faster per
FLOP than a larger size's would. The first slope is measured. The second follows from a power law: at compute-optimal
sizes the loss falls as C^-exponent in the FLOPs C spent (Kaplan et al., arXiv 2001.08361), and the optimal size grows
as the square root of C (Hoffmann et al., arXiv 2203.15556). A size with r times the FLOPs per sample is therefore
optimal at r^2 C, and until then the loss falls by

    expected = loss (1 - r^(-2 exponent)) / (C (r^2 - 1))   per FLOP.

All figures are sums over ranks in rank order, so the decision is the same at any world size and after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import expm1, fsum, log

import torch
from torch import Tensor

from ...models.flops import training_flops
from ...models.spec import ModelSpec
from ..run_plan import RunPlan
from ..stages import steady_from
from ..state import RunState
from ..world import World


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


class Tally:
    """Losses and token counts of the steps since the last `take`, which synchronises with the device and all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._losses: list[Tensor] = []
        self._tokens: list[int] = []

    def __len__(self) -> int:
        """Number of steps since the last `take`."""
        return len(self._losses)

    def add(self, loss: Tensor, tokens: int) -> None:
        """Record this rank's part of a step's loss and the number of tokens of its captions."""
        self._losses.append(loss.detach())
        self._tokens.append(tokens)

    def fold(self, state: RunState, plan: RunPlan, patches: int | None, reads_tokens: bool) -> RunState:
        """The state with the FLOPs of these steps added, and their losses added to the window of a plateau rule.

        `patches` of each picture were read (None: all); `reads_tokens`: whether an objective reads token features. All
        ranks call it together.
        """
        size, spec, stage = plan.recipe.data.batch, plan.specs[state.stage], plan.stages[state.stage]
        flops, window, samples = state.flops, list(state.window), state.samples - len(self) * size
        steady = steady_from(plan.stages, state.stage, size, plan.recipe.schedule.warmup)
        for loss, tokens in self.take():
            flops += size * training_flops(spec, tokens / size, patches, reads_tokens)
            if stage.plateau and samples >= steady:
                window.append((loss, tokens / size))
            samples += size
        return state.model_copy(update={"flops": flops, "window": tuple(window)})

    def take(self) -> list[tuple[float, int]]:
        """The loss of each step and the tokens of its global batch, the same on all ranks; then start over."""
        if not self._losses:
            return []
        losses_s = torch.stack(self._losses).double()
        own = torch.stack([losses_s, torch.tensor(self._tokens, dtype=torch.float64, device=losses_s.device)])
        ranks = self._world.gather(own[None]).tolist()
        self._losses, self._tokens = [], []
        losses, tokens = zip(*ranks, strict=True)
        return [
            (fsum(a), int(fsum(b))) for a, b in zip(zip(*losses, strict=True), zip(*tokens, strict=True), strict=True)
        ]
