"""Promise: each guard of the policy is needed. Every test trains with the guard and with it taken out.

Oracle: the outcome of the unguarded run, which is the failure that the guard is there for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from catapult_opt import CatapultPolicy, CatapultSGD
from catapult_opt.policy import Catapulter, Decision

GUARDED = pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])


class Run:
    """A training of a small ReLU net on a product of two inputs; `disturb` may change batch or weights of a step."""

    def __init__(
        self,
        settings: CatapultPolicy,
        steps: int = 200,
        disturb: Callable[[int, nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        torch.manual_seed(0)
        x = torch.randn(200, 10)
        y = x[:, :1] * x[:, 1:2]
        self.model, criterion = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1)), nn.MSELoss()
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


def no_restore(machine: Catapulter, step: int, loss: float, window: int) -> Decision:
    return Decision(machine.rate, machine.phase, 0.0)


@GUARDED
def test_the_average_brings_back_a_training_that_diverges(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate that doubles every step, up to a million times the height that spikes may have."""
    if not guarded:
        monkeypatch.setattr(Catapulter, "_undo", no_restore)
    run = Run(CatapultPolicy(start=1.0, near=1.0, creep=1.0, height=1e6), steps=80)
    assert max(run.losses) > 1e12 * run.losses[0] or not run.finite, "it diverged"
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
def test_a_spike_is_ended_while_it_can_come_back(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held however high the loss is, it goes on to where only the average helps, which is not there to help."""
    monkeypatch.setattr(Catapulter, "_undo", no_restore)
    if not guarded:
        monkeypatch.setattr(Catapulter, "_highest", lambda machine: math.inf)
    run = Run(CatapultPolicy(start=1.0, near=1.0, creep=0.3, hold=40), steps=60)
    assert (max(run.losses) < 1e6 * run.losses[0]) is guarded
    assert (run.losses[-1] < run.losses[0]) is guarded


@GUARDED
def test_back_below_the_edge_where_the_curvature_has_risen(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs twice as large are a curvature four times as high: the rate before is too high from then on."""
    monkeypatch.setattr(Catapulter, "_undo", no_restore)  # which would bring the unguarded run back in the end
    if not guarded:
        monkeypatch.setattr(Catapulter, "rate", property(lambda machine: machine._state.rate))

    def enlarge(step: int, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (2 * x if step >= 12 else x), y

    run = Run(CatapultPolicy(start=1.0, near=1.0, creep=0.02, hold=2), steps=60, disturb=enlarge)
    assert run.finite is guarded
    assert (run.losses[-1] < run.losses[0]) is guarded


@GUARDED
def test_a_spike_that_never_recovers_is_given_up(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old level is out of reach, say of data that have become harder: without an end the waiting goes on."""
    if not guarded:
        monkeypatch.setattr(Catapulter, "_patience", lambda machine, window: 10**6)
    machine = Catapulter(CatapultPolicy())
    losses = [10.0] + [1.0] * 100 + [3.0] * 300
    phases = [machine.update(step=i, loss=loss, eta_crit=1.0).phase for i, loss in enumerate(losses, 1)]
    assert phases[150] == "back"
    assert ("calm" in phases[150:]) is guarded
