"""What counts as a catapult: hand-written sequences of loss, rate and curvature."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catapult_opt.catapults import CatapultCounter, is_super_critical

Row = tuple[float, float | None]  # loss, lambda_max (None: not measured)


def count(rows: list[Row], rate: float = 1.0, window: int = 1) -> tuple[CatapultCounter, list[str]]:
    counter, names = CatapultCounter(), []
    for loss, lam in rows:
        eta = None if lam is None else (2 / lam if lam else float("inf"))
        events = counter.update(loss=loss, rate=rate, lambda_max=lam, eta_crit=eta, window=window)
        names += [name for name, _ in events]
    return counter, names


SPIKE: list[Row] = [(1.0, 4.0), (3.0, 4.0), (20.0, 3.0), (5.0, 1.5), (0.9, 1.0), (0.8, 1.0)]


def test_a_catapult_is_counted_once_with_its_events_in_order() -> None:
    counter, names = count(SPIKE)
    assert names == ["catapult_started", "catapult_peaked", "catapult_recovered"]
    assert (counter.catapults, counter.super_critical_steps, counter.measured_steps) == (1, 3, 6)


def test_two_catapults_are_two() -> None:
    again = [(loss * 0.5, None if lam is None else lam * 0.6) for loss, lam in SPIKE]
    counter, _ = count([*SPIKE, (0.7, 2.4), *again[1:]])
    assert counter.catapults == 2


@pytest.mark.parametrize(
    ("why", "rows"),
    [
        ("never above the edge", [(loss, 1.0) for loss, _ in SPIKE]),
        ("curvature did not fall", [(loss, 4.0) for loss, _ in SPIKE]),
        ("loss did not come back", SPIKE[:4]),
        ("a wiggle of less than a fifth", [(1.0, 4.0), (1.15, 3.0), (0.9, 2.0), (0.8, 1.0)]),
    ],
)
def test_what_is_not_a_catapult(why: str, rows: list[Row]) -> None:
    assert count(rows)[0].catapults == 0, why


def test_between_measurements_a_return_waits_for_the_curvature_to_confirm_it() -> None:
    rows: list[Row] = [(1.0, 4.0), (3.0, None), (20.0, None), (5.0, None), (0.9, None), (0.8, None)]
    counter, names = count(rows)
    assert (counter.catapults, counter.super_critical_steps) == (0, 1)
    assert "catapult_recovered" not in names
    assert count([*rows, (0.7, 1.0)])[0].catapults == 1
    assert count([*rows, (0.7, 4.0)])[0].catapults == 0


def test_a_vanishing_curvature_is_a_collapse_not_a_catapult() -> None:
    counter, names = count([(1.0, 4.0), (3.0, 4.0), (20.0, 3.0), (5.0, 0.0), (0.9, 0.0), (0.9, 0.0)])
    assert (counter.catapults, counter.collapses) == (0, 1)
    assert names.count("collapse") == 1


def test_a_loss_that_is_not_finite_is_passed_over() -> None:
    counter, _ = count([SPIKE[0], (float("nan"), 4.0), *SPIKE[1:]])
    assert counter.catapults == 1


def test_the_thesis_epsilon() -> None:
    assert is_super_critical(1.0 + 2e-8, 1.0)
    assert not is_super_critical(1.0 + 5e-9, 1.0)


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.none() | st.floats(1e-3, 1e3)), max_size=60), st.integers(1, 20))
def test_counts_are_bounded_and_survive_a_round_trip(rows: list[Row], window: int) -> None:
    counter, names = count(rows, window=window)
    measured = sum(lam is not None for _, lam in rows)
    assert counter.measured_steps == measured
    assert 0 <= counter.super_critical_steps <= measured
    assert counter.catapults == names.count("catapult_recovered") <= names.count("catapult_started")
    half = len(rows) // 2
    first, _ = count(rows[:half], window=window)
    resumed = CatapultCounter()
    resumed.take(resumed.parse(first.state_dict()))
    for loss, lam in rows[half:]:
        eta = None if lam is None else 2 / lam
        resumed.update(loss=loss, rate=1.0, lambda_max=lam, eta_crit=eta, window=window)
    assert resumed.state_dict() == counter.state_dict()
