"""How the benchmark of growth's savings reads its runs, and that its arms spend what they should."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from treering.launch.recipe.load import read_recipe
from treering.models.flops import training_flops
from treering.tests.benchmarks.growth_savings import MEAN_TOKENS, Outcome, figures_of, overrides, reached, saved


def test_the_place_of_a_target_is_on_the_line_over_log_flops() -> None:
    points = [(4e9, 2.0), (1e9, 3.0), (2e9, 2.4), (8e9, 2.1)]
    for target in (2.9, 2.4, 2.1, 2.0):
        expected = exp(np.interp(-target, [-3.0, -2.4, -2.0], [log(1e9), log(2e9), log(4e9)]))
        assert reached(points, target) == pytest.approx(expected)
    assert reached(points, 3.5) == 1e9
    assert reached(points, 1.9) is None
    assert saved(points, 2.4, 5e9) == pytest.approx(0.6)
    assert saved(points, 1.9, 5e9) == pytest.approx(-0.6)
    assert saved(points, 1.9, 1e10) == 0


def test_arms_spend_their_budgets() -> None:
    recipe = read_recipe("emoji", []).recipe
    specs = recipe.specs()
    whole = sum(s.samples * training_flops(spec, MEAN_TOKENS) for s, spec in zip(recipe.stages, specs, strict=True))
    for arm, shapes in (("large", specs[1:]), ("small", specs[:1]), ("grown", specs)):
        made = read_recipe("emoji", overrides(recipe, arm, 0.8, 0.4, 2.0)).recipe
        assert made.specs() == shapes
        assert made.optimizer.lr == 2 * recipe.optimizer.lr
        spent = [s.samples * training_flops(spec, MEAN_TOKENS) for s, spec in zip(made.stages, shapes, strict=True)]
        assert sum(spent) == pytest.approx(0.8 * whole, rel=1e-3)
    assert spent[0] == pytest.approx(0.4 * sum(spent), rel=1e-3)


def test_seeds_are_paired_and_the_control_is_counted() -> None:
    large = [Outcome(10.0, 1.0, 0.5), Outcome(10.0, 2.0, 0.5)]
    grown = [[Outcome(5.0, 1.0, 0.5), Outcome(9.0, 0.9, 0.6)], [Outcome(5.0, 3.0, 0.2), Outcome(8.0, 2.0, 0.5)]]
    small = [[Outcome(4.0, 1.0, 0.1)], [Outcome(9.0, 2.5, 0.1)]]
    figures = figures_of(1.0, large, [{"grown": g, "small": s} for g, s in zip(grown, small, strict=True)])
    assert (figures["saved_flops_low"], figures["saved_flops_high"]) == pytest.approx((0.2, 0.5))
    assert figures["saved_flops_median"] == pytest.approx(0.35)
    assert figures["saved_flops_score_high"] == pytest.approx(0.5)
    assert figures["control_wins"] == 1
    assert figures["control_wins_score"] == 0
