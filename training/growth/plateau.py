"""When to grow: the loss's slope per FLOP, beside the one that the next size is expected to give.

The rule is Staged Training's (Shen et al., arXiv 2203.06211): a size is worth training while its loss falls faster, for
the same FLOPs, than a larger one's would. The first slope is measured. The other is expected of a power law: trained at
the right sizes, models reach a loss that falls as C^-exponent in the FLOPs C spent (Kaplan et al., arXiv 2001.08361),
where the right size grows as the square root of C (Hoffmann et al., arXiv 2203.15556). A size of r times the FLOPs a
sample is then the right one at r^2 C, and on the way there the loss falls by

    expected = loss (1 - r^(-2 exponent)) / (C (r^2 - 1))   per FLOP.

Every figure is a sum over all ranks in rank order, so every world, and every resume, decides alike.
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
    """What the rule compares, in loss per FLOP; positive where the loss falls."""

    loss: float
    """mean of the window"""
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
    """The rule's figures after a `window` of at least two steps, each its loss and its mean caption length in tokens.

    `spec` is the present size and `following` the next; `spent` the run's FLOPs so far. The slope is that of the
    least-squares line through the losses of the window.
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
    """Loss per FLOP that a size of `ratio` times the FLOPs a sample is expected to give after `spent` FLOPs; the limit
    at 1 for a size that is no larger."""
    growth = log(max(ratio, 1 + 1e-9))
    return -expm1(-2 * exponent * growth) / expm1(2 * growth) * loss / spent


class Tally:
    """Loss and tokens of the steps since they were last asked for; asking waits for the device and for all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._losses: list[Tensor] = []
        self._tokens: list[int] = []

    def __len__(self) -> int:
        """Steps since then."""
        return len(self._losses)

    def add(self, loss: Tensor, tokens: int) -> None:
        """This rank's part of a step's loss, and the tokens of its captions."""
        self._losses.append(loss.detach())
        self._tokens.append(tokens)

    def fold(self, state: RunState, plan: RunPlan, patches: int | None, reads_tokens: bool) -> RunState:
        """The state with the FLOPs of these steps counted, and their losses kept where a rule measures them.

        `patches` of each picture were read (None: all); `reads_tokens` says whether an objective reads token features.
        All ranks call it together.
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
        """The whole loss of each step, and the tokens of its global batch: the same on all ranks."""
        if not self._losses:
            return []
        shares = torch.stack(self._losses).double()
        own = torch.stack([shares, torch.tensor(self._tokens, dtype=torch.float64, device=shares.device)])
        ranks = self._world.gather(own[None]).tolist()
        self._losses, self._tokens = [], []
        losses, tokens = zip(*ranks, strict=True)
        return [
            (fsum(a), int(fsum(b))) for a, b in zip(zip(*losses, strict=True), zip(*tokens, strict=True), strict=True)
        ]
