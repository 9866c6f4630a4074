"""The loss in words: its terms, and how far the held-out loss is from that of training, with what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any, NamedTuple

from . import readable
from .readable import is_number, number

RECENT = 10
"""most log lines that the training loss beside a held-out one is the mean of"""
_RECENT_SHARE = 0.1
"""of the samples seen: older lines are not looked at"""
_RISE, _FAR, _NEAR = 1.02, 1.5, 1.1
"""factors on a loss from which on it has risen, is far larger, and is larger than another"""


class Term(NamedTuple):
    """A term of the loss at a step: its weight, and its value without it (None: not finite)."""

    name: str
    weight: float
    value: float | None


def terms_text(terms: Sequence[Term]) -> str:
    """What a loss consists of: ` (contrastive 4.47, caption 2 x 10.81)`; empty if it is one term of weight 1."""
    if len(terms) == 1 and terms[0].weight == 1:
        return ""
    parts = [
        f"{readable.plain(name)} {'' if weight == 1 else f'{readable.decimal(weight, 3)} x '}{loss_text(value)}"
        for name, weight, value in terms
    ]
    return f" ({', '.join(parts)})" if parts else ""


def loss_text(value: float | None) -> str:
    """A loss as it is shown."""
    return "not finite" if value is None else readable.decimal(value)


def training_beside(held_out: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The training loss that a held-out loss is compared with: of the same terms with the same weights, the mean of the
    newest of `steps`, the step lines before it; None if there is none."""
    weights = held_out["weights"]
    fine = [line for line in steps if all(is_number(line["losses"].get(name)) for name in weights)]
    newest = max((line["samples"] for line in fine), default=0)
    lines = [line for line in fine[-RECENT:] if line["samples"] >= (1 - _RECENT_SHARE) * newest]
    if not lines:
        return None
    losses = {name: fsum(line["losses"][name] for line in lines) / len(lines) for name in weights}
    return {"loss": fsum(weights[name] * losses[name] for name in weights), "losses": losses, "lines": len(lines)}


def held_out_text(held_out: Mapping[str, Any]) -> str:
    """A held-out loss with its terms: held-out loss 26.18 (contrastive 4.47, caption 2 x 10.81)."""
    losses, weights = (_mapping(held_out.get(name)) for name in ("losses", "weights"))
    terms = [Term(name, weight, number(losses.get(name))) for name, weight in weights.items() if is_number(weight)]
    without = [readable.plain(name) for name in held_out.get("without") or []]
    missing = f" without {', '.join(without)}" if without else ""
    return f"held-out loss {loss_text(number(held_out.get('loss')))}{terms_text(terms)}{missing}"


def gap_of(held_out: Mapping[str, Any]) -> float | None:
    """By how much the held-out loss is above the training loss of the same terms; None if one is not known."""
    there, here = number(held_out.get("loss")), number(_mapping(held_out.get("training")).get("loss"))
    return None if there is None or here is None else there - here


def gap_text(held_out: Mapping[str, Any]) -> str:
    """The held-out loss beside that of training: held-out loss 3.41, training 1.12 in the last 10 log lines: gap
    2.29."""
    said, gap = held_out_text(held_out), gap_of(held_out)
    if gap is None:
        return said
    training = held_out["training"]
    lines = training.get("lines")
    over = "the last log line" if lines == 1 else f"the last {readable.exact(number(lines))} log lines"
    return f"{said}, training {readable.decimal(training['loss'])} in {over}: gap {readable.decimal(gap, 3)}"


def conclusion(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """What follows from the held-out losses of a run's `eval` lines, oldest first; empty if nothing does. All are
    weighted as the last one, and those of other terms are left out."""
    known = [(line["samples"], _mapping(line.get("held_out"))) for line in evaluations]
    if not known or gap_of(known[-1][1]) is None:
        return ""
    weights = _mapping(known[-1][1].get("weights"))
    losses = [
        (at, _weighted(held_out, weights), _weighted(held_out.get("training"), weights)) for at, held_out in known
    ]
    whole = [(at, there, here) for at, there, here in losses if there is not None and here is not None]
    if not whole or whole[-1][0] != known[-1][0]:
        return ""
    _, now, trained = whole[-1]
    at, lowest, before = min(whole, key=lambda each: each[1])
    if lowest > 0 and now > _RISE * lowest and trained < before:
        return (
            f"It was lowest, {readable.decimal(lowest)}, at {readable.exact(at)} samples and has risen since, while "
            "the training loss fell: the model learns its training samples by heart. More data, augmentation or a "
            "shorter run would help."
        )
    if trained > 0 and now > _FAR * trained:
        return (
            "The model does far better on the samples that it trains on than on others, so its training loss says "
            "little of what it can do. More data or augmentation would help."
        )
    if trained > 0 and now <= _NEAR * trained:
        return "The model does about as well on others as on the samples that it trains on."
    return ""


def _weighted(row: object, weights: Mapping[str, Any]) -> float | None:
    """The weighted sum of the `losses` of a record; None if they are not of these terms, or not finite."""
    losses = _mapping(_mapping(row).get("losses"))
    if losses.keys() != weights.keys() or not all(map(is_number, (*losses.values(), *weights.values()))):
        return None
    return fsum(weight * losses[name] for name, weight in weights.items())


def comparable(held_out: Sequence[Mapping[str, Any]]) -> bool:
    """Whether held-out losses are of the same terms and weights, in batches of one size, on the same data."""
    return all(held_out[0].get(name) == each.get(name) for each in held_out for name in _COMPARED)


_COMPARED = ("weights", "samples", "batch", "data")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
