"""The thesis' dynamics equations against actual training in float64, to 1e-10."""

import numpy as np
import pytest
import torch
from torch import nn

from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.analysis.nqm import (
    GeneralQuadraticModel,
    LinearModel,
    QuadraticModel,
    TwoLayerNQM,
    TwoLayerReLU,
    jacobian,
    matrix_step,
    one_dimensional_step,
    output_hessians,
    reduced,
    reduced_step,
    scalar_step,
    scalar_step_jacobian,
    scalar_trajectory,
)
from catapult_opt.analysis.ntk import ntk

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def descend(model, inputs, y, eta, steps):
    """Outputs (n,) and tangent kernel at every step of plain torch.optim.SGD on (1/2) sum (f - y)^2."""
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    for t in range(steps + 1):
        outputs = model(inputs)[:, 0]
        yield outputs.detach(), ntk(model, inputs)
        if t < steps:
            optimizer.zero_grad()
            (0.5 * (outputs - y).square().sum()).backward()
            optimizer.step()


@pytest.mark.parametrize("product", [1.0, 2.7, 3.6, 4.5])
def test_scalar_dynamics_is_training(product):
    d, m, y = 3, 40, 1.0
    x = torch.randn(1, d, dtype=torch.float64)
    model = QuadraticModel(TwoLayerReLU(d, m).double())
    g, lam = float(model(x).detach()), float(ntk(model, x))
    eta, c = product / lam, float(x.square().sum()) / (m * d)
    steps = 30 if product < 4 else 5
    run = scalar_trajectory(g, lam, eta=eta, y=y, c=c, steps=steps)
    u, v, w = reduced(g, lam, eta=eta, y=y, c=c)
    for t, (output, kernel) in enumerate(descend(model, x, y, eta, steps)):
        assert run.g[t] == pytest.approx(float(output), rel=1e-10, abs=1e-10)
        assert run.lam[t] == pytest.approx(float(kernel), rel=1e-10, abs=1e-10)
        assert run.loss[t] == pytest.approx(0.5 * (float(output) - y) ** 2, rel=1e-9, abs=1e-10)
        expected = reduced(float(output), float(kernel), eta=eta, y=y, c=c)
        assert (u, v, w) == pytest.approx(expected, rel=1e-9, abs=1e-10)
        u, v, w = reduced_step(u, v, w)
    if 2 < product < 4:
        assert run.loss.max() > 2 * run.loss[0] > 10 * run.loss[-1]


def models():
    x = torch.randn(4, 3, dtype=torch.float64)
    yield "tanh", QuadraticModel(ntk_mlp(3, 8, 2, activation=nn.Tanh).double()), x
    yield "deep swish", QuadraticModel(ntk_mlp(3, 4, 3, activation=nn.SiLU).double()), x
    yield "relu", QuadraticModel(ntk_mlp(3, 10, 3).double()), x
    yield "closed form", TwoLayerNQM(TwoLayerReLU(3, 12).double()), x
    yield "linear", LinearModel(ntk_mlp(3, 8, 2).double()), x


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("which", range(5))
def test_matrix_dynamics_is_training(which, kind):
    name, model, x = list(models())[which]
    y = torch.randn(4, dtype=torch.float64)
    kernel = ntk(model, x)
    eta = 1.5 / float(torch.linalg.eigvalsh(kernel)[-1])
    residual, rows, hessians = model(x)[:, 0].detach() - y, jacobian(model, x), output_hessians(model, x)
    if kind == "numpy":
        residual, rows, hessians, kernel = (a.numpy() for a in (residual, rows, hessians, kernel))
    for outputs, found in descend(model, x, y, eta, 5):
        torch.testing.assert_close(torch.as_tensor(residual), outputs - y, **EXACT)
        torch.testing.assert_close(torch.as_tensor(kernel), found, **EXACT)
        residual, rows, kernel = matrix_step(residual, rows, hessians, eta=eta)
    if name != "linear":
        assert float((found - ntk(list(models())[which][1], x)).abs().max()) > 1e-4


def test_the_printed_kernel_equation_is_not_exact():
    """Eq. 3.16 as printed; the erratum in `matrix_step`."""
    _, model, x = next(models())
    y = torch.randn(4, dtype=torch.float64)
    r, j, h, k = model(x)[:, 0].detach() - y, jacobian(model, x), output_hessians(model, x), ntk(model, x)
    eta = 2.3 / float(torch.linalg.eigvalsh(k)[-1])
    g = h @ (j.T @ r)
    printed = k - eta / 4 * (4 * g @ j.T - eta * g @ g.T)
    exact = list(descend(model, x, y, eta, 1))[1][1]
    assert float((printed - exact).abs().max()) > 1e-2 * float((exact - k).abs().max())
    torch.testing.assert_close(matrix_step(r, j, h, eta=eta)[2], exact, **EXACT)


