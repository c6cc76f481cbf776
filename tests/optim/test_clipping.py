"""Promise: clipping gradients changes the update, not what is measured.

Oracle: the gradients themselves, and the same training without clipping.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import Training, net, noise


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_gradients(clip: str) -> None:
    found = []
    for limit in (None, 1e-3):
        training = Training("CatapultSGD", net(4, 8, 1).double(), noise(6, 4, dtype=torch.float64))
        training.backward()
        if limit is not None and clip == "norm":
            nn.utils.clip_grad_norm_(training.model.parameters(), limit)
        elif limit is not None:
            nn.utils.clip_grad_value_(training.model.parameters(), limit)
        before = [p.detach().clone() for p in training.model.parameters()]
        training.optimizer.step()
        [rate] = training.rates()
        for p, old in zip(training.model.parameters(), before, strict=True):
            assert torch.equal(p, torch.add(old, p.grad, alpha=-rate))
        found.append((training.watch.last, rate))
    assert found[0] == found[1]
