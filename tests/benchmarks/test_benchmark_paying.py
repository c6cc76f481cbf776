"""The study of what makes a catapult pay: its records against a training without them, its statistics against others.

Its figures are not tested. Everything here runs on a task of a few dozen samples.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import paying  # noqa: E402
from tasks import TASKS, Problem, Task, draw  # noqa: E402

from catapult_opt import CatapultSGD, critical_lr  # noqa: E402
from catapult_opt.analysis.tasks import Split  # noqa: E402

sys.path.remove(str(BENCHMARKS))

TASK = Task("tiny", "rank-2", "mlp", depth=2, width=64, train=100, steps=150, d=10, val=50, test=50)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return draw(TASK, None, 0)


@pytest.fixture(scope="module")
def rows(problem: Problem) -> list[paying.Row]:
    return paying.catapults(problem, 0, later=10)


def test_a_row_is_what_a_training_without_the_study_went_through(problem: Problem, rows: list[paying.Row]) -> None:
    torch.manual_seed(10_000)
    model, loss_of = problem.build(), nn.MSELoss()
    torch.manual_seed(0)
    optimizer = CatapultSGD(model.parameters(), model=model, criterion=loss_of)
    val, losses, phases = [], [], []
    for _ in range(TASK.steps):
        val.append(problem.loss(model, problem.val))
        optimizer.zero_grad()
        loss = loss_of(model(problem.train.inputs), problem.train.targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        phases.append(optimizer.phase)
    assert len(rows) >= 2
    for row in rows:
        end = row["step"]
        start = end - row["length"]
        under_way = [phase in paying.UNDER_WAY for phase in phases]
        assert not under_way[start - 1] and all(under_way[start:end]) and not under_way[end]
        assert row["plain"] == pytest.approx(math.log(val[start] / val[end]), rel=1e-5)
        assert row["peak"] == pytest.approx(max(losses[start : end + 1]) / losses[0], rel=1e-6)
        assert row["rise"] == pytest.approx(max(losses[start : end + 1]) / losses[start], rel=1e-5)
        assert row["hot"] == sum(phase in paying.HIGH for phase in phases[start:end])


def test_the_copy_trains_at_four_fifths_of_the_critical_rate(problem: Problem) -> None:
    torch.manual_seed(3)
    model = problem.build()
    [p.requires_grad_(False) for p in model.parameters() if p.ndim < 2]  # so that no parameter has a rate of its own
    first = critical_lr(model, nn.MSELoss(), problem.train.inputs, problem.train.targets).eta_crit
    rates = paying.below(problem, model, itertools.repeat(torch.arange(TASK.train), 60))
    last = critical_lr(model, nn.MSELoss(), problem.train.inputs, problem.train.targets).eta_crit
    assert rates[0] == pytest.approx(0.8 * first, rel=0.02)
    assert rates[-1] == pytest.approx(0.8 * last, rel=0.02)


def test_dead_units_are_those_that_no_sample_wakes() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        model[0].bias.zero_()
    assert paying.dead_share(model, torch.tensor([[1.0, 1.0], [2.0, 3.0]])) == 0.5
    assert paying.dead_share(model, torch.tensor([[1.0, 1.0], [-2.0, 3.0]])) == 0.25


@pytest.mark.parametrize(("along", "share"), [(0, 1.0), (8, 0.0)])
def test_the_top_share_is_that_of_the_direction_that_grew(along: int, share: float) -> None:
    """A linear model, whose kernel X X^T never changes: the outputs move along one of its eigenvectors alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(12, 9, generator=generator)).Q * torch.arange(9, 0, -1)
    problem = Problem(TASK, Split(x, torch.zeros(12, 1)), *[Split(x, torch.zeros(12, 1))] * 2)
    before, peak = nn.Linear(9, 1, bias=False), nn.Linear(9, 1, bias=False)
    with torch.no_grad():
        before.weight.fill_(0.1)
        peak.weight.copy_(before.weight)
        peak.weight[0, along] += 5.0
    assert paying.top_share(problem, before, peak) == pytest.approx(share, abs=1e-4)


def made_up(n: int, task: str, shift: float, seed: int) -> list[paying.Row]:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(n)
    a, b = z + rng.standard_normal(n), z + rng.standard_normal(n)
    return [
        {"task": task, "seed": i % 3, "a": x + shift, "b": y - shift, "z": w}
        for i, (x, y, w) in enumerate(zip(a, b, z, strict=True))
    ]


def test_correlations_are_those_of_scipy_within_a_task_and_not_between_tasks() -> None:
    one, other = made_up(40, "one", 0.0, 0), made_up(40, "other", 100.0, 1)
    expected = spearmanr([row["a"] for row in one], [row["b"] for row in one]).statistic
    assert paying.correlation(one, "a", "b") == pytest.approx(expected)
    assert paying.correlation(one + other, "a", "b") > 0.2  # of all 80 together it is below -0.5
    assert spearmanr([r["a"] for r in one + other], [r["b"] for r in one + other]).statistic < -0.5
    assert math.isnan(paying.correlation([{**row, "a": 1.0} for row in one], "a", "b"))


def test_what_is_taken_out_is_taken_out() -> None:
    """Against the correlation of the residuals of a regression; a and b have nothing in common but z."""
    rows = made_up(400, "one", 0.0, 2)
    ranks = [np.argsort(np.argsort([row[key] for row in rows])) for key in "abz"]
    left = [y - np.polyval(np.polyfit(ranks[2], y, 1), ranks[2]) for y in ranks[:2]]
    found = paying.correlation(rows, "a", "b", "z")
    assert found == pytest.approx(np.corrcoef(*left)[0, 1])
    assert abs(found) < 0.15 < 0.35 < paying.correlation(rows, "a", "b")


def test_the_interval_has_the_width_of_theory() -> None:
    """Of a mean of n numbers of standard deviation 1: 2 * 1.96 / sqrt(n)."""
    units = [[{"v": float(v)}] for v in np.random.default_rng(5).standard_normal(400)]
    low, high = paying.interval(units, lambda rows: float(np.mean([row["v"] for row in rows])))
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert math.isnan(paying.interval(units[:3], lambda rows: 1.0)[0])


def test_the_command_prints_both_tables_and_keeps_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "rank2", TASK)
    monkeypatch.setattr(paying, "_RESAMPLES", 20)
    assert paying.main(["--tasks", "rank2", "--seeds", "2", "--later", "5", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "gain later" in out and "share of the rise in the top eigenspace" in out
    kept = [json.loads(line) for line in (tmp_path / "catapults.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in kept} == {0, 1}
    assert paying.main(["--tasks", "horse-truck", "--out", str(tmp_path)]) == 1  # no data
