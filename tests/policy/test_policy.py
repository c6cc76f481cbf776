"""The policy with numbers alone: what it decides for hand-written losses and critical rates."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from dataclasses import fields
from typing import Any

import pytest

from catapult_opt.policy import Catapulter, CatapultPolicy, Decision


def run(
    losses: list[float],
    eta: float | list[float | None] = 1.0,
    *,
    window: int = 1,
    squared_error: bool = True,
    machine: Catapulter | None = None,
    **settings: Any,
) -> list[Decision]:
    machine = machine or Catapulter(CatapultPolicy(**settings))
    etas = eta if isinstance(eta, list) else [eta] * len(losses)
    return [
        machine.update(step=i, loss=loss, eta_crit=e, window=window, squared_error=squared_error)
        for i, (loss, e) in enumerate(zip(losses, etas, strict=True), 1)
    ]


def falling(steps: int) -> list[float]:
    return [1.0 - i / (2 * steps) for i in range(steps)]


def phases(decisions: list[Decision]) -> list[str]:
    return [phase for phase, _ in itertools.groupby(d.phase for d in decisions)]


def test_climbs_to_near_the_edge_then_creeps_across_it() -> None:
    rates = [d.rate for d in run(falling(150), start=0.1, climb=0.05, near=0.5, creep=0.02)]
    assert rates[:3] == pytest.approx([0.1 * 1.05, 0.1 * 1.05**2, 0.1 * 1.05**3])
    reached = next(i for i, rate in enumerate(rates) if rate == 0.5)
    assert rates[reached : reached + 50] == pytest.approx([0.5 * 1.02**i for i in range(50)])
    assert rates[reached + 40] > 1.0


def test_creeps_a_fifth_as_fast_on_mini_batches() -> None:
    rates = [d.rate for d in run(falling(150), start=0.5, near=0.5, creep=0.02, window=20)]
    assert rates[1] / rates[0] == pytest.approx(1.004)


def test_never_creeps_beyond_six_edges() -> None:
    assert run([1.0] * 1000)[-1].rate == pytest.approx(6.0)


def test_any_other_loss_climbs_slower_and_stays_below_the_edge() -> None:
    decisions = run(falling(1000), squared_error=False, start=0.1, climb=0.05, reach=0.7)
    assert decisions[0].rate == pytest.approx(0.1 * 1.01)
    assert decisions[-1].rate == pytest.approx(0.7)
    assert {d.phase for d in decisions} == {"calm"}


def test_below_the_edge_the_rate_follows_it_down_only_once_above_it() -> None:
    """The network sharpens until the edge is at the rate: a rate that gave way would be followed for ever."""
    machine = Catapulter(CatapultPolicy(start=0.7, reach=0.7, catapults=False))
    edges: list[float | None] = [1.0, 1.0, 0.75, 0.66, 0.6]
    assert [d.rate for d in run([1.0] * 5, edges, machine=machine)] == pytest.approx([0.7, 0.7, 0.7, 0.7, 0.42])


@pytest.mark.parametrize(("override", "squared_error"), [(False, True), (None, False)])
def test_a_rise_without_catapults_halves_the_rate_at_once(override: bool | None, squared_error: bool) -> None:
    before, after = run([*falling(300), 3.0], catapults=override, squared_error=squared_error)[-2:]
    assert (before.phase, after.phase) == ("calm", "back")
    assert after.rate == pytest.approx(before.rate / 2)


def test_catapults_can_be_allowed_for_any_loss() -> None:
    assert run(falling(300), catapults=True, squared_error=False)[-1].rate > 1.0


def catapult(gain: float, peak: float = 2.0) -> list[Decision]:
    """100 calm steps, a spike of fifteen, back; the edge comes to `gain` times what it was."""
    losses = [*falling(100), *[peak] * 15, 0.4, 0.4]
    return run(losses, [*[1.0] * 100, *[gain] * 17], height=100.0, hold=10)


def test_a_whole_catapult_goes_through_spike_and_back_to_calm() -> None:
    decisions = catapult(3.0)
    assert phases(decisions) == ["calm", "spike", "back", "calm"]
    assert [d.phase for d in decisions].count("spike") == 11  # the first step of it and ten more
    held = [d.rate for d in decisions if d.phase == "spike"]
    assert held == [held[0]] * 11
    assert held[0] > 1.0
    assert all(d.rate <= 0.5 * 3.0 + 1e-9 for d in decisions if d.phase == "back")


def test_the_average_takes_calm_weights_in_is_frozen_in_a_catapult_and_begun_anew_after_it() -> None:
    decisions = catapult(3.0)
    weights = [d.average for d in decisions]
    assert weights[:4] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert weights[60] == pytest.approx(1 / 50)
    assert {d.average for d in decisions if d.phase != "calm"} == {0.0}
    assert weights[115] == 1.0


def test_below_the_edge_the_last_known_one_counts_until_the_next_measurement() -> None:
    losses = [*falling(100), *[2.0] * 15]
    edges: list[float | None] = [1.0, 1.0, *[None] * 110, 0.25, None, None]
    decisions = run(losses, edges, height=100.0)
    entered = next(i for i, d in enumerate(decisions) if d.phase == "back")
    assert decisions[entered].rate == pytest.approx(0.5)
    assert decisions[entered].measure_in == 1 and decisions[entered].brake
    assert [d.rate for d in decisions[entered + 1 :]] == pytest.approx([0.5 * 0.25] * 3)


def test_a_spike_above_the_height_is_ended_at_once() -> None:
    """The level has fallen by .4 to .6 when it comes: eight falls above it are 3.8."""
    low, high = (run([*falling(100), 2.0, 2.0, top], height=8.0)[-1] for top in (3.6, 4.0))
    assert (low.phase, high.phase) == ("spike", "back")


def test_a_spike_that_gained_nothing_lets_the_next_go_higher() -> None:
    for gain, higher in ((1.0, 4.0), (3.0, 1.0)):
        machine = Catapulter(CatapultPolicy(height=100.0))
        run([*falling(100), *[2.0] * 15, 0.4], [*[1.0] * 105, *[gain] * 11], machine=machine)
        assert machine.phase == "calm"
        assert machine.state_dict()["height"] == 100.0 * higher


def test_a_small_rise_is_no_spike_where_the_losses_vary_as_much() -> None:
    wiggling = [1.0 + 0.1 * (-1) ** i for i in range(200)]
    assert {d.phase for d in run(wiggling, window=20)} == {"calm"}
    assert run([*wiggling, *[1.2] * 20], window=20)[-1].phase == "spike"


@pytest.mark.parametrize(("stays", "undone"), [(0.65, False), (0.95, True)])
def test_a_catapult_that_does_not_come_back_is_given_up(stays: float, undone: bool) -> None:
    """Training goes on from there, or, with half of what was learned lost, from the average; once."""
    decisions = run([*falling(100), *[stays] * 400])
    assert phases(decisions)[:4] == ["calm", "spike", "back", "calm"]
    assert sum(d.restore for d in decisions) == undone
    assert decisions[-1].phase == "calm"


def test_one_that_ends_above_where_the_training_began_is_undone() -> None:
    decisions = run([*falling(100), *[2.0] * 113])
    assert [d.restore for d in decisions].count(True) == 1
    assert decisions[-1].restore


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e8, 1e200])
def test_a_blow_up_in_a_catapult_is_undone_and_the_rate_halved(loss: float) -> None:
    before, after = run([*falling(100), 2.0, loss], [1.0, 1.0, *[None] * 100])[-2:]
    assert before.phase == "spike"
    assert (after.restore, after.brake, after.average, after.measure_in) == (True, True, 0.0, 1)
    assert after.rate == pytest.approx(before.rate / 2)
    assert [name for name, _ in after.events] == ["restore"]


def test_a_spoiled_batch_among_calm_ones_is_not_the_rates_fault() -> None:
    before, *spoiled, after = run([*falling(100), math.nan, math.nan, math.nan, 0.5])[-5:]
    assert all(d.restore for d in spoiled)
    assert {d.rate for d in spoiled} == {before.rate}
    assert after.rate == pytest.approx(1.02 * before.rate)


def test_weights_that_somebody_put_in_are_not_undone() -> None:
    for told in (True, False):
        machine = Catapulter(CatapultPolicy(start=0.1, climb=0.001))
        run(falling(60), machine=machine)
        if told:
            machine.begin_anew()
        first, second = run([1e8, 1e8], machine=machine)
        assert first.restore is not told
        assert not second.restore  # what was put back is not to blame
        assert (first.average if told else second.average) == 1.0


def test_a_catapult_in_which_units_die_is_undone() -> None:
    machine = Catapulter(CatapultPolicy(start=0.9, near=0.9, hold=3))
    run(falling(30), machine=machine)
    spike = run([5.0, 5.0], [None, math.inf], machine=machine)
    assert [d.phase for d in spike] == ["spike", "calm"]
    assert [d.restore for d in spike] == [False, True]


def test_a_first_batch_without_curvature_makes_a_small_step_and_the_next_edge_counts() -> None:
    rates = [d.rate for d in run([1.0, 0.9, 0.8, 0.7], [math.inf, None, 8.0, None])]
    assert rates[:2] == [1e-3, 1e-3]
    assert rates[2] == pytest.approx(0.1 * 1.05 * 8.0)


def test_the_first_two_measurements_are_believed_a_later_one_moves_the_edge_tenfold_at_most() -> None:
    machine = Catapulter(CatapultPolicy())
    edges = []
    for step, eta in enumerate([1.0, 1e-3, 1e3, 1e-3], 1):
        machine.update(step=step, loss=1.0, eta_crit=eta)
        edges.append(machine.eta_crit)
    assert edges == pytest.approx([1.0, 1e-3, 1e-2, 1e-3])


def test_on_mini_batches_the_edge_is_a_mean_but_of_other_losses_the_sharpest_batch_counts_at_once() -> None:
    for squared_error, edge in ((True, math.sqrt(0.5)), (False, 0.5)):
        machine = Catapulter(CatapultPolicy())
        run([1.0] * 3, [1.0, None, 0.5], window=20, squared_error=squared_error, machine=machine)
        assert machine.eta_crit == pytest.approx(edge)
        assert (machine.spread > 0) == squared_error


def test_with_total_steps_the_rate_falls_in_a_line_over_the_last_part() -> None:
    open_end = [d.rate for d in run([1.0] * 100)]
    known = [d.rate for d in run([1.0] * 100, total_steps=100, cooldown=0.3)]
    assert known[:69] == open_end[:69]
    assert [a / b for a, b in zip(known[70:], open_end[70:], strict=True)] == pytest.approx(
        [(30 - i) / 31 for i in range(30)]
    )


def test_measures_twice_then_as_often_as_the_share_allows() -> None:
    for window, share, pace in ((1, 0.15, 34), (20, 0.05, 100)):
        machine, asked, at = Catapulter(CatapultPolicy()), 1, []
        for step in range(1, 1000):
            here = step <= 2 or asked <= 1
            at += [step] * here
            asked = machine.update(step=step, loss=1.0, eta_crit=1.0 if here else None, window=window).measure_in
        assert at[:2] == [1, 2]
        assert {b - a for a, b in itertools.pairwise(at[-5:])} == {pace}
        assert 5 * (len(at) - 1) <= share * 1000 + 5


def test_a_rate_held_down_for_long_is_told_once() -> None:
    losses = [math.nan if i % 3 else 1.0 for i in range(3000)]
    decisions = run(losses, start=0.01, climb=1e-6)
    told = [details for d in decisions for name, details in d.events if name == "held_down"]
    assert len(told) == 1
    assert told[0]["reason"] == "losses were not finite, or blew up"
    assert told[0]["rate"] < 0.1 * told[0]["eta_crit"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_steps", -3),
        ("total_steps", True),
        ("measure_share", 1.5),
        ("catapults", "yes"),
        ("catapults", 1),
        ("start", 0.0),
        ("climb", -1.0),
        ("near", 1.5),
        ("creep", math.nan),
        ("reach", "0.7"),
        ("rise", math.inf),
        ("hold", 0),
        ("hold", 2.5),
        ("height", True),
        ("below", 0),
        ("horizon", 0),
        ("cooldown", 2),
    ],
)
def test_refuses_settings_that_mean_nothing(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        CatapultPolicy(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "now"), [("kappa", "creep"), ("cool", "below"), ("ceiling", "height"), ("follow", "reach"), ("ripe", "")]
)
def test_a_former_setting_is_refused_by_the_name_of_what_replaces_it(name: str, now: str) -> None:
    with pytest.raises(TypeError, match=f"{name} any more: " + (f"use {now}" if now else "nothing replaces it")):
        CatapultPolicy(**{name: 0.5})  # type: ignore[arg-type]


def test_at_most_fourteen_settings_that_survive_copies() -> None:
    assert len(fields(CatapultPolicy)) <= 14
    policy = CatapultPolicy(total_steps=7, near=0.4)
    assert copy.deepcopy(policy) == pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("phase", "hot"),
        ("phase", 1),
        ("since", -2),
        ("since", 1.5),
        ("since", True),
        ("rate", math.nan),
        ("rate", -1.0),
        ("rate", "fast"),
        ("var", -1e-9),
        ("log_edge", 1e9),
        ("level", math.inf),
        ("measured", None),
    ],
)
def test_a_spoiled_state_is_refused_by_name_and_leaves_the_machine_as_it_was(name: str, value: object) -> None:
    machine = Catapulter(CatapultPolicy())
    run(falling(50), machine=machine)
    before = machine.state_dict()
    with pytest.raises(ValueError, match=name):
        machine.take(machine.parse({**before, "since": 3, name: value}))
    assert machine.state_dict() == before


def test_a_state_with_entries_missing_or_too_many_is_completed() -> None:
    machine = Catapulter(CatapultPolicy(height=30.0))
    machine.take(machine.parse({"rate": 2, "of_a_later_version": [1, 2]}))
    fresh = Catapulter(CatapultPolicy(height=30.0)).state_dict()
    assert machine.state_dict() == {**fresh, "rate": 2}


def test_resumed_without_catapults_a_spike_is_ended_at_once() -> None:
    first, second = Catapulter(CatapultPolicy()), Catapulter(CatapultPolicy(catapults=False))
    run([*falling(100), 2.0], machine=first)
    assert first.phase == "spike"
    second.take(second.parse(first.state_dict()))
    decision = second.update(step=102, loss=2.0)
    assert decision.phase == "back"
    assert decision.rate <= 0.5
