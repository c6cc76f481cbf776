"""Measures of linearity against explicit float64 Jacobians, dense Hessians and Taylor expansions."""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.func import functional_call, hessian, jacrev

from catapult_opt.analysis.dag import (
    DAG,
    DAGNetwork,
    KernelChange,
    Linearization,
    conv1d,
    densenet,
    drop_edges,
    fcn,
    gradient_norm,
    gradient_norm_bound,
    hessian_norm,
    hessian_norm_in_ball,
    log_log_slope,
    pl_star,
    points_in_ball,
    tangent_kernel,
    with_skips,
)
from catapult_opt.analysis.dag import network as network_module


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(dag, activation=torch.tanh, seed=0, **more):
    return DAGNetwork(dag, activation, generator=torch.Generator().manual_seed(seed), **more)


NETWORKS = {
    "fcn": lambda: make(fcn([3, 6, 5, 1])),
    "several outputs": lambda: make(fcn([3, 6, 5, 3])),
    "dropped densenet": lambda: make(drop_edges(densenet([3, 6, 6, 2]), 0.5)),
    "skips": lambda: make(with_skips(fcn([3, 5, 5, 1])), torch.sin),
    "shared weights": lambda: make(conv1d(3, [1, 4, 3], 3, d_out=2)),
    "outputs in several layers": lambda: make(DAG.from_edges([(0, 3), (1, 3), (2, 4), (3, 4), (3, 5), (4, 6), (0, 6)])),
    "non-linear outputs": lambda: make(fcn([3, 6, 2]), neuron_activations={9: torch.tanh, 10: torch.sin}),
}


@pytest.fixture(params=NETWORKS)
def net(request):
    return NETWORKS[request.param]()


@pytest.fixture(params=[False, True], ids=["dense", "sparse"])
def layout(request, monkeypatch):
    monkeypatch.setattr(network_module, "_DENSE", 2.0 if request.param else 0.0)


def flat(tree, rows):
    return torch.cat([t.reshape(*rows, -1) for t in tree.values()], dim=-1)


def jacobian(net, x):
    """(c n, p), by output, then sample."""
    params = {k: p.detach() for k, p in net.named_parameters()}
    tree = jacrev(lambda w: functional_call(net, w, x).T)(params)
    return flat(tree, (len(net.dag.outputs), len(x))).flatten(0, 1)


def hessians(net, value):
    """Dense Hessians (c, p, p) of `value(weights)` (c,)."""
    shapes = [p.shape for p in net.parameters()]
    names = [k for k, _ in net.named_parameters()]

    def of(w):
        parts = w.split([s.numel() for s in shapes])
        return value({k: part.reshape(s) for k, part, s in zip(names, parts, shapes, strict=True)})

    return hessian(of)(torch.cat([p.detach().flatten() for p in net.parameters()]))


def largest(matrix):
    return float(torch.linalg.eigvalsh(matrix).abs().max())


# ------------------------------------------------------------------------------------------------------ tangent kernel


def test_tangent_kernel_is_the_explicit_jacobian_product(net, layout):
    x = normal(4, 3)
    j = jacobian(net, x)
    torch.testing.assert_close(tangent_kernel(net, x), j @ j.T)


def test_tangent_kernel_in_the_layout_it_chooses(net):
    x = normal(4, 3)
    j = jacobian(net, x)
    with torch.no_grad():
        torch.testing.assert_close(tangent_kernel(net, x), j @ j.T)


def test_tangent_kernel_analytic_linear_network():
    net, x = make(fcn([4, 1])), normal(5, 4)
    torch.testing.assert_close(tangent_kernel(net, x), x @ x.T / 4)


def test_kernel_change_is_the_largest_so_far():
    net, x = make(fcn([3, 8, 1])), normal(5, 3)
    first = jacobian(net, x)
    change = KernelChange(net, x)
    seen = []
    for factor in (1.1, 1.5, 0.8):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(factor)
        j = jacobian(net, x)
        expected = torch.linalg.matrix_norm(j @ j.T - first @ first.T, 2) / torch.linalg.matrix_norm(first @ first.T, 2)
        seen.append(change.update())
        assert seen[-1] == pytest.approx(float(expected))
        assert change.maximum == max(seen)
    assert seen[1] > seen[2]
    net.layers[0].weight.data.fill_(math.nan)
    assert math.isnan(change.update()) and math.isnan(change.maximum)


