"""AGOP against closed forms and finite differences; taking it leaves no trace; alignment is a cosine."""

import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catapult_opt import CatapultSGD
from catapult_opt.analysis.agop import agop, alignment
from catapult_opt.analysis.networks import ntk_mlp
from catapult_opt.analysis.tasks import rank


class Polynomial(nn.Module):
    """x^T A x / 2, whose gradient is A x for symmetric A."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x):
        return ((x @ self.a) * x).sum(1) / 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finite_difference_agop(model, inputs, h=1e-5):
    flat = inputs.reshape(len(inputs), -1)
    columns = []
    for unit in torch.eye(flat.shape[1], dtype=flat.dtype):
        step = (h * unit).reshape(inputs.shape[1:])
        columns.append((model(inputs + step) - model(inputs - step)).reshape(len(inputs), -1) / (2 * h))
    jacobian = torch.stack(columns, dim=2)  # (n, c, d)
    return torch.einsum("ncd,nce->de", jacobian, jacobian) / len(inputs)


def test_analytic_linear_model():
    model = nn.Linear(6, 3).double()
    torch.testing.assert_close(agop(model, normal(10, 6)), model.weight.T @ model.weight)


def test_analytic_quadratic_form():
    a, x = normal(5, 5), normal(40, 5, seed=1)
    a = a + a.T
    torch.testing.assert_close(agop(Polynomial(a), x), a @ (x.T @ x / 40) @ a)


def test_analytic_two_layer_relu_net():
    model, x = ntk_mlp(6, 32, 2).double(), normal(20, 6)
    first, second = model[0].weight, model[2].weight
    slopes = (x @ first.T > 0) * second / 32**0.5
    gradients = slopes @ first / 6**0.5
    torch.testing.assert_close(agop(model, x), gradients.T @ gradients / 20)


MODELS = {
    "mlp": (lambda: ntk_mlp(6, 16, 3, 2, activation=nn.Tanh), (6,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)), (6,)),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)), (6,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), (2, 3, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4)),
    "no output dimension": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Flatten(0)), (6,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_finite_difference(name):
    make, shape = MODELS[name]
    model, x = make().double(), normal(7, *shape)
    expected = finite_difference_agop(copy.deepcopy(model).eval(), x)
    # BLAS and fused kernels may round differently for another number of rows: equal to rounding, not bit for bit.
    torch.testing.assert_close(agop(model, x), expected.detach(), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(agop(model, x, batch_size=3), agop(model, x))


def test_result_is_symmetric_positive_semidefinite_and_detached():
    g = agop(ntk_mlp(6, 8, 2).double(), normal(9, 6).requires_grad_())
    assert not g.requires_grad
    torch.testing.assert_close(g, g.T)
    assert torch.linalg.eigvalsh(g)[0] > -1e-12


def test_no_trace_is_left():
    class Noisy(nn.Module):
        """Draws random numbers and counts its calls in a buffer, even in eval mode."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Noisy(), nn.Tanh(), nn.Linear(8, 1))
    model[1].eval()  # modes may be mixed
    x = torch.randn(20, 6)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    rng, original = torch.get_rng_state(), x.clone()
    agop(model, x, batch_size=8)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, original)
    assert x.grad is None


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Linear(6, 2), nn.Dropout())
    with pytest.raises(RuntimeError):
        agop(model, torch.zeros(3, 5))
    assert all(module.training for module in model.modules())


def test_a_graph_held_by_the_caller_stays_usable():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).eval()
    x = torch.randn(5, 6)
    loss = model(x).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    agop(model, x)
    loss.backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(context):
    model, x = ntk_mlp(6, 8, 2), torch.randn(4, 6)
    with context():
        inside = agop(model, x)
    assert torch.equal(inside, agop(model, x))


@pytest.mark.parametrize("between", ["zero_grad", "forward", "backward", "step"])
def test_an_optimizer_that_watches_the_model_takes_no_notice(between):
    def rates(watch):
        model, criterion = ntk_mlp(6, 8, 2, generator=torch.Generator().manual_seed(0)), nn.MSELoss()
        optimizer = CatapultSGD(model.parameters(), model=model, criterion=criterion)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            watch("zero_grad", model)
            loss = criterion(model(x), y)
            watch("forward", model)
            loss.backward()
            watch("backward", model)
            optimizer.step()
            watch("step", model)
            found.append((optimizer.last.lambda_max, optimizer.param_groups[0]["effective_lr"]))
        return found

    x, y = torch.randn(5, 6), torch.randn(5, 1)
    torch.manual_seed(0)
    alone = rates(lambda *_: None)
    torch.manual_seed(0)
    assert rates(lambda place, model: agop(model, x) if place == between else None) == alone


