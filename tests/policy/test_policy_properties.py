"""Promise: whatever losses and curvatures come, the rate is positive, finite and bounded by kappa times the critical
rate in use; and when calm returns, so does the rate.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from catapult_opt.catapults import CatapultCounter
from catapult_opt.policy import Catapulter, CatapultPolicy, Decision

NAN, INF = math.nan, math.inf
losses = st.floats() | st.floats(-10, 10) | st.floats(0, 1e-3) | st.sampled_from([NAN, INF, -INF, 0.0, 1.0, 1e300])
eta_crits = st.floats(1e-300, 1e300) | st.floats(0.1, 10) | st.just(INF)
rows = st.lists(st.tuples(losses, st.none() | eta_crits), max_size=120)
# Within what a training can come to and a mean over a few steps can forget again.
troubles = st.lists(
    st.tuples(
        st.floats(-1e6, 1e12) | st.floats(0, 10) | st.sampled_from([NAN, INF, -INF, 0.0]),
        st.none() | st.floats(1e-6, 1e6) | st.just(INF),
    ),
    max_size=120,
)
policies = st.builds(
    CatapultPolicy,
    ripe=st.sampled_from([0.3, 1.0]),
    kappa=st.sampled_from([1.1, 2.0, 6.0]),
    growth=st.sampled_from([1.1, 2.0, 10.0]),
    fatal=st.sampled_from([2.0, 1e6]),
    patience=st.sampled_from([3, 100]),
    arm_steps=st.sampled_from([2, 25]),
    total_steps=st.sampled_from([None, 1, 40, 100]),
    smoothing=st.sampled_from([None, 1, 10]),
    caution=st.sampled_from([0.0, 2.0]),
)
# A first loss is finite, and a first curvature positive: the faces refuse others.
first_losses = st.floats(allow_nan=False, allow_infinity=False) | st.floats(-1, 1)
first_rates = st.floats(1e-20, 1e20)


def play(machine: Catapulter, sequence: list[tuple[float, float | None]], step: int, h: int) -> list[Decision]:
    return [
        machine.update(step=i, loss=loss, eta_crit=eta, smoothing=h) for i, (loss, eta) in enumerate(sequence, step)
    ]


def check(machine: Catapulter, decision: Decision) -> None:
    assert math.isfinite(decision.rate)
    assert decision.rate > 0
    assert decision.rate <= machine.policy.kappa * machine.eta_crit * (1 + 1e-9)
    assert decision.phase in ("fit", "arm", "hot", "cool", "settle", "start")
    assert decision.measure_in >= 1
    assert not (decision.restore and decision.take_snapshot)


@settings(max_examples=300, deadline=None)
@given(policies, first_losses, first_rates, rows, st.sampled_from([1, 5, 50]))
def test_any_sequence_gives_positive_finite_bounded_rates(
    policy: CatapultPolicy, first: float, eta: float, sequence: list[tuple[float, float | None]], h: int
) -> None:
    machine = Catapulter(policy)
    start = machine.update(step=1, loss=first, eta_crit=eta, smoothing=h)
    check(machine, start)
    for step, (loss, measured) in enumerate(sequence, 2):
        check(machine, machine.update(step=step, loss=loss, eta_crit=measured, smoothing=h))


@settings(max_examples=150, deadline=None)
@given(st.floats(1e-3, 1e3), troubles, st.sampled_from([1, 5]), st.floats(0.1, 10))
@example(first=2**-7, trouble=[(1.0, None), (0.0, 1e-5)], h=1, eta=1.0)  # a wrong curvature, once
def test_after_any_trouble_calm_brings_the_rate_back(
    first: float, trouble: list[tuple[float, float | None]], h: int, eta: float
) -> None:
    """Calm: a loss that stays just below where the training began, and a curvature that stays. From the deepest fall
    it takes twenty attempts to get back to the critical rate."""
    machine = Catapulter(CatapultPolicy(ripe=1.0))
    machine.update(step=1, loss=first, eta_crit=eta, smoothing=h)
    play(machine, trouble, 2, h)
    calm = play(machine, [(0.9 * first, eta)] * 1500, 2 + len(trouble), h)
    assert not any(decision.restore for decision in calm[-500:])
    assert calm[-1].phase == "arm"
    assert eta <= calm[-1].rate <= 2 * eta * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-3, 1e3), troubles, st.floats(0.1, 10))
def test_a_training_of_known_length_ends_below_the_edge(
    first: float, trouble: list[tuple[float, float | None]], eta: float
) -> None:
    machine = Catapulter(CatapultPolicy(total_steps=400))
    machine.update(step=1, loss=first, eta_crit=eta)
    play(machine, trouble, 2, 1)
    end = play(machine, [(first, eta)] * (399 - len(trouble)), 2 + len(trouble), 1)[-1]
    assert end.phase == "settle"
    assert end.rate <= 0.8 * eta * (1 + 1e-6)


@pytest.mark.parametrize("count", [1, 30, 2000])
def test_a_burst_of_spoiled_batches_is_one_restore_to_the_rate(count: int) -> None:
    """The weights do not move between them: the second one cannot be the rate's doing."""
    machine = Catapulter(CatapultPolicy(ripe=1.0))
    machine.update(step=1, loss=1.0, eta_crit=1.0)
    decisions = play(machine, [(NAN, None)] * count, 2, 1)
    assert all(decision.restore for decision in decisions)
    assert decisions[-1].rate == 0.5


def test_a_spoiled_batch_now_and_then_does_not_bring_the_rate_to_zero() -> None:
    machine = Catapulter(CatapultPolicy())
    machine.update(step=1, loss=1.0, eta_crit=1.0)
    for step in range(2, 4000):
        decision = machine.update(step=step, loss=NAN if step % 3 == 0 else 1.0, eta_crit=1.0)
        check(machine, decision)
    assert decision.rate >= 1e-6


def test_a_first_loss_that_happened_to_be_tiny_is_not_the_scale_for_ever() -> None:
    """A batch of one sample that the net happens to fit at the start: every other one is a million times higher."""
    machine = Catapulter(CatapultPolicy())
    machine.update(step=1, loss=1e-9, eta_crit=1.0, smoothing=50)
    decisions = play(machine, [(1.0, 1.0)] * 300, 2, 50)
    assert [decision.restore for decision in decisions[:2]] == [True, True]
    assert not any(decision.restore for decision in decisions[2:])


def test_negative_losses_are_losses() -> None:
    """Of a likelihood, say: falling from -1 to -3 is no spike and no divergence, coming back up to -1 is one."""
    machine = Catapulter(CatapultPolicy())
    machine.update(step=1, loss=-1.0, eta_crit=1.0)
    falling = play(machine, [(-1.0 - 0.1 * i, 1.0) for i in range(20)], 2, 1)
    assert {decision.phase for decision in falling} == {"arm"}
    assert not any(decision.restore for decision in falling)
    assert play(machine, [(-1.0, 1.0)], 22, 1)[0].phase == "hot"


def test_negative_losses_are_counted_as_losses() -> None:
    counter = CatapultCounter()
    for i in range(20):
        assert counter.update(loss=-1.0 - 0.1 * i, rate=3.0, lambda_max=1.0, eta_crit=2.0) == []
    for loss, lam in [(-1.0, 1.0), (5.0, 0.5), (-3.0, 0.5), (-3.1, 0.5)]:
        counter.update(loss=loss, rate=3.0, lambda_max=lam, eta_crit=2 / lam)
    assert counter.catapults == 1
