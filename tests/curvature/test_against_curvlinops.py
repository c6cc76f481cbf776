"""An independent package agrees: lambda_max is the top eigenvalue of curvlinops' GGN (by scipy's eigsh, float64).

Skipped where curvlinops is not installed: pip install --no-deps -r constraints-bench.txt
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import catapult_opt

curvlinops = pytest.importorskip("curvlinops")

N, CLASSES = 7, 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def cnn() -> nn.Module:
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 2)
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES))


def batchnorm() -> nn.Module:
    """In train mode; without running statistics, which curvlinops' vmap cannot update."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


class Attention(nn.Module):
    """Rows of the image as tokens; attention written out, since the fused kernel has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        return self.head(self.norm(mixed).mean(1))


def curvlinops_lambda_max(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> float:
    params = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.GGNLinearOperator(model, criterion, params, [(x, y)]).to_scipy(dtype=np.float64)
    matvec = LinearOperator(operator.shape, matvec=operator.matvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    return float(eigsh(matvec, k=1, which="LA", v0=start, return_eigenvectors=False)[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss])
@pytest.mark.parametrize("architecture", [mlp, cnn, batchnorm, Attention])
def test_lambda_max_is_that_of_curvlinops(
    architecture: Callable[[], nn.Module], loss: Callable[..., nn.Module], reduction: str
) -> None:
    torch.manual_seed(0)
    model, criterion = architecture(), loss(reduction=reduction)
    x = torch.randn(N, 1, 8, 8)
    y = torch.randint(CLASSES, (N,)) if loss is nn.CrossEntropyLoss else torch.rand(N, CLASSES)
    single = catapult_opt.critical_lr(model, criterion, x, y, engine="finite-difference", tol=1e-4)
    model.double()
    x, y = x.double(), y if y.dtype == torch.long else y.double()
    truth = curvlinops_lambda_max(model, criterion, x, y)
    assert single.eta_crit == pytest.approx(2 / truth, rel=2e-3)
    for engine in ("finite-difference", "double-backward"):
        found = catapult_opt.critical_lr(model, criterion, x, y, engine=engine, tol=1e-5)
        assert found.lambda_max == pytest.approx(truth, rel=1e-4), engine
