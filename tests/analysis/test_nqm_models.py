"""f_lin and f_quad against Taylor sums with dense float64 derivatives and closed forms; they train like the module."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from catapult_opt import CatapultMonitor, CatapultPolicy, CatapultSGD, critical_lr
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.analysis.nqm import (
    GeneralQuadraticModel,
    LinearModel,
    QuadraticModel,
    TwoLayerNQM,
    TwoLayerReLU,
    jacobian,
    output_hessians,
)
from catapult_opt.analysis.ntk import ntk


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        q, k, v = self.inner(x.reshape(len(x), 2, 3)).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)).flatten(1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class GRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(3, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x.reshape(len(x), 2, 3))[0].flatten(1)


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.SiLU(), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2, 2)
    )


MODULES = {
    "tanh mlp": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "silu deep": lambda: nn.Sequential(nn.Linear(6, 3), nn.SiLU(), nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 1)),
    "relu deep": lambda: ntk_mlp(6, 4, 3, 2),
    "cnn": cnn,
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 1)),
    "batch norm, train": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)),
    "batch norm, eval": lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).eval(),
    "attention": Attention,
    "tied": Tied,
    "other norms": lambda: nn.Sequential(
        nn.Linear(6, 6),
        nn.GroupNorm(2, 6),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, affine=True),
        nn.Flatten(),
        nn.Linear(6, 1),
    ),
    "gru": GRU,
}


def move(model, size=0.5):
    for p in model.parameters():
        p.data += size * torch.randn_like(p)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", MODULES)
def test_equals_the_taylor_sum_with_dense_derivatives(name):
    module, x = MODULES[name]().double(), torch.randn(3, 6, dtype=torch.float64)
    f0, j, h = module(x).detach().reshape(-1), jacobian(module, x), output_hessians(module, x)
    f_lin, f_quad = LinearModel(module), QuadraticModel(module)
    move(f_quad)
    f_lin.module.load_state_dict(f_quad.module.state_dict())
    step = flat(f_quad.displacement().values())
    linear = f0 + j @ step
    torch.testing.assert_close(f_lin(x).reshape(-1), linear, rtol=1e-10, atol=1e-10)
    quadratic = linear + 0.5 * torch.einsum("p,npq,q->n", step, h, step)
    torch.testing.assert_close(f_quad(x).reshape(-1), quadratic, rtol=1e-10, atol=1e-10)
    assert (quadratic - linear).abs().max() > 1e-3, "the second order has to matter, or the test shows nothing"
    torch.testing.assert_close(jacobian(f_quad, x), j + torch.einsum("npq,q->np", h, step), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jacobian(f_lin, x), j, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output_hessians(f_quad, x), h, rtol=1e-8, atol=1e-8)
    assert float(output_hessians(f_lin, x).abs().max()) == 0
    torch.testing.assert_close(ntk(f_lin, x), j @ j.T, rtol=1e-9, atol=1e-9)


def test_third_order_error_finite_difference():
    module, x = MODULES["tanh mlp"]().double(), torch.randn(5, 6, dtype=torch.float64)
    error = {}
    for size in (1e-2, 5e-3):
        f_quad = QuadraticModel(module)
        torch.manual_seed(1)
        move(f_quad, size)
        error[size] = float((f_quad(x) - f_quad.module(x)).abs().max())
    assert error[1e-2] / error[5e-3] == pytest.approx(8, rel=0.1)


def test_closed_form_two_layer_nqm_is_the_quadratic_model():
    net, x = TwoLayerReLU(3, 50).double(), torch.randn(20, 3, dtype=torch.float64)
    closed, general = TwoLayerNQM(net), QuadraticModel(net)
    move(general)
    closed.load_state_dict({**general.module.state_dict(), "u0": net.u})
    torch.testing.assert_close(closed(x), general(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(closed.kernel(x), ntk(general, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net.kernel(x), ntk(net, x), rtol=1e-10, atol=1e-10)
    m, d = net.u.shape  # Eq. 3.10, term by term
    du, dv = closed.u - net.u, closed.v - net.v
    on, scale = (x @ net.u.T >= 0).double(), (m * d) ** -0.5
    printed = net(x)[:, 0] + scale * (on * (x @ du.T) @ net.v + torch.relu(x @ net.u.T) @ dv + (on * (x @ du.T)) @ dv)
    torch.testing.assert_close(closed(x)[:, 0], printed, rtol=1e-12, atol=1e-12)


def test_relu_hessian_has_cross_terms_only():
    h = output_hessians(ntk_mlp(3, 5, 2).double(), torch.randn(4, 3, dtype=torch.float64))
    first = 15
    assert float(h[:, :first, :first].abs().max()) == 0
    assert float(h[:, first:, first:].abs().max()) == 0
    assert float(h[:, :first, first:].abs().max()) > 0
    tanh = output_hessians(ntk_mlp(3, 5, 2, activation=nn.Tanh).double(), torch.randn(4, 3, dtype=torch.float64))
    assert float(tanh[:, :first, :first].abs().max()) > 0


@pytest.mark.parametrize("diagonal", [True, False])
def test_general_quadratic_model(diagonal):
    phi, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    sigma = torch.randn(6).sign().double()
    if not diagonal:
        root = torch.randn(4, 6, 6, dtype=torch.float64)
        sigma = root + root.mT
    dense = torch.diag(sigma).expand(4, 6, 6) if diagonal else sigma
    g = GeneralQuadraticModel(phi, sigma, 0.3, w=w)
    torch.testing.assert_close(g()[:, 0], phi @ w + 0.15 * torch.einsum("p,npq,q->n", w, dense, w))
    rows = phi + 0.3 * dense @ w
    torch.testing.assert_close(g.kernel(), rows @ rows.T)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5),
    ],
    ids=["SGD", "AdamW", "LBFGS"],
)
def test_trains_under_torch_optimizers(make):
    f_quad, x, y = QuadraticModel(ntk_mlp(6, 32, 2)), torch.randn(20, 6), torch.randn(20, 1)
    optimizer = make(f_quad.parameters())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(f_quad(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_trains_under_catapult_sgd_above_the_critical_rate():
    f_quad, x, y = QuadraticModel(ntk_mlp(6, 256, 2)), torch.randn(20, 6), torch.randn(20, 1)
    criterion = nn.MSELoss()
    # From the edge on, and to rest at the end: else the last step may lie within a catapult.
    policy = CatapultPolicy(start=1.0, near=1.0, creep=0.1, total_steps=200)
    optimizer = CatapultSGD(f_quad.parameters(), model=f_quad, criterion=criterion, policy=policy)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = criterion(f_quad(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert max(losses) > 1.2 * losses[0], "no catapult"
    assert losses[-1] < 0.1 * losses[0]


def test_critical_rate_and_monitor_agree_with_the_dense_kernel():
    net, x, y = ntk_mlp(6, 64, 2).double(), torch.randn(10, 6).double(), torch.randn(10, 1).double()
    f_quad, criterion = QuadraticModel(net), nn.MSELoss()
    move(f_quad)
    top = float(torch.linalg.eigvalsh(ntk(f_quad, x))[-1])
    assert critical_lr(f_quad, criterion, x, y, tol=1e-6).eta_crit == pytest.approx(10 / top, rel=1e-3)
    optimizer = torch.optim.SGD(f_quad.parameters(), lr=20 / top)
    monitor = CatapultMonitor(optimizer, model=f_quad, criterion=criterion, every=1)
    criterion(f_quad(x), y).backward()
    optimizer.step()
    assert (monitor.measured_steps, monitor.super_critical_steps) == (1, 1)


def test_weight_decay_pulls_the_weights_themselves():
    f_quad = QuadraticModel(ntk_mlp(3, 4, 2))
    before = flat(f_quad.parameters())
    optimizer = torch.optim.AdamW(f_quad.parameters(), lr=0.1, weight_decay=0.5)
    (0 * f_quad(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    torch.testing.assert_close(flat(f_quad.parameters()), 0.95 * before)


@pytest.mark.parametrize("kind", [LinearModel, QuadraticModel])
def test_state_dict_restores_the_function(kind):
    x, trained = torch.randn(5, 6), kind(cnn())
    move(trained)
    other = kind(cnn())
    other.load_state_dict(trained.state_dict())
    torch.testing.assert_close(other(x), trained(x), rtol=0, atol=0)
    assert set(dict(trained.module.named_parameters())) == set(dict(cnn().named_parameters()))
    assert trained.distance() == pytest.approx(float(flat(trained.displacement().values()).norm()))


def test_leaves_the_module_alone_and_starts_at_it():
    module = MODULES["batch norm, train"]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, f_quad = torch.randn(5, 6), QuadraticModel(module)
    torch.testing.assert_close(f_quad(x), functional_call(module, {k: v.clone() for k, v in before.items()}, x))
    move(f_quad)
    buffers = {name: value.clone() for name, value in f_quad.named_buffers()}
    f_quad(x).sum().backward()
    for name, value in f_quad.named_buffers():
        assert torch.equal(value, buffers[name]), name
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluates_without_gradients(context):
    f_quad, x = QuadraticModel(cnn()), torch.randn(5, 6)
    move(f_quad)
    with context():
        outputs = f_quad(x)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, f_quad(x).detach())


def test_dropout_takes_one_draw_for_all_orders():
    module = nn.Sequential(nn.Linear(6, 50), nn.Dropout(), nn.ReLU(), nn.Linear(50, 1))
    f_quad, x = QuadraticModel(module), torch.randn(5, 6)
    with torch.no_grad():  # in the last layer the module is linear: f_quad is f, if both drop the same
        f_quad.module[3].weight += 1
    torch.manual_seed(3)
    outputs = f_quad(x)
    torch.manual_seed(3)
    torch.testing.assert_close(outputs, f_quad.module(x))


def test_moves_between_dtypes():
    f_quad = QuadraticModel(cnn()).double()
    assert f_quad(torch.randn(5, 6).double()).dtype == torch.float64


def test_measures_leave_no_trace():
    f_quad, x = QuadraticModel(cnn()), torch.randn(5, 6)
    f_quad(x).sum().backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in f_quad.named_parameters()}
    rng = torch.get_rng_state()
    jacobian(f_quad, x), output_hessians(f_quad, x)
    assert torch.equal(torch.get_rng_state(), rng)
    for name, p in f_quad.named_parameters():
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1])


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got function"):
        QuadraticModel(lambda x: x)
    with pytest.raises(ValueError, match="module has no parameters to expand in: ReLU"):
        LinearModel(nn.ReLU())
    with pytest.raises(TypeError, match="must return a floating-point tensor, got tuple"):
        QuadraticModel(nn.MultiheadAttention(4, 1))(*[torch.ones(2, 1, 4)] * 3)
    with pytest.raises(ValueError, match="frozen"):
        jacobian(nn.Linear(2, 1).requires_grad_(False), torch.ones(1, 2))
    with pytest.raises(ValueError, match="d and m must be at least 1, got d = 0, m = 3"):
        TwoLayerReLU(0, 3)
    with pytest.raises(ValueError, match=r"phi must have shape \(n, p\), got \(3,\)"):
        GeneralQuadraticModel(torch.ones(3), torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="sigma must have shape"):
        GeneralQuadraticModel(torch.ones(2, 3), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="sigma must be symmetric"):
        GeneralQuadraticModel(torch.ones(2, 3), torch.ones(3, 3).triu(), 1.0)
    with pytest.raises(ValueError, match="w must have shape"):
        GeneralQuadraticModel(torch.ones(2, 3), torch.ones(3), 1.0, w=torch.ones(2))
