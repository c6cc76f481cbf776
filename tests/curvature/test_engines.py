"""Every engine gives the same curvature where it applies, says so where it does not, and the choice is made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import Training

from catapult_opt import MeasurementError, critical_lr, read_log
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.capture import Capture
from catapult_opt.curvature.engines import StepSize
from catapult_opt.curvature.operators import NTK
from catapult_opt.replay import preserved

ENGINES = ["finite-difference", "forward", "double-backward"]


def relu_net(out: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, out)).double()


def batch(n: int = 20, out: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, out, generator=generator, dtype=torch.float64)


def dense_lambda(model: nn.Module, x: Tensor, factor: float) -> float:
    """factor * lambda_max(J J^T), from the explicit Jacobian."""
    outputs = model(x).flatten()
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)])
            for o in outputs]  # fmt: skip
    jacobian = torch.stack(rows)
    return factor * float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("out", [1, 3])
def test_every_engine_matches_the_explicit_jacobian(engine: str, out: int) -> None:
    model, (x, y) = relu_net(out), batch(out=out)
    found = critical_lr(model, nn.MSELoss(), x, y, engine=engine, tol=1e-8, max_matvecs=100)
    assert found.lambda_max == pytest.approx(dense_lambda(model, x, 2 / y.numel()), rel=1e-5)


def watched(model: nn.Module, *batch: Tensor, steps: int = 1, **settings: Any) -> Any:
    training = Training("CatapultMonitor", model, batch, base=lambda params: SGD(params, lr=0.01), **settings)
    training.steps(steps)
    return training.watch


@pytest.mark.parametrize("net", ["default", "ntk", "ntk with biases"])
def test_layerwise_gram_is_exact(net: str) -> None:
    model = relu_net() if net == "default" else ntk_mlp(6, 32, 3, bias="biases" in net).double()
    x, y = batch()
    truth = dense_lambda(model, x, 2 / y.numel())
    monitor = watched(model, x, y, engine="layerwise-gram")
    assert monitor.last.matvecs == 1
    assert monitor.last.lambda_max == pytest.approx(truth, rel=1e-10)
    assert monitor.last.ntk_lambda_max == pytest.approx(truth * y.numel() / 2, rel=1e-10)


def test_layerwise_gram_with_a_loss_of_varying_curvature() -> None:
    model, (x, _) = relu_net(), batch()
    y = (x[:, :1] > 0).double()
    p = torch.sigmoid(model(x)).detach().flatten()
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)])
            for o in model(x).flatten()]  # fmt: skip
    jacobian = torch.stack(rows) * (p * (1 - p) / len(x)).sqrt()[:, None]
    truth = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    monitor = watched(model, x, y, criterion=nn.BCEWithLogitsLoss(), engine="layerwise-gram")
    assert monitor.last.lambda_max == pytest.approx(truth, rel=1e-8)
    assert monitor.last.ntk_lambda_max is None


@pytest.mark.parametrize("engine", ENGINES)
def test_ntk_products_match_the_explicit_kernel(engine: str) -> None:
    model, (x, y) = relu_net(3), batch(out=3)
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)])
            for o in model(x).flatten()]  # fmt: skip
    jacobian = torch.stack(rows)
    params: list[Tensor] = list(model.parameters())
    criterion = nn.MSELoss()
    capture = Capture(model, criterion, lambda: params)
    capture.arm()
    criterion(model(x), y).backward()
    calls = capture.take()
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with preserved(model, criterion, params):
        (product,) = NTK(model, params, calls, StepSize(), engine=engine).matvec([u])
    torch.testing.assert_close(product.flatten(), jacobian @ jacobian.T @ u.flatten(), rtol=1e-5, atol=1e-5)


class Doubled(nn.Module):
    """Uses its layer twice: no longer one outer product a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
        return out


@pytest.mark.parametrize(
    ("model", "out"),
    [
        (nn.Sequential(nn.Linear(6, 3)), 3),
        (Doubled(), 1),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)), 1),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 1)), 1),
    ],
    ids=["several-outputs", "layer-used-twice", "layernorm", "samples-coupled"],
)
def test_auto_falls_back_where_gram_does_not_apply(model: nn.Module, out: int) -> None:
    model = model.double()
    x, y = batch(out=out)
    truth = dense_lambda(model, x, 2 / y.numel())
    monitor = watched(model, x, y)
    assert monitor.engine == "finite-difference"
    assert monitor.last.lambda_max == pytest.approx(truth, rel=0.05)


def test_choice_is_made_once_and_logged_once(tmp_path: Path) -> None:
    x, y = batch()
    monitor = watched(relu_net(), x, y, steps=5, log=tmp_path / "run.jsonl")
    assert monitor.engine == "layerwise-gram"
    events = [e for e in read_log(tmp_path / "run.jsonl").events if e["event"] == "engine"]
    assert [(e["step"], e["engine"]) for e in events] == [(1, "layerwise-gram")]


class Noisy(nn.Module):
    """Draws noise from a generator of its own: the same weights and random state give other outputs every time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(6, 1), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + torch.randn(len(x), 1, generator=self.generator, dtype=x.dtype)
        return out


def test_a_model_that_does_not_repeat_itself_gets_an_exact_engine() -> None:
    model, (x, y) = Noisy().double(), batch()
    truth = dense_lambda(model, x, 2 / y.numel())
    monitor = watched(model, x, y)
    assert monitor.engine == "double-backward"
    assert monitor.last.lambda_max == pytest.approx(truth, rel=0.02)


class WrongSecondDerivative(torch.autograd.Function):
    """Right gradient; but its backward pass, differentiated, is off."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x.detach())
        return x**3

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g + 20 * (g.roll(1, 0) - g.roll(1, 0).detach())


def test_asymmetric_products_are_refused_and_on_demand_avoided() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(WrongSecondDerivative.apply(self.a(x)))
            return out

    torch.manual_seed(3)
    model, (x, y) = Net().double(), batch()
    with pytest.raises(MeasurementError, match="not symmetric"):
        critical_lr(model, nn.MSELoss(), x, y, engine="double-backward")
    found = critical_lr(model, nn.MSELoss(), x, y, tol=1e-6, max_matvecs=100)
    assert found.lambda_max == pytest.approx(dense_lambda(model, x, 2 / y.numel()), rel=1e-3)
