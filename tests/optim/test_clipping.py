"""Promise: clipping gradients changes the update, not what is measured.

Oracle: the gradients themselves, and the same training without clipping.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from catapult_opt import CatapultSGD


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_gradients(clip: str) -> None:
    found = []
    for limit in (None, 1e-3):
        torch.manual_seed(0)
        model, criterion = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double(), nn.MSELoss()
        optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
        criterion(model(torch.randn(6, 4).double()), torch.randn(6, 1).double()).backward()
        if limit is not None and clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        elif limit is not None:
            nn.utils.clip_grad_value_(model.parameters(), limit)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        rate = optimizer.param_groups[0]["effective_lr"]
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, torch.add(old, p.grad, alpha=-rate))
        found.append((optimizer.last, rate))
    assert found[0] == found[1]
