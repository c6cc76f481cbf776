"""The tasks are the thesis', and their EGOP and variance are exact."""

import doctest
import itertools

import numpy as np
import pytest
import torch

from catapult_opt.analysis import tasks

RANKS = [2, 3, 4]


def gradients(task, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(task.target(x).sum(), x)[0]


@pytest.mark.parametrize("k", RANKS)
def test_analytic_egop_equals_gauss_hermite_quadrature(k):
    # A 4-node rule is exact up to degree 7 in each coordinate. The sum x3 + ... + x10 of the rank-3 task is one N(0, 8)
    # variable, spread evenly: neither f* nor its gradient looks at the single terms.
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    grid = np.array(list(itertools.product(nodes, repeat=4)))
    mass = np.array([np.prod(w) for w in itertools.product(weights / weights.sum(), repeat=4)])
    task = tasks.rank(k, 1, 1, 1, d=10, unit_variance=False)
    if k == 3:
        x = np.hstack([grid[:, :2], np.repeat(grid[:, 2:3] * np.sqrt(8) / 8, 8, axis=1)])
    else:
        x = np.hstack([grid, np.zeros((len(grid), 6))])
    x = torch.from_numpy(x)
    g = gradients(task, x).numpy()
    np.testing.assert_allclose((g * mass[:, None]).T @ g, task.egop.numpy(), atol=1e-10)
    values = task.target(x).numpy()[:, 0]
    assert mass @ values == pytest.approx(0, abs=1e-10)
    assert mass @ values**2 == pytest.approx({2: 1, 3: 14, 4: 4}[k])


@pytest.mark.parametrize("k", RANKS)
def test_analytic_egop_equals_monte_carlo(k):
    task = tasks.rank(k, 1, 1, 1, d=12)
    x = torch.randn(400_000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = gradients(task, x)
    torch.testing.assert_close(g.T @ g / len(x), task.egop.double(), atol=0.03, rtol=0.03)
    assert float(task.target(x).var()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("k", RANKS)
def test_egop_has_the_rank_that_names_the_task(k):
    assert torch.linalg.matrix_rank(tasks.rank(k, 1, 1, 1).egop) == k


def test_targets_are_the_thesis_polynomials():
    x = torch.arange(1.0, 13.0).repeat(2, 1)
    for k, expected in {2: 2, 3: 2 * 55, 4: 1 + 2 + 6 + 24}.items():
        target = tasks.rank(k, 1, 1, 1, unit_variance=False).target
        assert torch.equal(target(x), torch.full((2, 1), float(expected)))


def test_shapes_and_noise_of_every_split():
    task = tasks.rank(4, n_train=3000, n_val=4000, n_test=5000, d=20, noise=0.1)
    for split, n in ((task.train, 3000), (task.val, 4000), (task.test, 5000)):
        assert split.inputs.shape == (n, 20)
        assert split.targets.shape == (n, 1)
        assert len(split) == n
        residual = split.targets - task.target(split.inputs)
        assert float(residual.std()) == pytest.approx(0.1, rel=0.1)
        assert float(split.inputs.std()) == pytest.approx(1, rel=0.02)
    clean = tasks.rank(4, 5, 5, 5, d=20, noise=0)
    assert torch.equal(clean.train.targets, clean.target(clean.train.inputs))


def test_seed_decides_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    a, b, c = (tasks.rank(2, 50, 50, 50, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.test.targets, b.test.targets)
    assert not torch.equal(a.train.inputs, c.train.inputs)
    assert not torch.equal(a.train.inputs, a.val.inputs)


def test_to_moves_all_tensors():
    task = tasks.rank(3, 4, 4, 4).to("meta")
    moved = [tensor for split in (task.train, task.val, task.test) for tensor in (split.inputs, split.targets)]
    assert {tensor.device.type for tensor in [*moved, task.egop]} == {"meta"}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"k": 5}, ValueError, r"k must be one of \[2, 3, 4\], got 5"),
        ({"k": 3, "d": 9}, ValueError, "d must be at least 10 for the rank-3 task, got 9"),
        ({"n_val": 0}, ValueError, "n_val must be at least 1"),
        ({"n_train": 10.0}, TypeError, "n_train must be an integer, got 10.0"),
        ({"noise": -1.0}, ValueError, "noise must be"),
        ({"noise": float("nan")}, ValueError, "noise must be"),
        ({"seed": "0"}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        tasks.rank(**({"k": 2} | kwargs))


def test_docstring_examples():
    assert doctest.testmod(tasks).failed == 0


def test_full_rank_egop_and_moments_equal_monte_carlo():
    task = tasks.full_rank(1, 1, 1, d=6)
    x = torch.randn(400_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = gradients(task, x)
    torch.testing.assert_close(g.T @ g / len(x), task.egop.double(), atol=2e-4, rtol=0)
    assert torch.linalg.matrix_rank(task.egop) == 6
    wide = tasks.full_rank(1, 1, 1, d=100).target(torch.randn(20_000, 100, generator=torch.Generator().manual_seed(2)))
    assert float(wide.mean()) == pytest.approx(1 - 1 / 400, abs=2e-3)
    assert float(wide.var()) == pytest.approx(1 / 200, rel=0.05)


def test_full_rank_targets_and_noise():
    task = tasks.full_rank(4000, 10, 20, d=9, noise=0.1, seed=3)
    expected = (task.train.inputs.square().sum(1, keepdim=True) / 9).sqrt()
    assert float((task.train.targets - expected).std()) == pytest.approx(0.1, rel=0.05)
    assert (len(task.val), len(task.test)) == (10, 20)
    with pytest.raises(ValueError, match="n_val must be at least 1 for the full-rank task, got 0"):
        tasks.full_rank(n_val=0)
