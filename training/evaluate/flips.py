"""What a growth lost and won: the same queries before it and after.

A model that is better on average may have queries wrong that it had right (negative flips: Yan et al., arXiv
2011.09161). An evaluation in a run's records keeps of each such score one bit a query, so that a later one can be held
against it, also after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.order import stable_hash
from .outcome import Evaluation
from .reliability import compare


def bits(found: Evaluation) -> dict[str, dict[str, Any]]:
    """Of each score whose queries are right or wrong at rank one: which are right, and which queries they were."""
    return {
        key: {
            "right": np.packbits(right.numpy()).tobytes().hex(),
            "queries": len(right),
            "asked": stable_hash(*found.names[key]),
        }
        for key, right in found.queries.items()
        if right.dtype == torch.bool and not key.endswith(("@5", "@10"))
    }


def flips(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By score: `lost`, `won`, of how many `queries`, and McNemar's `p_value`; `before` and `after` are from `bits`.

    Scores that were not of the same queries are left out.
    """
    found = {}
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if (old["queries"], old["asked"]) == (new["queries"], new["asked"]):
            compared = compare(_right(old), _right(new))
            count = old["queries"]
            lost, won = round(compared.negative_flips * count), round(compared.positive_flips * count)
            found[key] = {"lost": lost, "won": won, "queries": count, "p_value": compared.p_value}
    return dict(sorted(found.items()))


def _right(kept: Mapping[str, Any]) -> Tensor:
    packed = np.frombuffer(bytes.fromhex(kept["right"]), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=kept["queries"]).astype(bool))
