"""Promise: where the critical rate is known on paper, it is that number, and training on either side of it shows it.

``test_*_closed_form``: a formula, by numpy. ``test_*_converges_below_*``: really running the optimizer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catapult_opt import critical_lr
from catapult_opt.curvature.critical import sgd_critical_lr

N, D, C = 10, 4, 3
F64 = torch.float64
TIGHT = {"tol": 1e-7, "max_matvecs": 400}


def gram_top(x: Tensor) -> float:
    """lambda_max(X^T X) by numpy's singular values."""
    return float(np.linalg.svd(x.double().numpy(), compute_uv=False)[0] ** 2)


def data(seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g, dtype=F64).to(dtype), torch.randn(N, C, generator=g, dtype=F64).to(dtype)


# ------------------------------------------------------------------------------------------------ linear regression

# name, criterion, H_out = factor * I
REDUCTIONS: list[tuple[str, Callable[[Tensor, Tensor], Tensor], float]] = [
    ("mean-over-elements", nn.MSELoss(), 2 / (N * C)),  # eta_crit = b c / lambda_max(K)
    ("sum", nn.MSELoss(reduction="sum"), 2.0),  # eta_crit = 1 / lambda_max(K)
    ("half-sum", lambda o, t: 0.5 * ((o - t) ** 2).sum(), 1.0),  # eta_crit = 2 / lambda_max(K)
    ("sum-over-n", lambda o, t: ((o - t) ** 2).sum() / N, 2 / N),  # the thesis': eta_crit = n / lambda_max(K)
    ("functional-mean", F.mse_loss, 2 / (N * C)),
    ("huber-inside-delta", nn.HuberLoss(delta=1e6), 1 / (N * C)),
    ("smooth-l1-inside-beta", nn.SmoothL1Loss(beta=1e6, reduction="sum"), 1e-6),
]
reductions = pytest.mark.parametrize(
    ("criterion", "factor"), [r[1:] for r in REDUCTIONS], ids=[r[0] for r in REDUCTIONS]
)


@reductions
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-2), (F64, 1e-4)], ids=["float32", "float64"])
def test_linear_regression_closed_form(criterion: Any, factor: float, bias: bool, dtype: Any, rel: float) -> None:
    x, y = data(dtype=dtype)
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x
    expected = factor * gram_top(design)
    torch.manual_seed(0)
    model = nn.Linear(D, C, bias=bias).to(dtype)
    assert oracle.dense(model, criterion, x, y).lambda_max == pytest.approx(expected, rel=1e-6)
    for curvature in ("ggn", "hessian"):  # the same thing for a linear model
        result = critical_lr(model, criterion, x, y, curvature=curvature, **TIGHT)
        assert result.lambda_max == pytest.approx(expected, rel=rel)
        assert result.eta_crit == pytest.approx(2 / expected, rel=rel)
        assert result.converged or dtype == torch.float32
    if isinstance(criterion, nn.MSELoss):
        ntk = critical_lr(model, criterion, x, y, **TIGHT).ntk_lambda_max
        assert ntk == pytest.approx(gram_top(design), rel=rel), "K = X X^T for each output, no reduction factor"


