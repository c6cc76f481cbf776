"""Promise: Muon is refused, with the reason; the reason is true.

Oracle: Muon itself on a quadratic. Where a critical rate exists (SGD), the loss diverges above it and vanishes below.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catapult_opt import CatapultLR, CatapultMonitor

Muon: Any = getattr(torch.optim, "Muon", None)
pytestmark = pytest.mark.skipif(Muon is None, reason="torch.optim.Muon came with torch 2.9")


@pytest.mark.parametrize("face", [CatapultLR, CatapultMonitor])
def test_refused_with_the_reason(face: Any) -> None:
    model = nn.Linear(4, 4, bias=False)
    with pytest.raises(TypeError, match="Muon's update has no critical rate"):
        face(Muon(model.parameters(), lr=0.1), model=model, criterion=nn.MSELoss())
    assert not model._forward_hooks and not model._forward_pre_hooks


def distance(kind: Any, lr: float, curvature: float, steps: int = 400, **settings: Any) -> float:
    """|w| per entry after steps on curvature/2 |w|^2, from entries of about 1."""
    w = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([w], lr=lr, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = curvature / 2 * w.square().sum()
        loss.backward()
        optimizer.step()
    return float(w.detach().norm()) / 8


def test_no_rate_is_critical() -> None:
    """At rates from a hundredth to a hundred times 2/lambda Muon ends about lr away; neither nearer nor off."""
    settings = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
    for curvature in (0.2, 20.0):
        for lr in (0.02, 0.2, 2.0):
            assert 0.05 * lr < distance(Muon, lr, curvature, **settings) < 2 * lr
    assert distance(torch.optim.SGD, 0.9 * 2 / 20, 20.0) < 1e-12
    assert not distance(torch.optim.SGD, 1.1 * 2 / 20, 20.0) < 1e12
