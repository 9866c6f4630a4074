"""Queries lost and won at a growth, against sets of numbers."""

from __future__ import annotations

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from treering.training.evaluate.comparing import bits, flips
from treering.training.evaluate.outcome import Evaluation


def evaluation(right: list[bool], names: list[str] | None = None) -> Evaluation:
    found = Evaluation()
    names = names or [f"query {i}" for i in range(len(right))]
    found.add("retrieval/image_to_text@1", torch.tensor(right), names, 0.1)
    found.add("retrieval/image_to_text@5", torch.tensor(right), names, 0.5)
    found.add("geometry/alignment", torch.tensor(right).double(), names)
    return found


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_flips_are_the_differences_of_the_sets(pairs: list[tuple[bool, bool]]) -> None:
    kept = json.loads(json.dumps(bits(evaluation([before for before, _ in pairs]))))
    assert kept.keys() == {"retrieval/image_to_text@1"}
    found = flips(kept, bits(evaluation([after for _, after in pairs])))["retrieval/image_to_text@1"]
    before = {i for i, (right, _) in enumerate(pairs) if right}
    after = {i for i, (_, right) in enumerate(pairs) if right}
    assert (found["lost"], found["won"], found["queries"]) == (len(before - after), len(after - before), len(pairs))


def test_other_queries_are_not_compared() -> None:
    ours = bits(evaluation([True, False]))
    assert flips(ours, bits(evaluation([True, False], ["another", "query 1"]))) == {}
    assert flips(ours, bits(evaluation([True, False, True]))) == {}
    assert flips({}, ours) == {}
