"""Promise: all parameters move at the one rate that the critical one was measured for, matrices and vectors alike.

Oracle: the explicit float64 Jacobian.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import Training, noise

from catapult_opt import CatapultPolicy


def train(**settings: Any) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 2)).double()
    return Training("CatapultSGD", model, noise(12, 5, 2, dtype=torch.float64), **settings)


def top_curvature(model: nn.Module, x: Tensor) -> float:
    """Of G for the MSE over all 24 outputs: H_out = 2/24."""
    params = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)).flatten())(params)
    columns = [j.reshape(24, -1) for j in jacobian.values()]
    return float(torch.linalg.svdvals(torch.cat(columns, 1).detach())[0] ** 2) * 2 / 24


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_critical_rate_and_update(momentum: float) -> None:
    training = train(momentum=momentum)
    training.backward()
    params = list(training.model.parameters())
    before = [p.detach().clone() for p in params]
    truth = 2 * (1 + momentum) / top_curvature(training.model, training.x)
    training.optimizer.step()
    assert training.watch.last.eta_crit == pytest.approx(truth, rel=2e-3)
    [rate] = training.rates()
    for p, w in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), w - rate * p.grad, rtol=1e-12, atol=1e-12)


def test_a_model_of_vectors_alone_moves_at_the_whole_rate() -> None:
    class Diagonal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    training = Training("CatapultSGD", Diagonal(), (torch.ones(3, 4), torch.zeros(3, 4)))
    training.step()
    assert training.watch.last.eta_crit == pytest.approx(4.0, rel=5e-3)  # 2 / (2/12 * 3); differences in float32
    w = training.model.w
    torch.testing.assert_close(w.detach(), 1 - training.rates()[0] * w.grad)


def test_the_end_of_a_spike_brings_the_momentum_to_rest() -> None:
    """On the step that ends a spike, the update is that of plain SGD."""
    policy = CatapultPolicy(start=0.5, climb=0.5, creep=0.5, hold=1, height=1e-2)
    training = train(policy=policy, momentum=0.9)
    phases = []
    for _ in range(60):
        before = [p.detach().clone() for p in training.model.parameters()]
        training.step()
        phases.append(training.watch.phase)
        if phases[-2:] in (["spike", "back"], ["calm", "back"]):
            [rate] = training.rates()
            for p, w in zip(training.model.parameters(), before, strict=True):
                torch.testing.assert_close(p.detach(), w - rate * p.grad, rtol=1e-12, atol=1e-12)
            return
    pytest.fail(f"no catapult in 60 steps: {phases}")