def test_frozen_parameters_do_not_matter():
    model, x = ntk_mlp(6, 8, 2), torch.randn(4, 6)
    expected = agop(model, x)
    assert torch.equal(agop(model.requires_grad_(False), x), expected)


def test_approaches_the_egop_of_the_true_function():
    class Truth(nn.Module):
        def forward(self, x):
            return task.target(x)

    task = rank(4, 20_000, 1, 1, d=8)
    assert alignment(agop(Truth(), task.train.inputs), task.egop) > 0.995


def test_the_main_jobs_size_takes_well_under_a_second():
    model, x = ntk_mlp(100, 1024, 2), torch.randn(5000, 100)
    agop(model, x)
    start = time.perf_counter()
    agop(model, x)
    assert time.perf_counter() - start < 1


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class Collapsed(nn.Module):
    def forward(self, x):
        return x.sum()


@pytest.mark.parametrize(
    ("model", "inputs", "kwargs", "error", "message"),
    [
        (nn.Identity(), torch.zeros(3, 2, dtype=torch.long), {}, TypeError, "inputs must be a floating-point tensor"),
        (nn.Identity(), [[1.0]], {}, TypeError, "inputs must be a floating-point tensor, got list"),
        (nn.Identity(), torch.zeros(0, 2), {}, ValueError, r"at least one sample, got \(0, 2\)"),
        (nn.Identity(), torch.zeros(3), {}, ValueError, r"shape \(n, \.\.\.\)"),
        (nn.Identity(), torch.zeros(3, 2), {"batch_size": 0}, ValueError, "batch_size must be .* got 0"),
        (TwoOutputs(), torch.zeros(3, 2), {}, TypeError, "floating-point tensor, got tuple"),
        (Detached(), torch.zeros(3, 2), {}, ValueError, "do not depend on inputs"),
        (Collapsed(), torch.zeros(3, 2), {}, ValueError, r"one row per sample, got shape \(\)"),
    ],
)
def test_bad_arguments_are_named(model, inputs, kwargs, error, message):
    with pytest.raises(error, match=message):
        agop(model, inputs, **kwargs)


def psd(seed, d=4, rank=2):
    factor = normal(d, rank, seed=seed)
    return factor @ factor.T


seeds = st.integers(0, 10_000)
scales = st.floats(1e-150, 1e150)


@given(seeds, seeds)
@settings(deadline=None)
def test_alignment_of_semidefinite_matrices_is_symmetric_and_in_the_unit_interval(s, t):
    value = alignment(psd(s), psd(t))
    assert 0 <= value <= 1
    assert value == pytest.approx(alignment(psd(t), psd(s)))


@given(seeds, scales, scales)
@settings(deadline=None)
def test_alignment_ignores_scale(s, a, b):
    g, h = psd(s), psd(s + 1)
    assert alignment(a * g, b * h) == pytest.approx(alignment(g, h))
    assert alignment(a * g, b * g) == pytest.approx(1)


@given(seeds)
@settings(deadline=None)
def test_alignment_ignores_a_common_rotation(s):
    q = torch.linalg.qr(normal(4, 4, seed=s)).Q
    g, h = psd(s + 1), psd(s + 2)
    assert alignment(q @ g @ q.T, q @ h @ q.T) == pytest.approx(alignment(g, h))


def test_alignment_of_known_matrices():
    first, second = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    assert alignment(first, second) == 0
    assert alignment(first, torch.eye(2)) == pytest.approx(0.5**0.5)
    assert alignment(first, -first) == -1


@pytest.mark.parametrize(
    ("g", "g_star", "error", "message"),
    [
        (torch.zeros(2, 2), torch.eye(2), ValueError, "g must be finite and not all zero"),
        (torch.eye(2), torch.full((2, 2), float("nan")), ValueError, "g_star must be finite"),
        (torch.eye(2), torch.full((2, 2), float("inf")), ValueError, "g_star must be finite"),
        (torch.eye(2), torch.eye(3), ValueError, r"same shape, got \(2, 2\) and \(3, 3\)"),
        (torch.ones(2), torch.eye(2), ValueError, r"g must be a square matrix, got shape \(2,\)"),
        ([[1.0]], torch.eye(1), TypeError, "g must be a tensor, got list"),
    ],
)
def test_bad_matrices_are_named(g, g_star, error, message):
    with pytest.raises(error, match=message):
        alignment(g, g_star)
