"""Promise: measuring keeps to the share of the time it was given, and log and report say what it took.

Oracle: a clock of the test's own, on which a step takes one second and a measurement ten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from training import Training, net, noise

from catapult_opt import observer, read_log, schedule
from catapult_opt.report import summarize

STEP, PROBE = 1.0, 10.0


class Clock:
    """Seconds pass where the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, measure = Clock(), observer.measure

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.now += PROBE
        return measure(*args, **kwargs)

    monkeypatch.setattr(observer, "time", clock)
    monkeypatch.setattr(schedule, "time", clock)
    monkeypatch.setattr(observer, "measure", slow)
    return clock


def train(clock: Clock, steps: int, face: str, **settings: Any) -> Any:
    training = Training(face, net(3, 8, 1, activation=nn.ReLU), noise(16, 3), **settings)
    for _ in range(steps):
        clock.now += STEP
        training.step()
    training.watch.detach()
    return training.watch


@pytest.mark.parametrize("face", ["CatapultSGD", "CatapultMonitor"])
@pytest.mark.parametrize("overhead", [0.05, 0.2])
def test_spends_its_share_and_no_more(clock: Clock, tmp_path: Path, face: str, overhead: float) -> None:
    train(clock, 800, face, overhead=overhead, every=1, log=tmp_path / "run.jsonl")
    log = read_log(tmp_path / "run.jsonl")
    spent, when = 0.0, 0.0
    for record in log.measured[:-1]:
        when += record["elapsed"]
        # The last one of the sum was begun within the budget, and the first is never left out.
        assert spent <= overhead * when + PROBE
        spent += record["probe_seconds"]
    assert spent == pytest.approx(overhead * clock.now, abs=2 * PROBE)


def test_without_a_limit_every_step_is_measured(clock: Clock, tmp_path: Path) -> None:
    train(clock, 30, "CatapultMonitor", every=1, log=tmp_path / "run.jsonl")
    assert len(read_log(tmp_path / "run.jsonl").measured) == 30


def test_report_says_what_measuring_took_and_how_old_rates_got(clock: Clock, tmp_path: Path) -> None:
    train(clock, 41, "CatapultMonitor", every=10, log=tmp_path / "run.jsonl")
    log = read_log(tmp_path / "run.jsonl")
    summary = summarize(log)
    assert [r["step"] for r in log.measured] == [1, 11, 21, 31, 41]
    assert summary.probe_seconds == pytest.approx(5 * PROBE)
    # The clock runs from the first step's measurement to the last one.
    assert summary.probe_share == pytest.approx(5 * PROBE / (5 * PROBE + 40 * STEP))
    assert summary.oldest == 9
    assert summary.extra_bytes == 4 * (3 * 8 + 8 + 8 + 1)  # one float32 vector of the parameters


def test_a_controller_keeps_two_copies_of_the_parameters(clock: Clock, tmp_path: Path) -> None:
    optimizer = train(clock, 3, "CatapultSGD", log=tmp_path / "run.jsonl")
    kept = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t is not None)
    assert summarize(read_log(tmp_path / "run.jsonl")).extra_bytes == kept
