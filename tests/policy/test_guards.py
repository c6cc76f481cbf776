"""Promise: each guard of the policy is needed. Every test trains with the guard and with it taken out.

Oracle: the outcome of the unguarded run, which is the failure that the guard is there for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from catapult_opt import CatapultPolicy, CatapultSGD, policy
from catapult_opt.policy import Catapulter, Decision

GUARDED = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])


class Run:
    """A training of a small ReLU net on a product of two inputs; `disturb` may change batch or weights of a step."""

    def __init__(
        self,
        settings: CatapultPolicy,
        steps: int = 200,
        disturb: Callable[[int, nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        bias: bool = True,  # of the output
    ) -> None:
        torch.manual_seed(0)
        x = torch.randn(200, 10)
        y = x[:, :1] * x[:, 1:2]
        self.model, criterion = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1, bias)), nn.MSELoss()
        optimizer = CatapultSGD(self.model.parameters(), model=self.model, criterion=criterion, policy=settings)
        self.losses: list[float] = []
        for step in range(1, steps + 1):
            batch = (x, y) if disturb is None else disturb(step, self.model, x, y)
            optimizer.zero_grad()
            loss = criterion(self.model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            self.losses.append(loss.item())

    @property
    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.model.parameters())


def no_restore(machine: Catapulter, step: int, loss: float) -> Decision:
    return Decision(machine.rate, machine.phase)


@GUARDED
def test_snapshot_brings_back_a_spike_that_diverges(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand times the critical rate is beyond any limit (4 / lambda, 12 / lambda), and a step is soon too much."""
    if not guarded:
        monkeypatch.setattr(Catapulter, "_undo", no_restore)
    run = Run(CatapultPolicy(kappa=1000.0, ceiling=1e5))
    assert run.finite is guarded
    assert (run.losses[-1] < run.losses[0]) is guarded


@GUARDED
def test_a_batch_of_nan_leaves_no_trace(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guarded:
        monkeypatch.setattr(Catapulter, "_undo", no_restore)

    def spoil(step: int, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * math.nan if step == 30 else x), y

    run = Run(CatapultPolicy(), disturb=spoil)
    assert run.finite is guarded


@GUARDED
def test_quench_cools_a_spike_while_it_can_come_back(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to the end, a spike at six times the critical rate goes on to where only the snapshot helps."""
    settings = CatapultPolicy(ripe=1.0, kappa=6.0)
    if not guarded:
        monkeypatch.setattr(Catapulter, "_paid", lambda *_: False)
        settings = CatapultPolicy(ripe=1.0, kappa=6.0, ceiling=1e12, fatal=1e12)
    run = Run(settings, steps=60)
    assert (max(run.losses) < 1e6 * run.losses[0]) is guarded


@GUARDED
def test_clamp_lowers_the_rate_when_the_curvature_rises(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs four times as large are a curvature sixteen times as high: the held rate is far too high from then on."""
    monkeypatch.setattr(Catapulter, "_undo", no_restore)  # which would bring the unguarded run back in the end
    if not guarded:
        monkeypatch.setattr(Catapulter, "_rate", lambda machine, _: machine.rate)

    def enlarge(step: int, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (4 * x if step >= 12 else x), y

    run = Run(CatapultPolicy(ripe=1.0), steps=60, disturb=enlarge)
    assert run.finite is guarded


def kill_at(dying: int) -> Callable[[int, nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """All units of the hidden layer dead at that step."""

    def kill(step: int, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if step == dying:
            with torch.no_grad():
                model[0].bias.fill_(-100.0)
        return x, y

    return kill


@GUARDED
def test_a_collapse_is_undone(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All units die within an attempt: without a curvature any rate would do, and nothing would ever change again."""
    if not guarded:
        monkeypatch.setattr(policy, "_COLLAPSED", math.inf)

    run = Run(CatapultPolicy(ripe=1.0), steps=300, disturb=kill_at(20), bias=False)
    assert (run.losses[-1] < 0.5 * run.losses[0]) is guarded


@GUARDED
def test_a_net_that_died_behind_its_output_bias_is_brought_back(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curvature of the bias is left, and the loss is that of the mean: neither looks like a collapse."""
    if not guarded:
        monkeypatch.setattr(Catapulter, "_lost", lambda *_: False)
    run = Run(CatapultPolicy(ripe=0.5), steps=400, disturb=kill_at(200))
    assert min(run.losses[:199]) < 0.5 * run.losses[0]
    assert (min(run.losses[300:]) < 0.5 * run.losses[0]) is guarded


@GUARDED
def test_a_spike_that_never_recovers_is_given_up(guarded: bool) -> None:
    """The old level is out of reach, say of data that have become harder: without an end to the waiting it cools on."""
    machine = Catapulter(CatapultPolicy(patience=100 if guarded else 10**6))
    losses = [10.0, 1.0] + [3.0] * 300
    phases = [machine.update(step=i, loss=loss, eta_crit=1.0).phase for i, loss in enumerate(losses, 1)]
    assert phases[50] == "cool"
    assert ("arm" in phases[50:]) is guarded
