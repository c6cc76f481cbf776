"""Critical rates of torch's optimizers: run on quadratics, they converge just below and diverge just above."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from catapult_opt import CatapultMonitor
from catapult_opt.curvature.critical import adam_critical_lr
from catapult_opt.updates import next_update

F64 = torch.float64


def test_frozen_adam_diverges_just_above_the_closed_form() -> None:
    """Momentum m' = b m + (1-b) l w, w' = (1 - rate decay) w - rate m', iterated in plain numbers."""

    def grows(rate: float, lam: float, beta: float, decay: float) -> bool:
        w, m = 1.0, 0.0
        for _ in range(40_000):
            m = beta * m + (1 - beta) * lam * w
            w = (1 - rate * decay) * w - rate * m
            if abs(w) > 1e6:
                return True
        return False

    for lam, beta, decay in [(3.0, 0.9, 0.0), (3.0, 0.5, 0.0), (3.0, 0.9, 0.01), (0.2, 0.95, 0.1)]:
        edge = adam_critical_lr(lam, beta1=beta, decoupled_weight_decay=decay)
        assert not grows(0.999 * edge, lam, beta, decay)
        assert grows(1.001 * edge, lam, beta, decay)


MAKERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "rmsprop-centered-momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.8),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3, lr_decay=0.01),
    "sgd-two-rates": lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.02}], lr=0.1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_preconditioner_is_the_one_the_step_uses(name: str) -> None:
    """The step with momentum state cleared moves the weights by exactly rate * scale * gradient."""
    torch.manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(3, 2, dtype=F64)), nn.Parameter(torch.randn(4, dtype=F64))]
    optimizer = MAKERS[name](params)
    for _ in range(7):  # averages away from their start
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p in params:
        p.grad = torch.randn_like(p)
        for key in ("exp_avg", "momentum_buffer"):
            if optimizer.state[p].get(key) is not None:
                optimizer.state[p][key].zero_()
    before = [p.detach().clone() for p in params]
    update = next_update(optimizer)
    step = float(optimizer.state[params[0]].get("step", 0)) + 1
    optimizer.step()
    for i, (p, w) in enumerate(zip(params, before, strict=True)):
        group = optimizer.param_groups[min(i, len(optimizer.param_groups) - 1)]
        gradient = p.grad
        assert gradient is not None
        if "betas" in group:  # bias-corrected first moment of a cleared average
            gradient = gradient * (1 - group["betas"][0]) / (1 - group["betas"][0] ** step)
        decay = group["lr"] * group["weight_decay"] * w if name == "adamw" else 0.0
        scale = 1.0 if update.scale is None else update.scale[i]
        torch.testing.assert_close(w - p.detach(), update.rate * scale * gradient + decay, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_monitor_measures_the_preconditioned_curvature(name: str) -> None:
    """lambda_max(D^(1/2) G D^(1/2)) from the explicit Jacobian, D the scale of the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(12, 4, dtype=F64), torch.randn(12, 2, dtype=F64)
    criterion, params = nn.MSELoss(), list(model.parameters())
    optimizer = MAKERS[name](params)  # type: ignore[arg-type]
    monitor = CatapultMonitor(optimizer, model=model, criterion=criterion)
    for _ in range(4):
        optimizer.zero_grad()
        rows = [torch.autograd.grad(o, params, retain_graph=True) for o in model(x).flatten()]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        criterion(model(x), y).backward()
        update = next_update(optimizer)
        scale = update.scale or [1.0] * len(params)
        root = torch.cat([(torch.ones_like(p) * s).flatten() for p, s in zip(params, scale, strict=True)]).sqrt()
        truth = 2 / y.numel() * float(torch.linalg.eigvalsh((jacobian * root) @ (jacobian * root).T)[-1])
        optimizer.step()
        assert monitor.last is not None
        assert monitor.last.lambda_max == pytest.approx(truth, rel=0.05)
        assert monitor.last.eta_crit == pytest.approx(update.critical(monitor.last.lambda_max))


def test_an_unknown_optimizer_is_refused_by_name() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="LBFGS"):
        CatapultMonitor(optimizer, model=model, criterion=nn.MSELoss())