# -------------------------------------------------------------------------------------------------------- Hessian norm


def test_hessian_norm_of_each_output_is_the_dense_one():
    for dag in (fcn([3, 6, 5, 1]), drop_edges(densenet([3, 6, 6, 1]), 0.5), conv1d(3, [1, 4, 3], 3)):
        for seed in range(3):
            net, x = make(dag, seed=seed), normal(1, 3, seed=seed)
            dense = hessians(net, lambda w, net=net, x=x: functional_call(net, w, x)[0])[0]
            found = hessian_norm(net, x[0], tol=1e-5)
            assert found.converged
            assert found.value == pytest.approx(largest(dense), rel=2e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_hessian_norm_takes_the_larger_end_of_the_spectrum(sign):
    """f = sign * (w2 + w3) w1: eigenvalues 0 and +-sqrt(2); through a square they are no longer symmetric."""
    dag = DAG.from_edges([(0, 1), (1, 2)])
    net = DAGNetwork(dag, lambda z: sign * z**2)
    net.layers[0].weight.data.fill_(1.5)
    net.layers[1].weight.data.fill_(1.0)
    # f = sign w2 w1^2: Hessian sign [[2 w2, 2 w1], [2 w1, 0]] = sign [[2, 3], [3, 0]], eigenvalues 1 +- sqrt(10)
    assert hessian_norm(net, torch.ones(1)).value == pytest.approx(1 + math.sqrt(10), rel=1e-6)


def test_hessian_norm_of_every_pre_activation_is_the_dense_one():
    net, x = make(drop_edges(densenet([3, 5, 4, 2]), 0.3)), normal(1, 3)
    for v in range(3, 14):
        trace_of = hessians(net, lambda w, v=v: torch.stack([_pre(net, w, x, v)]))[0]
        found = hessian_norm(net, x, vertex=v, tol=1e-5)
        assert found.value == pytest.approx(largest(trace_of), rel=2e-3, abs=1e-12)
        if net.dag.layer[v] == 1:
            assert found.value == 0  # Remark 2.3.9


class _PreActivation(torch.nn.Module):
    def __init__(self, net, v):
        super().__init__()
        self.net, self.v = net, v

    def forward(self, x):
        return self.net.pre_activation(x, self.v)[0]


def _pre(net, weights, x, v):
    return functional_call(_PreActivation(net, v), {f"net.{k}": w for k, w in weights.items()}, x)


def test_tensor_norm_of_two_outputs_by_scanning_all_directions():
    for seed in range(4):
        net, x = make(fcn([3, 5, 4, 2]), seed=seed), normal(1, 3, seed=seed)
        a, b = hessians(net, lambda w, net=net, x=x: functional_call(net, w, x)[0])
        angles = np.linspace(0, np.pi, 721)
        scan = max(largest(math.cos(t) * a + math.sin(t) * b) for t in angles)
        found = hessian_norm(net, x[0], tol=1e-4)
        assert max(largest(a), largest(b)) * 0.999 <= found.value <= scan * 1.0001
        assert found.value == pytest.approx(scan, rel=5e-3)


def test_hessian_norm_in_ball_is_the_largest_of_its_points():
    net, x = make(fcn([3, 8, 8, 1])), normal(1, 3)[0]
    centre = hessian_norm(net, x).value
    points = [hessian_norm(net, x).value for _ in points_in_ball(net, 3.0, samples=5, seed=2)]
    gradient = torch.autograd.grad(net(x[None]).sum(), list(net.parameters()))
    length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    ends = []
    for part in (1, 0.5, -0.5, -1):
        other = copy.deepcopy(net)
        for p, g in zip(other.parameters(), gradient, strict=True):
            p.data += part * 3.0 * g / length
        ends.append(hessian_norm(other, x).value)
    assert hessian_norm_in_ball(net, x, 3.0, samples=0).value == pytest.approx(max(centre, *ends))
    assert hessian_norm_in_ball(net, x, 3.0, samples=5, seed=2).value == pytest.approx(max(centre, *ends, *points))
    assert max(centre, *ends, *points) > centre
    assert hessian_norm_in_ball(net, x, 0.0, samples=2).value == centre
    with pytest.raises(ValueError, match="radius must be a finite number of at least 0, got -1"):
        hessian_norm_in_ball(net, x, -1)


def test_points_in_ball_lie_on_the_sphere_of_existing_weights():
    net = make(drop_edges(densenet([3, 8, 8, 1]), 0.5))
    before = [p.detach().clone() for p in net.parameters()]
    for _ in points_in_ball(net, 2.0, samples=3):
        moved = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
        assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(2.0)
        for m, layer in zip(moved, net.weight_layers, strict=True):
            assert not m[layer.mask == 0].any()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_hessian_norm_refuses_a_batch():
    with pytest.raises(ValueError, match="sample must be one input"):
        hessian_norm(make(fcn([3, 4, 1])), normal(2, 3))


# ------------------------------------------------------------------------------------------------- linear approximation


def test_linearization_is_the_taylor_expansion(net):
    x = normal(4, 3)
    j, f0 = jacobian(net, x), net(x).detach()
    linear = Linearization(net, x)
    step = [normal(*p.shape, seed=i) for i, p in enumerate(net.parameters())]
    with torch.no_grad():
        for p, s in zip(net.parameters(), step, strict=True):
            p += s
    expected = f0 + (j @ torch.cat([s.flatten() for s in step])).view(-1, len(x)).T
    torch.testing.assert_close(linear(), expected)
    torch.testing.assert_close(linear.deviation(), (net(x).detach() - expected).abs())
    assert linear.distance() == pytest.approx(math.sqrt(sum(float(s.square().sum()) for s in step)))


def test_deviation_is_below_the_corollary_on_the_way():
    """Cor. 2.3.7 with the supremum of the Hessian norm taken along the segment, where the remainder lives."""
    net, x, radius = make(fcn([3, 10, 10, 1])), normal(1, 3), 2.0
    linear = Linearization(net, x)
    for _ in points_in_ball(net, radius, samples=4):
        end = [p.data for p in net.parameters()]
        start = list(linear._origin.values())
        norms = []
        for t in np.linspace(0, 1, 21):
            for p, a, b in zip(net.parameters(), start, end, strict=True):
                p.data = a + t * (b - a)
            norms.append(hessian_norm(net, x).value)
        deviation = float(linear.deviation())
        assert 0 < deviation <= 0.5 * max(norms) * radius**2 * 1.001


# ------------------------------------------------------------------------------------------------------------ PL*, 2.4


def test_pl_star_is_the_explicit_gradient(net):
    x = normal(4, 3)
    y = normal(4, len(net.dag.outputs), seed=1)
    at = pl_star(net, x, y)
    loss = (net(x) - y).square().sum() / 2
    squared = sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    assert at.loss == pytest.approx(float(loss.detach()))
    assert at.gradient_norm == pytest.approx(math.sqrt(squared))
    assert at.ratio == pytest.approx(squared / (2 * at.loss))
    j = jacobian(net, x)
    assert at.mu == pytest.approx(float(torch.linalg.eigvalsh(j @ j.T)[0]), abs=1e-12)
    assert at.ratio >= at.mu - 1e-12


def test_pl_star_names_bad_targets():
    with pytest.raises(ValueError, match=r"targets must have shape \(4, 1\), got \(4,\)"):
        pl_star(make(fcn([3, 4, 1])), normal(4, 3), normal(4))


def test_gradient_norm_and_its_bound():
    net, x = make(fcn([3, 6, 2])), normal(1, 3)
    torch.testing.assert_close(gradient_norm(net, x[0]), jacobian(net, x).norm(dim=1))
    # ReLU: E sigma(z)^2 = 1/2, r = 1, so that C^j is least for j = L.
    assert gradient_norm_bound(0.5, 1.0, 3) == pytest.approx(math.sqrt(0.5**3))
    # z^2: E z^4 = 3, r = 2: all exponents leave C^e above 1.
    assert gradient_norm_bound(3.0, 2.0, 3) == 1.0
    # C = 1/4, r = 2: exponents 1, 3, 7.
    assert gradient_norm_bound(0.25, 2.0, 3) == pytest.approx(math.sqrt(0.25**7))


def test_proposition_2_4_4_holds_for_relu_and_fails_as_printed_for_one_linear_layer():
    def mean(sizes, draws, activation):
        return np.mean(
            [
                float(gradient_norm(make(fcn(sizes), activation, seed=s), normal(sizes[0], seed=9000 + s)))
                for s in range(draws)
            ]
        )

    assert mean([5, 20, 20, 1], 100, torch.relu) > gradient_norm_bound(0.5, 1.0, 3)
    one = mean([1, 1], 800, torch.relu)
    assert one == pytest.approx(math.sqrt(2 / math.pi), abs=0.05)  # E|x|
    assert one < gradient_norm_bound(1.0, 1.0, 1)


# ---------------------------------------------------------------------------------------------------------- the slope


def test_slope_against_the_covariance_of_polyfit():
    rng = np.random.default_rng(0)
    x = np.repeat(2.0 ** np.arange(1, 9), 5)
    y = 3 * x**-0.5 * np.exp(rng.normal(0, 0.3, len(x)))
    (slope, intercept), cov = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled")
    residual = np.log(y) - slope * np.log(x) - intercept
    error = math.sqrt(cov[0, 0] * (residual @ residual) / (len(x) - 2))
    found = log_log_slope(x, y, confidence=0.9)
    assert found.value == pytest.approx(slope) and found.intercept == pytest.approx(intercept)
    half = scipy.stats.t.ppf(0.95, len(x) - 2) * error
    assert (found.low, found.high) == (pytest.approx(slope - half), pytest.approx(slope + half))
    assert found.points == 40


def test_slope_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    x = np.repeat(2.0 ** np.arange(1, 7), 3)
    inside = 0
    for _ in range(1000):
        found = log_log_slope(x, x**-0.5 * np.exp(rng.normal(0, 0.5, len(x))))
        inside += found.low <= -0.5 <= found.high
    assert 0.93 < inside / 1000 < 0.97


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "3 or more points"),
        ([2, 2, 2], [1, 2, 3], "at 2 or more different x"),
        ([1, 2, 3], [1, 0, 3], "must be positive and finite"),
        ([1, 2, 3], [1, math.nan, 3], "must be positive and finite"),
    ],
)
def test_slope_names_bad_points(x, y, message):
    with pytest.raises(ValueError, match=message):
        log_log_slope(x, y)