@reductions
def test_gradient_descent_converges_below_and_diverges_above(criterion: Any, factor: float) -> None:
    """At 0.99 and 1.01 x the measured rate; the part of the weights in the data's top direction is what grows."""
    x, y = data()
    torch.manual_seed(0)
    start = nn.Linear(D, C, bias=False).double()
    eta = critical_lr(start, criterion, x, y, **TIGHT).eta_crit
    best = torch.linalg.lstsq(x, y).solution.T
    top = torch.linalg.svd(x).Vh[0]

    def error_after(scale: float, steps: int = 300) -> tuple[float, float]:
        model = nn.Linear(D, C, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(start.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=scale * eta)
        errors = [((model.weight - best) @ top).norm().item()]
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        errors.append(((model.weight - best) @ top).norm().item())
        return errors[0], errors[1]

    before, after = error_after(0.99)
    assert after < 0.1 * before  # 0.98^300 = 2e-3
    before, after = error_after(1.01)
    assert after > 50 * before  # 1.02^300 = 380


# ---------------------------------------------------------------------------------- classification at zero weights


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logistic_regression_closed_form(reduction: str) -> None:
    """p = 1/2 everywhere: H_out = I/4 (x 1/(n c) for the mean over elements)."""
    x, _ = data()
    model = nn.Linear(D, C, bias=False).double()
    nn.init.zeros_(model.weight)
    y = (torch.arange(N * C).view(N, C) % 2).double()
    expected = gram_top(x) / 4 / (N * C if reduction == "mean" else 1)
    result = critical_lr(model, nn.BCEWithLogitsLoss(reduction=reduction), x, y, **TIGHT)
    assert result.lambda_max == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pos_weight", [0.5, 1.0, 6.0])
def test_logistic_regression_pos_weight_closed_form(pos_weight: float) -> None:
    """A positive sample's curvature counts pos_weight times: lambda_max(X^T diag(r) X) / (4 n)."""
    x, _ = data()
    y = (torch.arange(N) % 2).double().unsqueeze(1)
    rows = torch.where(y > 0, pos_weight**0.5, 1.0) * x
    model = nn.Linear(D, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([pos_weight]))
    result = critical_lr(model, criterion, x, y, **TIGHT)
    assert result.lambda_max == pytest.approx(gram_top(rows) / (4 * N), rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_softmax_regression_closed_form(reduction: str, smoothing: float) -> None:
    """p = 1/C: H_out = (I - 11^T/C)/C per sample, top eigenvalue 1/C; label smoothing does not change it."""
    x, _ = data()
    model = nn.Linear(D, C, bias=False).double()
    nn.init.zeros_(model.weight)
    criterion = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)
    expected = gram_top(x) / C / (N if reduction == "mean" else 1)
    result = critical_lr(model, criterion, x, torch.arange(N) % C, **TIGHT)
    assert result.lambda_max == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_softmax_regression_class_weights_and_ignored_closed_form(reduction: str) -> None:
    """Sample i counts w[y_i] times, ignored ones 0 times; the mean divides by the sum of the weights that count."""
    x, _ = data()
    weights = torch.tensor([0.2, 1.0, 4.0], dtype=F64)
    y = torch.arange(N) % C
    y[::4] = -100
    counted = torch.where(y >= 0, weights[y.clamp(min=0)], 0.0)
    expected = gram_top(counted.sqrt().unsqueeze(1) * x) / C / (counted.sum().item() if reduction == "mean" else 1)
    model = nn.Linear(D, C, bias=False).double()
    nn.init.zeros_(model.weight)
    result = critical_lr(model, nn.CrossEntropyLoss(weight=weights, reduction=reduction), x, y, **TIGHT)
    assert result.lambda_max == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------- two-layer linear network


class TwoLayerLinear(nn.Module):
    """f(x) = u . v x / sqrt(m): lambda_max(K) = (|u|^2 + |v|^2) x^2 / m for one sample."""

    def __init__(self, width: int = 2000, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.u = nn.Parameter(torch.randn(width, generator=g, dtype=F64))
        self.v = nn.Parameter(torch.randn(width, generator=g, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.u @ self.v * x / len(self.u) ** 0.5


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * ((output - target) ** 2).sum()


X1, Y1 = torch.tensor([1.3], dtype=F64), torch.tensor([1.0], dtype=F64)


def two_layer_ntk(model: TwoLayerLinear) -> float:
    return ((model.u @ model.u + model.v @ model.v) * X1**2 / len(model.u)).item()


def two_layer_losses(in_units_of_lambda: float, seed: int, steps: int = 600) -> tuple[list[float], float, float]:
    """Losses at the rate ``in_units_of_lambda`` / lambda (2 is the critical one); lambda at the start and the end."""
    model = TwoLayerLinear(seed=seed)
    eta_crit = critical_lr(model, half_square, X1, Y1, **TIGHT).eta_crit
    start = two_layer_ntk(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=in_units_of_lambda / 2 * eta_crit)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = half_square(model(X1), Y1)
        losses.append(loss.item())
        if not losses[-1] < 1e20:
            break
        loss.backward()
        optimizer.step()
    return losses, start, two_layer_ntk(model)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_layer_linear_net_closed_form(seed: int) -> None:
    model = TwoLayerLinear(seed=seed)
    result = critical_lr(model, half_square, X1, Y1, **TIGHT)
    assert result.lambda_max == pytest.approx(two_layer_ntk(model), rel=1e-4)
    assert result.eta_crit == pytest.approx(2 / two_layer_ntk(model), rel=1e-4)
    mse = critical_lr(model, nn.MSELoss(), X1, Y1, **TIGHT)  # without the half: twice the curvature, the same NTK
    assert mse.lambda_max == pytest.approx(2 * two_layer_ntk(model), rel=1e-4)
    assert mse.ntk_lambda_max == pytest.approx(two_layer_ntk(model), rel=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [1.0, 1.9])
def test_two_layer_linear_net_converges_below_critical_without_a_rise(k: float, seed: int) -> None:
    losses, start, end = two_layer_losses(k, seed)
    assert losses[-1] < 1e-12
    assert all(b <= a for a, b in itertools.pairwise(losses) if a > 1e-20)
    assert end == pytest.approx(start, rel=2e-2), "lazy: the NTK hardly moves"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [2.2, 3.0, 3.9])
def test_two_layer_linear_net_converges_below_four_by_a_catapult(k: float, seed: int) -> None:
    losses, start, end = two_layer_losses(k, seed)
    assert losses[1] > losses[0]
    assert max(losses) > 2 * losses[0]
    assert losses[-1] < 1e-12
    assert end < 0.95 * start
    assert k / start < 2 / end, "the rate has become sub-critical"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [4.1, 5.0])
def test_two_layer_linear_net_diverges_above_four(k: float, seed: int) -> None:
    losses, _, _ = two_layer_losses(k, seed)
    assert not losses[-1] < 1e20


# ------------------------------------------------------------------------------ critical rate of the base update


def settings(**kwargs: Any) -> dict[str, Any]:
    return {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, **kwargs}


LAMBDA = 3.0
BASE_UPDATES: list[tuple[str, dict[str, Any], float]] = [
    ("sgd", settings(), 2 / LAMBDA),
    ("heavy-ball-0.5", settings(momentum=0.5), 2 * 1.5 / LAMBDA),
    ("heavy-ball-0.9", settings(momentum=0.9), 2 * 1.9 / LAMBDA),
    ("nesterov-0.5", settings(momentum=0.5, nesterov=True), 3 / 2 / LAMBDA),
    ("nesterov-0.9", settings(momentum=0.9, nesterov=True), 3.8 / 2.8 / LAMBDA),
    ("dampening-as-momentum-0.5", settings(momentum=0.5, dampening=0.5), 2 * 1.5 / 0.5 / LAMBDA),
    ("dampening-as-momentum-0.9", settings(momentum=0.9, dampening=0.9), 2 * 1.9 / 0.1 / LAMBDA),
    ("dampening-0.3", settings(momentum=0.8, dampening=0.3), 2 * 1.8 / 0.7 / LAMBDA),
    ("dampening-without-momentum", settings(dampening=0.5), 2 / LAMBDA),  # torch ignores it then
    ("weight-decay", settings(weight_decay=0.7), 2 / (LAMBDA + 0.7)),
    ("heavy-ball-weight-decay", settings(momentum=0.9, weight_decay=0.7), 2 * 1.9 / (LAMBDA + 0.7)),
    ("nesterov-weight-decay", settings(momentum=0.9, nesterov=True, weight_decay=0.7), 3.8 / 2.8 / (LAMBDA + 0.7)),
    (
        "dampening-weight-decay",
        settings(momentum=0.5, dampening=0.5, weight_decay=0.7),
        2 * 1.5 / 0.5 / (LAMBDA + 0.7),
    ),
]
base_updates = pytest.mark.parametrize(
    ("kwargs", "expected"), [u[1:] for u in BASE_UPDATES], ids=[u[0] for u in BASE_UPDATES]
)


@base_updates
def test_sgd_critical_lr_closed_form(kwargs: dict[str, Any], expected: float) -> None:
    rate = sgd_critical_lr(LAMBDA, **kwargs)
    assert isinstance(rate, float)
    assert rate == pytest.approx(expected, rel=1e-12)


@base_updates
def test_sgd_converges_below_and_diverges_above_its_critical_rate(kwargs: dict[str, Any], expected: float) -> None:
    """torch.optim.SGD on a diagonal quadratic with top eigenvalue LAMBDA, in float64, at 0.99 and 1.01 x the rate."""
    d = torch.tensor([LAMBDA, 0.6 * LAMBDA, 0.1 * LAMBDA], dtype=F64)

    def late_sizes(scale: float) -> tuple[float, float]:
        w = nn.Parameter(torch.ones(3, dtype=F64))
        optimizer = torch.optim.SGD([w], lr=scale * sgd_critical_lr(LAMBDA, **kwargs), **kwargs)
        sizes = []
        for _ in range(600):
            w.grad = d * w.detach()
            optimizer.step()
            sizes.append(w.detach().norm().item())
        return max(sizes[250:300]), max(sizes[-50:])  # windows: momentum makes it oscillate

    middle, end = late_sizes(0.99)
    assert end < 0.9 * middle
    assert end < 0.5
    middle, end = late_sizes(1.01)
    assert end > 1.1 * middle


def test_sgd_critical_lr_defaults_are_plain_gradient_descent() -> None:
    assert sgd_critical_lr(4.0) == 0.5


def test_sgd_critical_lr_of_no_curvature() -> None:
    """A collapsed network: no rate is too large; with weight decay, the decay alone bounds it."""
    assert sgd_critical_lr(0.0) == math.inf
    assert sgd_critical_lr(0.0, weight_decay=0.5) == pytest.approx(4.0)


def test_model_with_momentum_at_its_own_critical_rate() -> None:
    """Measured lambda_max and the formula together: a linear regression under Nesterov and weight decay."""
    x, y = data()
    kwargs = settings(momentum=0.9, nesterov=True, weight_decay=0.1)
    criterion = nn.MSELoss()
    model = nn.Linear(D, C, bias=False).double()
    eta = sgd_critical_lr(critical_lr(model, criterion, x, y, **TIGHT).lambda_max, **kwargs)
    final = []
    for scale in (0.98, 1.02):
        torch.manual_seed(0)
        model = nn.Linear(D, C, bias=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=scale * eta, **kwargs)
        for _ in range(800):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        final.append(loss.item())
    assert final[0] < 10
    assert not final[1] < 1e3
