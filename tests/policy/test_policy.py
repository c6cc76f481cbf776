"""The policy with numbers alone: what it decides for hand-written losses and critical rates."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catapult_opt.policy import Catapulter, CatapultPolicy, Decision

AT_ONCE: dict[str, object] = {"ripe": 1.0, "ceiling": 100.0}  # catapults from the first step on, and high ones


def run(losses: list[float], eta: float | list[float | None] = 1.0, **settings: object) -> list[Decision]:
    machine = Catapulter(CatapultPolicy(**{**AT_ONCE, **settings}))  # type: ignore[arg-type]
    etas = eta if isinstance(eta, list) else [eta] * len(losses)
    return [
        machine.update(step=i, loss=loss, eta_crit=e) for i, (loss, e) in enumerate(zip(losses, etas, strict=True), 1)
    ]


def test_first_step_is_twice_the_critical_rate_with_a_snapshot() -> None:
    (first,) = run([1.0], 0.25)
    assert (first.rate, first.phase, first.take_snapshot) == (0.5, "arm", True)


def test_a_whole_catapult_goes_through_arm_hot_cool_and_arms_again() -> None:
    losses = [1.0, 1.1, 2.0, 9.0, 150.0, 40.0, 5.0, 0.9, 0.9]
    phases = [d.phase for d in run(losses)]
    assert phases == ["arm", "arm", "hot", "hot", "cool", "cool", "cool", "arm", "arm"]


def test_fits_below_the_edge_until_the_loss_is_down() -> None:
    decisions = run([1.0, 0.9, 0.5, 0.31, 0.29, 0.29], [1.0, 0.5, 1.0, 1.0, 1.0, 1.0], ripe=0.3)
    assert [d.phase for d in decisions] == ["fit"] * 4 + ["arm"] * 2
    assert [d.rate for d in decisions] == pytest.approx([0.8, 0.4, 0.8, 0.8, 2.0, 2.0])
    assert [d.measure_in for d in decisions[:4]] == [1, 2, 4, 8]
    assert [d.take_snapshot for d in decisions] == [True] * 5 + [False]


def test_on_mini_batches_fits_with_the_margin_of_following_by_the_mean_loss() -> None:
    decisions = run([1.0] + [0.2] * 60, ripe=0.3, smoothing=20)
    phases = [d.phase for d in decisions]
    assert phases[:19] == ["fit"] * 19 and phases[20] == "arm"
    assert decisions[5].rate == pytest.approx(0.4)


def test_blown_up_below_the_edge_it_goes_back_and_the_rate_grows_again_slowly() -> None:
    decisions = run([1.0, 1.0, 11.0] + [1.0] * 100, ripe=0.3, fit_steps=200)
    assert [i for i, d in enumerate(decisions, 1) if d.restore] == [3]
    assert {d.phase for d in decisions} == {"fit"}
    assert decisions[2].rate == pytest.approx(0.2)
    growing = [b.rate - a.rate for a, b in itertools.pairwise(decisions[2:])]
    assert growing == pytest.approx([0.01 * 0.8 / 4] * 100)


def test_a_repeated_batch_is_cooled_before_the_loss_is_above_the_ceiling() -> None:
    """From 1 to 3 it has tripled, and would to 9; on mini-batches such a step is noise."""
    assert [d.phase for d in run([1.0, 1.0, 3.0], ceiling=8.0)] == ["arm", "arm", "cool"]
    assert [d.phase for d in run([1.0, 1.0, 3.0], ceiling=10.0)] == ["arm", "arm", "hot"]
    noisy = run([1.0] * 20 + [9.0] * 3, ceiling=10.0, smoothing=10)
    assert [d.phase for d in noisy[-3:]] == ["hot"] * 3


def test_the_next_spike_may_go_as_high_as_should_pay_judged_by_the_last_one() -> None:
    """Its effect on log(eta_crit) is taken to go with its height over lambda^2."""
    settings = CatapultPolicy(ripe=1.0, ceiling=4.0, gain=1.2, hot_steps=10**6, patience=10**6)
    machine, eta, step = Catapulter(settings), 1.0, 0
    heights, rises = [], [1.0, 1.0, 1.2**0.5, 1.2, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for rise in rises:  # of eta_crit, after each spike
        loss = 1.0
        while machine.phase != "cool":
            step += 1
            machine.update(step=step, loss=loss, eta_crit=eta)
            loss *= 1.02
        heights.append(loss)
        eta *= rise
        for _ in range(2):
            step += 1
            machine.update(step=step, loss=1.0, eta_crit=eta)
    expected = [4, 16, 64, 128 / 1.2, 128 / 1.2**3, 128 / 1.2**3 / 1.5 / 4, 4 * 128 / 1.2**3 / 6, 16 * 128 / 1.2**3 / 6]
    assert heights == pytest.approx([*expected, 64 * 128 / 1.2**3 / 6, 1000], rel=0.05)


def test_a_repeated_batch_whose_loss_does_not_come_down_is_waited_for_so_long() -> None:
    assert [d.phase for d in run([1.0] * 60, ripe=0.3)].index("arm") == 50
    assert {d.phase for d in run([1.0] * 60, ripe=0.3, smoothing=5)} == {"fit"}


def test_above_the_ceiling_it_cools_at_once_below_the_edge() -> None:
    decisions = run([1.0, 2.0, 9.0, 101.0])
    assert [d.phase for d in decisions] == ["arm", "hot", "hot", "cool"]
    assert decisions[-1].rate == pytest.approx(0.8)
    assert all(d.rate == 2.0 for d in decisions[:-1])


def test_a_spike_is_held_ten_steps_at_most() -> None:
    decisions = run([1.0] + [2.0] * 14)
    assert [d.phase for d in decisions].count("hot") == 10


def test_without_a_spike_the_attempt_is_renewed_and_the_rate_at_most_doubles() -> None:
    decisions = run([1.0] * 60, [0.1] + [10.0] * 59)
    renewed = [(i, d.rate) for i, d in enumerate(decisions, 1) if d.take_snapshot]
    assert [step for step, _ in renewed] == [1, 26, 51]
    assert [rate for _, rate in renewed] == pytest.approx([0.2, 0.4, 0.8])


def test_clamp_never_above_kappa_times_the_present_critical_rate() -> None:
    decisions = run([1.0] * 5, [1.0, 0.5, 0.2, 0.5, 1.0])
    assert [d.rate for d in decisions] == pytest.approx([2.0, 1.0, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2e6])
def test_beyond_recovery_restores_the_snapshot_and_tries_more_gently(loss: float) -> None:
    machine = Catapulter(CatapultPolicy(ripe=1.0))
    machine.update(step=1, loss=1.0, eta_crit=1.0)
    decision = machine.update(step=2, loss=loss, eta_crit=None)
    assert decision.restore
    assert decision.rate == pytest.approx(0.5)
    assert [name for name, _ in decision.events] == ["restore"]
    after = machine.update(step=3, loss=1.0, eta_crit=1.0)
    assert not after.restore
    assert after.rate == pytest.approx(0.5)


def test_a_loss_of_exactly_zero_does_not_make_every_later_loss_fatal() -> None:
    decisions = run([1.0, 0.0, 0.0, 1e-7, 1e-3, 0.5])
    assert not any(d.restore for d in decisions)


def test_a_catapult_that_does_not_return_is_given_up_and_the_next_is_gentler() -> None:
    decisions = run([10.0, 1.0] + [3.0] * 130)
    backed = [(i, d) for i, d in enumerate(decisions, 1) if any(name == "back_off" for name, _ in d.events)]
    assert backed[0][0] == 103
    assert dict(backed[0][1].events)["back_off"]["kappa"] == pytest.approx(1.5)
    assert not any(d.restore for d in decisions)


def test_a_catapult_that_does_not_return_and_is_above_the_first_loss_is_undone() -> None:
    decisions = run([1.0] + [3.0] * 130)
    undone = [i for i, d in enumerate(decisions, 1) if d.restore]
    assert undone[0] == 102
    assert not any(name == "back_off" for d in decisions for name, _ in d.events)


def test_a_training_about_to_end_above_its_first_loss_is_undone() -> None:
    """Not while there is time: at 85 of 100 steps."""
    losses = [1.0] * 30 + [5.0] * 70
    decisions = run(losses, total_steps=100, patience=90)
    assert next(i for i, d in enumerate(decisions, 1) if d.restore) == 86
    assert all(d.rate > 0 for d in decisions)


def test_settles_below_the_edge_when_the_length_is_known_and_falls_to_nearly_nothing() -> None:
    decisions = run([1.0] * 105, total_steps=100)
    assert {d.phase for d in decisions[70:]} == {"settle"}
    falling = [0.8 * k / 31 for k in range(30, 0, -1)]
    assert [d.rate for d in decisions[70:]] == pytest.approx(falling + [falling[-1]] * 5)
    assert all(d.phase != "settle" for d in decisions[:70])


def test_settles_where_hardly_any_loss_is_left_and_begins_again_where_there_is() -> None:
    decisions = run([1.0] * 10 + [0.0031] * 10 + [0.0029] * 10 + [0.02] * 10 + [0.04] * 10)
    phases = [d.phase for d in decisions]
    assert phases == ["arm"] * 20 + ["settle"] * 20 + ["arm"] * 10
    assert decisions[25].rate == pytest.approx(0.8)


@pytest.mark.parametrize("phase_losses", [[1.0, 1.0], [1.0, 1.5], [1.0, 1.5, 150.0]], ids=["arm", "hot", "cool"])
def test_a_curvature_that_vanishes_is_undone(phase_losses: list[float]) -> None:
    """Dead units: the loss may look harmless, the critical rate explodes."""
    losses = [*phase_losses, 0.9, 0.9]
    collapse = [1.0] * len(phase_losses) + [1e5, 1.0]
    decisions = run(losses, collapse)
    assert [d.restore for d in decisions] == [False] * len(phase_losses) + [True, False]
    assert decisions[-1].rate <= 1.0
    assert not any(d.restore for d in run(losses, [min(e, 9e3) for e in collapse]))


def test_a_catapult_under_way_is_brought_home_before_settling() -> None:
    decisions = run([1.0] * 65 + [5.0] * 10 + [0.9] * 25, total_steps=100)
    assert [d.phase for d in decisions[65:77]] == ["hot"] * 5 + ["cool"] * 5 + ["settle"] * 2


def test_cools_once_the_critical_rate_has_doubled_within_the_spike() -> None:
    decisions = run([1.0, 2.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.9, 2.1, 3.0])
    assert [d.phase for d in decisions] == ["arm", "hot", "hot", "cool", "cool"]
    assert [d.brake for d in decisions] == [False, False, False, True, False]
    assert [d.rate for d in decisions] == pytest.approx([2.0, 2.0, 2.0, 0.8 * 2.1, 2.0])  # the attempt's at most


def test_the_next_attempt_doubles_the_last_attempt_not_the_cooled_rate() -> None:
    decisions = run([1.0, 200.0, 200.0, 0.9, 0.9], [1.0, 1.0, 0.1, 5.0, 5.0])
    assert [d.rate for d in decisions] == pytest.approx([2.0, 0.8, 0.08, 4.0, 4.0])


def test_once_settled_it_measures_after_1_2_4_steps_and_at_once_when_the_loss_rises() -> None:
    machine = Catapulter(CatapultPolicy(total_steps=100))
    due, asked = 1, []
    for step in range(1, 200):
        measured = step >= due or step <= 71
        loss = 3.0 if step == 150 else 1.0
        decision = machine.update(step=step, loss=loss, eta_crit=1.0 if measured else None)
        if measured and step >= 71:
            asked.append(step)
        due = step + decision.measure_in if measured else min(due, step + decision.measure_in)
    assert asked[:7] == [71, 72, 74, 78, 86, 102, 134]
    assert 151 in asked


def test_no_curvature_gives_a_finite_rate() -> None:
    assert math.isfinite(run([1.0], math.inf)[0].rate)


def test_mini_batch_noise_is_averaged() -> None:
    """One batch in ten with a loss five times the usual starts no spike once averaged."""
    losses = [5.0 if i % 10 == 9 else 1.0 for i in range(200)]
    assert "hot" not in {d.phase for d in run(losses, smoothing=50)[60:]}
    assert "hot" in {d.phase for d in run(losses)}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0) | st.just(math.nan), st.none() | st.floats(1e-12, 1e12)), min_size=1, max_size=80),
    st.sampled_from([1, 5, 50]),
)
def test_any_sequence_gives_positive_finite_rates_below_the_clamp(
    rows: list[tuple[float, float | None]], smoothing: int
) -> None:
    machine = Catapulter(CatapultPolicy())
    machine.update(step=1, loss=1.0, eta_crit=1.0, smoothing=smoothing)
    for step, (loss, eta) in enumerate(rows, 2):
        decision = machine.update(step=step, loss=loss, eta_crit=eta, smoothing=smoothing)
        assert math.isfinite(decision.rate)
        assert decision.rate > 0
        assert decision.measure_in >= 1
        if eta is not None and smoothing == 1 and not decision.restore:
            assert decision.rate <= 2.0 * eta * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e9), st.none() | st.floats(1e-3, 1e3)), max_size=60), st.integers(0, 60))
def test_state_round_trip_continues_alike(rows: list[tuple[float, float | None]], cut: int) -> None:
    whole, first = Catapulter(CatapultPolicy()), Catapulter(CatapultPolicy())
    for machine in (whole, first):
        machine.update(step=1, loss=1.0, eta_crit=1.0)
    resumed = first
    for step, (loss, eta) in enumerate(rows, 2):
        if step - 2 == cut:
            resumed = Catapulter(CatapultPolicy())
            resumed.load_state_dict(first.state_dict())
        assert resumed.update(step=step, loss=loss, eta_crit=eta) == whole.update(step=step, loss=loss, eta_crit=eta)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kappa", 1.0),
        ("kappa", math.nan),
        ("ceiling", -1.0),
        ("drop", 1.0),
        ("ripe", 0.0),
        ("gain", 1.0),
        ("cool", 1.5),
        ("cool", 0.0),
        ("hot_steps", 0),
        ("arm_steps", 2.5),
        ("total_steps", -3),
        ("smoothing", True),
        ("measure_cooling", 0),
        ("begin", 0.0),
        ("measure_share", 1.5),
        ("catapults", "yes"),
    ],
)
def test_refuses_settings_that_mean_nothing(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        CatapultPolicy(**{name: value})  # type: ignore[arg-type]
