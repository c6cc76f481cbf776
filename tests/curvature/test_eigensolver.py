"""The eigen-solver on its own: random symmetric matrices, truth from numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from catapult_opt.curvature.eigensolver import top_eigenpairs, top_eigenvalue

F64 = torch.float64


def matrix(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ q.T


def start(n: int, seed: int = 1) -> list[Tensor]:
    return [torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=F64)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_random_gram_matrix_to_tolerance(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n + 3, generator=generator, dtype=F64)
    a = x @ x.T
    truth = np.linalg.eigvalsh(a.numpy())[-1]
    found = top_eigenvalue(lambda v: [a @ v[0]], start(n, seed + 1), tol=1e-8, max_matvecs=500)
    assert found.value == pytest.approx(truth, rel=1e-4)
    assert found.converged


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10_000))
def test_never_above_the_truth_and_better_than_the_rayleigh_quotient(n: int, products: int, seed: int) -> None:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    a = x @ x.T
    truth = np.linalg.eigvalsh(a.numpy())[-1]
    v = start(n, seed)
    found = top_eigenvalue(lambda u: [a @ u[0]], v, tol=1e-12, max_matvecs=products)
    quotient = float(v[0] @ a @ v[0] / (v[0] @ v[0]))
    assert quotient * (1 - 1e-9) <= found.value <= truth * (1 + 1e-9)
    assert found.matvecs <= products


def test_one_product_closed_form() -> None:
    """After one product the estimate is |A v|^2 / v.A v."""
    a = torch.diag(torch.tensor([3.0, 1.0], dtype=F64))
    v = [torch.tensor([1.0, 1.0], dtype=F64)]
    found = top_eigenvalue(lambda u: [a @ u[0]], v, tol=1e-12, max_matvecs=1)
    assert found.value == pytest.approx((9 + 1) / (3 + 1))
    assert not found.converged


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 25), st.integers(1, 8), st.integers(0, 10_000))
def test_an_eigenvalue_lies_within_the_residual(n: int, products: int, seed: int) -> None:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    a = x + x.T
    found = top_eigenvalue(lambda u: [a @ u[0]], start(n, seed), tol=1e-12, max_matvecs=products, semidefinite=False)
    distance = np.abs(np.linalg.eigvalsh(a.numpy()) - found.value).min()
    assert distance <= found.residual * abs(found.value) + 1e-9


def test_largest_algebraic_not_largest_magnitude() -> None:
    a = matrix([-10.0, -3.0, 1.0, 2.0])
    found = top_eigenvalue(lambda u: [a @ u[0]], start(4), tol=1e-9, max_matvecs=50, semidefinite=False)
    assert found.value == pytest.approx(2.0, rel=1e-6)


def test_vector_is_the_eigenvector() -> None:
    a = matrix([5.0, 2.0, 1.0, 0.1, 0.0])
    found = top_eigenvalue(lambda u: [a @ u[0]], start(5), tol=1e-12, max_matvecs=50)
    assert float(found.vector[0].norm()) == pytest.approx(1.0)
    torch.testing.assert_close(a @ found.vector[0], 5.0 * found.vector[0], atol=1e-6, rtol=0)


def test_warm_start_takes_one_product() -> None:
    a = matrix([5.0, *np.linspace(0, 2, 30)])
    cold = top_eigenvalue(lambda u: [a @ u[0]], start(31), tol=1e-4, max_matvecs=50)
    warm = top_eigenvalue(lambda u: [a @ u[0]], cold.vector)
    assert cold.matvecs > 1
    assert warm.matvecs == 1
    assert warm.converged


def test_many_products_restart_and_still_converge() -> None:
    """More products than the basis holds, on a spectrum with a tiny gap."""
    a = matrix([1.0, *np.linspace(0, 0.999, 200)])
    found = top_eigenvalue(lambda u: [a @ u[0]], start(201), tol=1e-9, max_matvecs=400)
    assert found.matvecs > 20
    assert found.value == pytest.approx(1.0, rel=1e-4)


def test_several_tensors_and_shapes_are_one_vector() -> None:
    a = matrix([4.0, 3.0, 1.0, 0.5, 0.2, 0.1])

    def matvec(v: list[Tensor]) -> list[Tensor]:
        w = a @ torch.cat([x.flatten() for x in v])
        return [w[:2].reshape(1, 2), w[2:].reshape(2, 2)]

    found = top_eigenvalue(matvec, [torch.ones(1, 2, dtype=F64), torch.ones(2, 2, dtype=F64)], tol=1e-9, max_matvecs=50)
    assert found.value == pytest.approx(4.0, rel=1e-6)


def test_symmetric_products_show_no_asymmetry_and_skewed_ones_do() -> None:
    a = matrix([4.0, 3.0, 1.0, 0.5])
    skew = torch.triu(torch.ones(4, 4, dtype=F64), 1)
    good = top_eigenvalue(lambda u: [a @ u[0]], start(4), tol=1e-9, max_matvecs=4)
    bad = top_eigenvalue(lambda u: [(a + skew) @ u[0]], start(4), tol=1e-9, max_matvecs=4)
    assert good.asymmetry < 1e-9
    assert bad.asymmetry > 0.05


def test_no_curvature_is_zero() -> None:
    found = top_eigenvalue(lambda u: [torch.zeros_like(u[0])], start(5))
    assert found.value == 0.0
    assert found.converged


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_refuses_a_start_without_direction(bad: float) -> None:
    with pytest.raises(ValueError, match="start must be a finite, non-zero vector"):
        top_eigenvalue(lambda u: u, [torch.full((3,), bad)])


def test_says_so_when_a_product_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        top_eigenvalue(lambda u: [u[0] * float("nan")], start(3))


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 40), st.integers(1, 5), st.integers(0, 10_000))
def test_top_pairs_of_random_matrices(n: int, k: int, seed: int) -> None:
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    a = x + x.T
    pairs = top_eigenpairs(lambda u: [a @ u[0]], start(n, seed + 1), k, tol=1e-9)
    truth = np.linalg.eigvalsh(a.numpy())[::-1][:k]
    assert pairs.values == pytest.approx(list(truth), abs=1e-6)
    assert pairs.converged
    stacked = torch.stack([v[0] for v in pairs.vectors])
    torch.testing.assert_close(stacked @ stacked.T, torch.eye(k, dtype=F64), atol=1e-8, rtol=0)


def test_top_pairs_says_when_the_cap_came_first() -> None:
    a = matrix(list(np.linspace(0, 1, 60)))
    pairs = top_eigenpairs(lambda u: [a @ u[0]], start(60), 3, tol=1e-9, max_matvecs=6)
    assert (pairs.matvecs, pairs.converged) == (6, False)
    assert max(pairs.residuals) > 1e-9
