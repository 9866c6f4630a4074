"""The benchmark of arriving data: its portions, and that the arms are what they say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from treering.data.shards.source import open_source
from treering.launch.recipe.load import read_recipe
from treering.models.flops import training_flops
from treering.tests.benchmarks.arriving_data import BOUND, LARGE, SMALL, SOURCE, SPACE, Outcome, deal, figures_of
from treering.tests.benchmarks.arriving_data import model as model_of
from treering.tests.benchmarks.arriving_data import stages as stages_of


def test_every_picture_is_in_one_portion(tmp_path: Path) -> None:
    portions = [open_source(url) for url in deal(tmp_path)]
    whole = open_source(SOURCE)
    keys = [source.key(i) for source in portions for i in range(len(source))]
    assert sorted(keys) == sorted(whole.key(i) for i in range(len(whole)))
    assert min(map(len, portions)) > 0.8 * len(whole) / 4


def test_a_random_run_grows_within_the_space_and_the_bound(tmp_path: Path) -> None:
    seen = set()
    for seed in range(6):
        made = stages_of("random", seed, 1_000, 128)
        recipe = read_recipe(
            "emoji",
            [
                "data.train=" + json.dumps([{"source": SOURCE, "name": f"portion{i}"} for i in range(4)]),
                model_of(SMALL),
                "objectives={contrastive: {}}",
                f"stages={json.dumps(made)}",
                "schedule.warmup=128",
            ],
        ).recipe
        costs = [training_flops(spec, 16) for spec in recipe.specs()]
        assert all(after <= BOUND * before for before, after in itertools.pairwise(costs))
        for stage, space in zip(made[1:], SPACE, strict=True):
            assert all(size in space[path] for path, size in stage["grow"].items())
        sizes = recipe.specs()[-1].sizes()
        assert all(SMALL[path] <= sizes[path] <= LARGE[path] for path in SMALL)
        seen.add(json.dumps(made))
        assert stages_of("random_momentum", seed, 1_000, 128) == [
            made[0],
            *({**stage, "inherit": 0.9} for stage in made[1:]),
        ]
    assert len(seen) > 1


def test_arms_are_paired_by_seed() -> None:
    ends = {
        arm: [Outcome(score, 1.0, 0.0, {}) for score in scores]
        for arm, scores in {
            "small": (0.5, 0.6),
            "large": (0.7, 0.7),
            "random": (0.6, 0.6),
            "random_momentum": (0.6, 0.8),
            "searched": (0.6, 0.7),
            "searched_momentum": (0.5, 0.7),
        }.items()
    }
    figures = {name: round(value, 9) for name, value in figures_of(ends).items()}
    assert (figures["large_lead"], figures["large_lead_low"], figures["large_lead_high"]) == (0.15, 0.1, 0.2)
    assert (figures["random_gain_of_momentum"], figures["searched_gain_of_momentum"]) == (0.1, -0.05)
    assert figures["gain_of_search"] == 0.05
