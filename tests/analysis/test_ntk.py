"""The NTK equals an explicit float64 Jacobian, the loss splits into its eigenspaces, critical rates are exact."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from catapult_opt.analysis import ntk as module
from catapult_opt.analysis.networks import cnn, mlp, ntk_mlp, wide_resnet
from catapult_opt.analysis.ntk import (
    critical_rate,
    critical_rates,
    eigenspaces,
    infinite_cnn_ntk,
    infinite_fcn_ntk,
    loss_in_eigenspace,
    match_rate,
    ntk,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Shared(nn.Module):
    """The same layer twice, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x))).sum(1)


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        self.other(x)
        return self.layer(x)


def conv(k=1, norm=False):
    layers = [nn.Conv2d(2, 4, 3, padding=1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, k))


CASES = {
    "ntk mlp": lambda: (ntk_mlp(6, 20, 3, generator=seeded(1)), normal(7, 6)),
    "ntk mlp with biases": lambda: (ntk_mlp(6, 20, 3, bias=True, generator=seeded(1)), normal(7, 6)),
    "three outputs": lambda: (ntk_mlp(6, 20, 2, 3, generator=seeded(1)), normal(5, 6)),
    "tanh": lambda: (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1)), normal(7, 6)),
    "cnn": lambda: (conv(), normal(5, 2, 4, 4)),
    "ntk cnn with biases": lambda: (cnn(2, 4, 3, 4, 2, bias="hidden", generator=seeded(1)), normal(5, 2, 4, 4)),
    "wide resnet": lambda: (wide_resnet(2, 2, widen=0.25, norm=False, generator=seeded(1)), normal(3, 2, 8, 8)),
    "grouped convolution": lambda: (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()), normal(3, 2, 4, 4)),
    "linear layer on tokens": lambda: (nn.Sequential(nn.Linear(6, 2), nn.Flatten()), normal(3, 4, 6)),
    "a layer whose outputs are not used": lambda: (Forgetful(), normal(3, 6)),
    "cnn of two outputs": lambda: (conv(2), normal(5, 2, 4, 4)),
    "batch norm, train": lambda: (conv(norm=True), normal(5, 2, 4, 4)),
    "batch norm, eval": lambda: (conv(norm=True).eval(), normal(5, 2, 4, 4)),
    "attention": lambda: (Attention(), normal(4, 3, 6)),
    "shared and unused": lambda: (Shared(), normal(5, 6)),
}


def made(case):
    torch.manual_seed(5)
    model, x = CASES[case]()
    return model.double(), x


def explicit(model, x):
    model = copy.deepcopy(model)  # BatchNorm counts its batches
    names = [name for name, _ in model.named_parameters()]

    def outputs(*params):
        return functional_call(model, dict(zip(names, params, strict=True)), (x,)).flatten()

    blocks = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in model.parameters()))
    jacobian = torch.cat([block.flatten(1) for block in blocks], 1)
    return jacobian @ jacobian.T