def test_one_dimensional_dynamics_is_training():
    m = 300
    x = torch.randn(12, 1, dtype=torch.float64)
    y = x[:, 0].sign()
    net = TwoLayerReLU(1, m).double()
    for convert in (np.asarray, torch.as_tensor):
        model = TwoLayerNQM(net)
        kernel = ntk(model, x)
        eta = 2.5 / float(torch.linalg.eigvalsh(kernel)[-1])
        g, kernel = convert(net(x)[:, 0].detach()), convert(kernel)
        for outputs, found in descend(model, x, y, eta, 20):
            torch.testing.assert_close(torch.as_tensor(g), outputs, **EXACT)
            torch.testing.assert_close(torch.as_tensor(kernel), found, **EXACT)
            g, kernel = one_dimensional_step(g, kernel, x=convert(x[:, 0]), y=convert(y), eta=eta, m=m)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_special_case_b13_is_training():
    """phi = 0 and Sigma^2 = |x|^2 I: the corrected Proposition B.13.1 is `scalar_step` with c = gamma^2 |x|^2."""
    p, gamma, norm = 30, 0.05, 1.7
    rotation = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64))[0]
    sigma = norm * rotation @ torch.diag(torch.randn(p).sign().double()) @ rotation.T
    model = GeneralQuadraticModel(
        torch.zeros(1, p).double(), (sigma + sigma.T) / 2, gamma, w=10 * torch.randn(p).double()
    )
    g, lam = float(model().detach()), float(model.kernel())
    eta, printed_g, printed_lam = 2.7 / lam, np.float64(g), np.float64(lam)
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    off = 0.0
    for _ in range(60):
        assert g == pytest.approx(float(model()), rel=1e-10, abs=1e-10)
        assert lam == pytest.approx(float(model.kernel()), rel=1e-10, abs=1e-10)
        off = np.fmax(off, abs(printed_lam - lam))
        g, lam = scalar_step(g, lam, eta=eta, y=0.0, c=gamma**2 * norm**2)
        printed_g, printed_lam = (
            (1 - eta * printed_lam + gamma * eta**2 * norm**2 * printed_g**2) * printed_g,
            printed_lam - gamma * norm**2 * printed_g**2 * (4 - eta * printed_lam),
        )
        optimizer.zero_grad()
        (0.5 * model().square().sum()).backward()
        optimizer.step()
    assert off > 0.1, "the printed equations are exact after all"


def test_two_layer_linear_network_is_the_special_case():
    """Appendix B.13's example: f = v^T U x / sqrt(m), y = 0, gamma = 1/sqrt(m)."""
    m, d = 20, 3
    x, u, v = (
        torch.randn(d).double(),
        torch.randn(m, d).double().requires_grad_(),
        torch.randn(m).double().requires_grad_(),
    )

    def f():
        return v @ (u @ x) / m**0.5

    def gradients():
        return torch.autograd.grad(f(), (u, v))

    g, lam = float(f()), sum(float(p.square().sum()) for p in gradients())
    eta = 2.6 / lam
    for _ in range(40):
        now = gradients()
        assert g == pytest.approx(float(f()), rel=1e-10, abs=1e-10)
        assert lam == pytest.approx(sum(float(p.square().sum()) for p in now), rel=1e-10, abs=1e-10)
        r = float(f())
        for p, gradient in zip((u, v), now, strict=True):
            p.data -= eta * r * gradient
        g, lam = scalar_step(g, lam, eta=eta, y=0.0, c=float(x @ x) / m)


def test_step_jacobian_finite_difference():
    at, setting, h = np.array([1.3, 2.1]), {"eta": 0.9, "y": 0.4, "c": 0.05}, 1e-6
    columns = [
        (np.array(scalar_step(*(at + h * e), **setting)) - np.array(scalar_step(*(at - h * e), **setting))) / (2 * h)
        for e in np.eye(2)
    ]
    np.testing.assert_allclose(scalar_step_jacobian(*at, **setting), np.stack(columns, 1), rtol=1e-7)


def test_trajectories_broadcast_and_diverge_quietly():
    run = scalar_trajectory(1.0, np.array([1.0, 5.0]), eta=1.0, y=0.0, c=1e-3, steps=50)
    assert run.loss.shape == (51, 2)
    assert run.loss[-1, 0] < 1e-10
    assert not np.isfinite(run.loss[-1, 1])
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        scalar_trajectory(1.0, 1.0, eta=1.0, y=0.0, c=1.0, steps=-1)