# ---------------------------------------------------------------------------------------------------- leaves no trace


def test_measuring_changes_nothing(net):
    x, y = normal(4, 3), normal(4, len(net.dag.outputs), seed=1)
    (net(x) - y).square().sum().backward()
    state = torch.get_rng_state()
    before = [
        (p, p.data_ptr(), p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in net.parameters()
    ]
    with torch.no_grad():
        tangent_kernel(net, x)
        hessian_norm(net, x[0])
        hessian_norm_in_ball(net, x[0], 1.0, samples=2)
        Linearization(net, x).deviation()
        pl_star(net, x, y)
        gradient_norm(net, x[0])
        KernelChange(net, x).update()
    assert torch.equal(torch.get_rng_state(), state)
    for p, place, value, grad in before:
        assert p.data_ptr() == place and torch.equal(p, value)
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)


# --------------------------------------------------------------------------------------------------- the thesis' claim


def test_norms_fall_with_the_width_and_a_non_linear_output_stops_them():
    """Theorems 2.3.6 at four widths: slope near -1/2; tanh on the output: no slope."""
    x = normal(20)
    linear, tanh = [], []
    widths = [16, 32, 64, 128, 256] * 3
    for i, m in enumerate(widths):
        dag = fcn([20, m, m, 1])
        linear.append(hessian_norm(make(dag, seed=i), x, tol=0.01).value)
        tanh.append(
            hessian_norm(
                make(dag, seed=i, neuron_activations={int(dag.outputs[0]): lambda z: torch.tanh(z) + z**2}), x, tol=0.01
            ).value
        )
    assert abs(log_log_slope(widths, linear).value + 0.5) < 0.12
    assert abs(log_log_slope(widths, tanh).value) < 0.15