@pytest.mark.parametrize("case", CASES)
def test_equals_the_explicit_jacobian_to_1e_10(case):
    model, x = made(case)
    expected = explicit(model, x)
    found = ntk(model, x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize("memory", [1, 800, 5000, 20_000])
@pytest.mark.parametrize("case", ["cnn of two outputs", "ntk cnn with biases", "batch norm, train", "attention"])
def test_memory_does_not_change_the_result(case, memory):
    model, x = made(case)
    torch.testing.assert_close(ntk(model, x, memory=memory), ntk(model, x), rtol=1e-12, atol=1e-12)


def test_rows_in_memory_are_bounded(monkeypatch):
    model, x = made("batch norm, eval")
    sizes = []
    whole = module._Rows.__call__

    def measured(self, samples, group):
        jacobian = whole(self, samples, group)
        sizes.append(jacobian.numel() * 8)
        return jacobian

    monkeypatch.setattr(module._Rows, "__call__", measured)
    ntk(model, x, memory=2000)
    assert max(sizes) <= 2000
    assert len(sizes) > 3


@pytest.mark.parametrize("case", CASES)
def test_leaves_no_trace(case):
    model, x = made(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    ntk(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_frozen_parameters_take_no_part():
    model, x = made("tanh")
    whole = ntk(model, x)
    model[0].requires_grad_(False)
    last = torch.tanh(model[0](x)).detach()
    torch.testing.assert_close(ntk(model, x), last @ last.T + 1)
    assert float((whole - ntk(model, x)).norm()) > 0.1


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (nn.Linear(2, 1), torch.ones(0, 2), ValueError, "at least one sample"),
        (nn.ReLU(), torch.ones(3, 2), ValueError, "no parameter that requires a gradient"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(6, 1)), torch.ones(3, 2), ValueError, "one row per sample|shape"),
        (nn.LSTM(2, 2), torch.ones(3, 1, 2), TypeError, "floating-point tensor"),
    ],
)
def test_bad_input(model, x, error, message):
    with pytest.raises((error, RuntimeError), match=message):
        ntk(model, x)
    with pytest.raises(ValueError, match="memory must be"):
        ntk(nn.Linear(2, 1), torch.ones(2, 2), memory=0)


# ------------------------------------------------------------------------------------------------------- eigenspaces


def test_eigenspaces_restore_the_kernel_largest_first():
    a = normal(6, 6)
    kernel = a @ a.T
    spaces = eigenspaces(kernel)
    assert bool((spaces.values.diff() <= 0).all())
    torch.testing.assert_close(spaces.vectors * spaces.values @ spaces.vectors.T, kernel)
    for bad in (normal(2, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="kernel must be"):
            eigenspaces(bad)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (3, 2)])
def test_loss_splits_into_the_eigenspace_and_its_complement(shape):
    a = normal(6, 6)
    spaces = eigenspaces(a @ a.T)
    residual = normal(*shape, seed=1)
    n = shape[0]
    top = spaces.vectors[:, :2] @ spaces.vectors[:, :2].T @ residual.flatten()
    inside, outside = loss_in_eigenspace(residual, spaces, 2)
    assert inside == pytest.approx(float(top.square().sum()) / n)
    assert inside + outside == pytest.approx(float(residual.square().sum()) / n)
    assert loss_in_eigenspace(residual, spaces, 0)[0] == 0
    assert loss_in_eigenspace(residual, spaces, 6)[1] == 0
    with pytest.raises(ValueError, match=r"s must be in 0 ... 6, got 7"):
        loss_in_eigenspace(residual, spaces, 7)
    with pytest.raises(ValueError, match="residual has 4 entries"):
        loss_in_eigenspace(residual.flatten()[:4], spaces, 1)


# ----------------------------------------------------------------------------------------------------- critical rates


def test_gradient_descent_on_a_linear_model_turns_at_the_critical_rate():
    """n / lambda_max(K) is where the loss of a linear model stops falling."""
    model, x, y = nn.Linear(4, 2, bias=False).double(), normal(10, 4), normal(10, 2, seed=1)
    eta = critical_rate(ntk(model, x), 10)

    def loss_after(rate):
        weight = torch.linalg.lstsq(x, y).solution.T + torch.linalg.svd(x).Vh[0]  # off along the steepest direction
        best = (x @ torch.linalg.lstsq(x, y).solution - y).square().sum() / 10
        for _ in range(50):
            weight = weight - rate * 2 / 10 * (x @ weight.T - y).T @ x
        return float((x @ weight.T - y).square().sum() / 10 - best)

    assert loss_after(0.98 * eta) < loss_after(1.0 * eta) * 0.5 < loss_after(1.02 * eta) * 0.2


