"""Growth leaves no spike in the loss: `tests/benchmarks/growth_spikes.py` at its small size, with bounds."""

from __future__ import annotations

import pytest

from treering.tests.benchmarks.growth_spikes import ARMS, measure, spike

BOUND = 0.3
"""nats above the ungrown run's own largest loss in 30 steps"""
KEPT = ["duplicate, mapped", "noise, mapped", "noise, keep_v", "depth only, mapped", "width x 1.5, noise, mapped"]
LOST = ["noise, reset", "depth only, reset", "noise, zeroed, steps kept"]


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    names = ["small goes on", *KEPT, *LOST, "depth only, stack", "noise, mapped, same rate", "lemon, mapped, same rate"]
    return measure({name: ARMS[name] for name in names}, seed=0, width=16, depth=1, steps=150, batch=48)


@pytest.mark.parametrize("arm", KEPT)
def test_mapped_state_leaves_no_spike(arm: str, found: dict[str, list[float]]) -> None:
    assert found[arm][0] == pytest.approx(found["small goes on"][0], abs=1e-4)
    assert spike(found, arm) < BOUND


@pytest.mark.parametrize("arm", LOST)
def test_lost_state_would_be_seen(arm: str, found: dict[str, list[float]]) -> None:
    """The bound has power: what must not be done exceeds it three times over."""
    assert found[arm][0] == pytest.approx(found["small goes on"][0], abs=1e-4)
    assert spike(found, arm) > 3 * BOUND


def test_lossy_layers_jump_at_once_and_forgotten_rates_tell(found: dict[str, list[float]]) -> None:
    assert found["depth only, stack"][0] - found["small goes on"][0] > BOUND
    assert spike(found, "lemon, mapped, same rate") > BOUND
