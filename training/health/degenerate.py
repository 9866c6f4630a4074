"""Training that can learn nothing: batches without a negative, and gradients that are exactly zero.

A contrastive term learns from what does not belong together. In a batch of one pair, of one caption or of one sample
there is nothing of that kind, and its loss and gradient are zero from the first step, which looks like success.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..objectives.base import Inputs, Objective
from ..world import World


def nothing_to_learn(
    inputs: Inputs, objectives: Sequence[Objective], loss: float, grad_norm: float, world: World
) -> str | None:
    """Why the batch of a step teaches nothing, in a sentence; None if it may. All ranks call it together; it waits for
    the device."""
    ids = {"caption": inputs.caption_ids, "sample": inputs.image_ids}
    distinct = {what: len(world.gather(own).unique()) for what, own in ids.items()}
    pairs = len(inputs.lengths) * world.size
    contrastive = [o.name for o in objectives if o.needs & {"embeddings", "tokens"}]
    if contrastive and 1 in distinct.values():
        learns = f"objectives.{contrastive[0]} has no negatives there and learns nothing"
        if pairs == 1:
            return f"data.batch = 1 is one pair, and {learns}; set data.batch: 2 or more, the larger the better"
        what, remedy = ("caption", "captions") if distinct["caption"] == 1 else ("sample", "number of samples")
        return f"all {pairs} pairs of a batch have one {what}, and {learns}; look at the {remedy} of data.train"
    if loss == 0.0 and grad_norm == 0.0:
        return (
            "the loss and its gradient are exactly 0, so nothing is learned; look at the weights of objectives, and at "
            "the samples of data.train"
        )
    return None
