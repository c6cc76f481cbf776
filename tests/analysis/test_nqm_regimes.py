"""Predicted regimes against runs, fixed points against the map, and fast starts against real networks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from catapult_opt.analysis.dag import log_log_slope
from catapult_opt.analysis.nqm import (
    TwoLayerReLU,
    catapult_directions,
    equilibria,
    observe,
    phase_diagram,
    regime,
    scalar_step,
    two_layer_start,
)
from catapult_opt.analysis.ntk import ntk


def test_phase_diagram_follows_the_thresholds():
    diagram = phase_diagram([0.5, 1.0, 1.8, 2.3, 3.0, 3.7, 4.3, 6.0], [10_000, 100_000], seeds=range(3))
    assert diagram.peak.shape == (8, 2, 3)
    for product, predicted, observed, final in zip(
        diagram.products, diagram.predicted, diagram.observed, diagram.final_kernel, strict=True
    ):
        assert predicted == [regime(product, 1.0)] * 2
        assert observed == [[regime(product, 1.0)] * 3] * 2
        if 2 < product < 4:
            assert (final < 2).all() and (final > 0).all()
        if product < 2:
            assert final == pytest.approx(product, rel=0.02)


def test_peak_grows_with_the_width():
    widths = [10**3, 10**4, 10**5, 10**6]
    diagram = phase_diagram([3.0], widths, seeds=range(4))
    slope = log_log_slope(np.repeat([m / math.log(m) for m in widths], 4), diagram.peak[0].reshape(-1))
    assert slope.low > 0.9  # at least of order m / log m


@pytest.mark.parametrize(("product", "expected"), [(1.99, "monotone"), (2.01, "catapult"), (4.01, "divergent")])
def test_thresholds(product, expected):
    assert regime(product / 7, 7.0) == expected
    assert regime(product / 7, 7.0, width=100) == "undecided"


def test_directions():
    assert catapult_directions(1.0, [3.0, 1.9, 2.1]) == [0, 2]
    assert catapult_directions(1.0, [1.9]) == catapult_directions(1.0, []) == []
    assert catapult_directions(1.0, [4.1, 3.0]) == []


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2, 1, 0], "monotone"), ([2, 2.05, 1], "monotone"), ([2, 3, 1], "catapult"), ([2, 3, 2.5], "divergent"),
        ([2, math.inf], "divergent"), ([2, math.nan, 1], "divergent"),
    ],
)  # fmt: skip
def test_observed_regimes(losses, expected):
    seen = observe(losses, [1.0] * len(losses))
    assert seen.regime == expected
    assert seen.peak == (math.inf if expected == "divergent" else max(losses))


@given(
    eta=st.floats(0.1, 3), y=st.floats(-2, 2).filter(lambda y: abs(y) > 0.1), c=st.floats(1e-4, 0.1),
    products=st.lists(st.floats(0.1, 3.9), min_size=1, max_size=3),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_equilibria_are_fixed_points_with_the_stability_stated(eta, y, c, products):
    points = equilibria(eta=eta, y=y, c=c, products=products)
    for point in points:
        now = scalar_step(point.g, point.lam, eta=eta, y=y, c=c)
        assert now == pytest.approx((point.g, point.lam), rel=1e-9, abs=1e-9)
    *line, origin, above, below = points
    for product, point in zip(products, line, strict=True):
        assert sorted(point.eigenvalues, key=abs) == pytest.approx(sorted([1, 1 - product], key=abs), abs=1e-9)
    k = eta * abs(y) * math.sqrt(c)
    assert origin.spectral_radius == pytest.approx((1 + k) ** 2)
    assert above.spectral_radius == pytest.approx(9)
    assert below.spectral_radius == pytest.approx(9)


def test_no_other_fixed_points():
    """A fine grid of starts: a point that the map leaves where it is has to be one of the list."""
    eta, y, c = 1.0, 1.0, 0.05
    g, lam = np.meshgrid(np.linspace(-12, 12, 2401), np.linspace(-2, 8, 1001))
    moved = scalar_step(g, lam, eta=eta, y=y, c=c)
    still = np.hypot(moved[0] - g, moved[1] - lam) < 2e-3
    others = np.array([(p.g, p.lam) for p in equilibria(eta=eta, y=y, c=c)])
    near = np.abs(g - y) < 0.02
    for a, b in others:
        near |= np.hypot(g - a, lam - b) < 0.02
    assert not (still & ~near).any()


def test_fast_start_is_that_of_networks():
    d, m = 3, 2000
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    drawn = np.array([two_layer_start(m, norm=float(x.norm()), d=d, seed=seed) for seed in range(300)])
    generator = torch.Generator().manual_seed(0)
    nets = [TwoLayerReLU(d, m, generator=generator).double() for _ in range(300)]
    real = np.array([(float(net(x)), float(ntk(net, x))) for net in nets])
    scale = real.std(0)
    assert (np.abs(drawn.mean(0) - real.mean(0)) < 4 * scale * math.sqrt(2 / 300)).all()
    assert drawn.std(0) == pytest.approx(scale, rel=0.2)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"eta must be positive, got 0"):
        regime(0, 1.0)
    with pytest.raises(ValueError, match="lambda0 must be positive, got nan"):
        regime(1.0, math.nan)
    with pytest.raises(ValueError, match="as many, at least 1, got 2 and 1"):
        observe([1, 2], [1])
    with pytest.raises(ValueError, match="m and d must be at least 1, got m = 0"):
        two_layer_start(0)
    with pytest.raises(ValueError, match="eta and c must be positive"):
        equilibria(eta=1.0, y=1.0, c=0.0)