def test_critical_rates_against_the_explicit_hessian():
    model, x, y = ntk_mlp(5, 30, 2, generator=seeded(1)).double(), normal(6, 5), normal(6, 1, seed=1)
    params = [p.detach() for p in model.parameters()]
    flat = torch.cat([p.flatten() for p in params])

    def loss(vector):
        parts = torch.split(vector, [p.numel() for p in params])
        named = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parts, strict=True)}
        return (functional_call(model, named, (x,)) - y).square().mean()

    hessian = torch.autograd.functional.hessian(loss, flat)
    by_hessian, by_kernel = critical_rates(model, x, y)
    assert by_hessian == pytest.approx(2 / float(torch.linalg.eigvalsh(hessian)[-1]), rel=2e-3)
    assert by_kernel == pytest.approx(6 / float(torch.linalg.eigvalsh(explicit(model, x))[-1]), rel=1e-9)
    assert by_hessian != pytest.approx(by_kernel, rel=1e-4)


def test_critical_rate_of_a_dead_network_is_infinite():
    assert critical_rate(torch.zeros(3, 3)) == math.inf


@pytest.mark.parametrize("bias", [False, "hidden", True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_infinite_fcn_is_the_mean_of_wide_ones(depth, bias):
    x = torch.randn(6, 10, generator=seeded(), dtype=torch.float64)
    nets = [mlp(10, 400, depth, bias=bias, generator=seeded(seed)).double() for seed in range(30)]
    found = sum(ntk(net, x) for net in nets) / len(nets)
    expected = infinite_fcn_ntk(x, depth, bias=bias)
    assert float((found - expected).norm()) < (0.05 if depth > 1 else 1e-9) * float(expected.norm())


@pytest.mark.parametrize("bias", [False, "hidden", True])
@pytest.mark.parametrize("depth", [2, 4])
def test_infinite_cnn_is_the_mean_of_wide_ones(depth, bias):
    x = torch.randn(4, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    nets = [cnn(3, 150, depth, 5, bias=bias, generator=seeded(seed)).double() for seed in range(30)]
    found = sum(ntk(net, x) for net in nets) / len(nets)
    expected = infinite_cnn_ntk(x, depth, bias=bias)
    assert float((found - expected).norm()) < 0.05 * float(expected.norm())


def test_analytic_infinite_kernel_of_a_sample_with_itself():
    x = torch.randn(1, 20, generator=seeded(), dtype=torch.float64)
    q = float(x.square().mean())
    for depth in range(1, 6):  # every ReLU halves; each hidden bias adds what passes from its layer to the output
        assert float(infinite_fcn_ntk(x, depth)) == pytest.approx(depth * q / 2 ** (depth - 1))
        biases = sum(2.0 ** (layer - depth) for layer in range(1, depth))
        assert float(infinite_fcn_ntk(x, depth, bias="hidden") - infinite_fcn_ntk(x, depth)) == pytest.approx(biases)


def test_infinite_kernels_refuse_depths_without_a_network():
    with pytest.raises(ValueError, match=r"depth must be .*0"):
        infinite_fcn_ntk(torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match="depth must be at least 2, got 1"):
        infinite_cnn_ntk(torch.ones(1, 1, 2, 2), 1)
    with pytest.raises(ValueError, match="bias must be True, False, None or 'hidden', got 'first'"):
        infinite_fcn_ntk(torch.ones(1, 2), 2, bias="first")


def test_match_rate():
    assert match_rate([1, 2, 3, 2, 4], [0.1, 0.9, 0.1, 0.2], 0.5) == pytest.approx(2 / 3)
    assert match_rate([1, 2, 3], [0.1, 0.9], [0.05, 1.0]) == 0.5  # a rate for every step
    assert math.isnan(match_rate([3, 2, 1], [0.1, 0.1], 0.5))
    with pytest.raises(ValueError, match="losses must be one more than rates, got 2 and 2"):
        match_rate([1, 2], [1, 2], 1)
    with pytest.raises(ValueError, match="lr must be one number or one for each of the 2 rates, got 3"):
        match_rate([1, 2, 3], [1, 2], [1, 1, 1])
