"""The largest eigenvalue of a symmetric operator from as few products as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

from .vectors import Vector, combine, dot, norm, scaled

Matrix = npt.NDArray[np.float64]

# A Krylov basis of this size restarts from its Ritz vector: keeps memory and rounding in hand.
_BASIS = 16
# Ritz values below this fraction of the top one take no part in the improved estimate.
_SAFE = 0.02


@dataclass(frozen=True)
class EigenEstimate:
    """The top eigenvalue of a symmetric operator and how far to trust it."""

    value: float  # lower bound on the largest eigenvalue (up to the operator's own error)
    vector: Vector  # unit Ritz vector, the warm start of the next call
    residual: float  # |A v - theta v| / theta at the Ritz pair (theta, v): some eigenvalue lies within residual * theta
    matvecs: int
    converged: bool
    asymmetry: float  # largest |v.A w - w.A v| / theta seen between successive vectors: what the products are worth


def top_eigenvalue(
    matvec: Callable[[Vector], Vector],
    start: Sequence[Tensor],
    *,
    tol: float = 0.02,
    max_matvecs: int = 5,
    semidefinite: bool = True,
) -> EigenEstimate:
    """Estimate the largest (algebraic) eigenvalue of a symmetric operator.

    Rayleigh-Ritz on a Krylov basis V with products W = A V. For a semidefinite operator the top generalized eigenvalue
    of (W^T W, V^T W) is used, which is still a lower bound and worth half an iteration more than the Ritz value; after
    one product it is |A v|^2 / v.A v.

    Args:
        matvec: v -> A v; one tensor per parameter in, the same out.
        start: start vector, any length but zero.
        tol: stop when the estimate grew by less than this fraction over the last product; after the first product, when
            estimate and Rayleigh quotient agree within 5 tol. Below 1e-3 the growth has to stay small twice in a row.
        max_matvecs: cap on the number of products, >= 1.
        semidefinite: False for an operator with negative eigenvalues (a full Hessian).

    Raises:
        FloatingPointError: a product was not finite.

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
        >>> e = top_eigenvalue(lambda v: [a @ v[0]], [torch.ones(3)], tol=1e-6, max_matvecs=20)
        >>> round(e.value, 4)
        4.0
    """
    krylov = _Krylov()
    vector = scaled(start, 1.0 / _positive(float(norm(start))))
    previous, calm, done = 0.0, 0, 0
    while True:
        krylov.append(vector, matvec(vector))
        done += 1
        ritz = krylov.ritz(semidefinite)
        growth = abs(ritz.value - previous) / max(abs(ritz.value), 1e-300)
        calm = calm + 1 if done > 1 and growth < tol else 0
        first = done == 1 and ritz.residual <= 5 * tol
        exact = ritz.residual <= tol**2 or ritz.value == 0.0
        converged = first or exact or calm >= (1 if tol >= 1e-3 else 2)
        if not (converged or done >= max_matvecs):
            vector = krylov.extend(ritz)
            if not vector:  # the basis spans an invariant subspace: nothing is left to find from this start
                converged, ritz = True, krylov.ritz(semidefinite)
        if converged or done >= max_matvecs:
            asymmetry = krylov.asymmetry / abs(ritz.theta) if ritz.theta else 0.0
            return EigenEstimate(ritz.value, krylov.ritz_vector(ritz), ritz.residual, done, converged, asymmetry)
        previous = ritz.value


@dataclass(frozen=True)
class EigenPairs:
    """The top eigenpairs of a symmetric operator, largest first."""

    values: list[float]  # k
    vectors: list[Vector]  # k unit vectors, orthogonal to each other
    residuals: list[float]  # |A v - theta v| / largest theta
    matvecs: int
    converged: bool


def top_eigenpairs(
    matvec: Callable[[Vector], Vector],
    start: Sequence[Tensor],
    k: int,
    *,
    tol: float = 1e-3,
    max_matvecs: int = 200,
) -> EigenPairs:
    """The k largest (algebraic) eigenpairs of a symmetric operator, by Lanczos with full orthogonalisation.

    Keeps two vectors a product. From one start vector an eigenvalue of multiplicity m shows once, not m times.

    Args:
        matvec, start: as for `top_eigenvalue`.
        k: number of pairs; fewer come back where the start spans fewer.
        tol: relative residual at which a pair counts as found.
        max_matvecs: cap on the number of products.

    Example:
        >>> a = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
        >>> pairs = top_eigenpairs(lambda v: [a @ v[0]], [torch.ones(4)], 2)
        >>> [round(value, 3) for value in pairs.values]
        [4.0, 2.0]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    krylov, vector = _Krylov(), scaled(start, 1.0 / _positive(float(norm(start))))
    while True:
        krylov.append(vector, matvec(vector))
        pairs = krylov.pairs(k)
        found = len(pairs) == k and all(residual <= tol for _, _, residual in pairs)
        done = len(krylov.basis)
        if not (found or done >= max_matvecs):
            vector = _orthogonal(krylov.products[-1], krylov.basis)
            found = not vector
        if found or done >= max_matvecs:
            return EigenPairs(
                [value for value, _, _ in pairs],
                [combine(krylov.basis, list(c)) for _, c, _ in pairs],
                [residual for _, _, residual in pairs],
                done,
                found,
            )


@dataclass(frozen=True)
class _Ritz:
    value: float  # the estimate
    theta: float  # Ritz value
    coefficients: Matrix  # of the Ritz vector in the basis
    residual: float


class _Krylov:
    """An orthonormal basis V, the products W = A V, and their Gram matrices."""

    def __init__(self) -> None:
        self.basis: list[Vector] = []
        self.products: list[Vector] = []
        self.vw: Matrix = np.zeros((0, 0))
        self.ww: Matrix = np.zeros((0, 0))
        self.asymmetry = 0.0

    def append(self, vector: Vector, product: Vector) -> None:
        self.basis.append(vector)
        self.products.append(product)
        if len(self.basis) > 1:
            upper, lower = float(dot(self.basis[-2], product)), float(dot(vector, self.products[-2]))
            self.asymmetry = max(self.asymmetry, abs(upper - lower))
        self.vw = _bordered(self.vw, [dot(v, product) for v in self.basis])
        self.ww = _bordered(self.ww, [dot(w, product) for w in self.products])
        if not (np.isfinite(self.vw).all() and np.isfinite(self.ww).all()):
            raise FloatingPointError("a curvature product was not finite")

    def ritz(self, semidefinite: bool) -> _Ritz:
        thetas, vectors = np.linalg.eigh(self.vw)
        theta, c = float(thetas[-1]), vectors[:, -1]
        squared = float(c @ self.ww @ c) - theta**2
        residual = math.sqrt(abs(squared)) / abs(theta) if theta else 0.0
        value = theta
        if semidefinite and theta > 0:
            # Dividing by v.A v is safe only where that is clear of the products' own error.
            safe = vectors[:, thetas > _SAFE * theta]
            harmonic = scipy.linalg.eigh(
                safe.T @ self.ww @ safe, np.diag(thetas[thetas > _SAFE * theta]), eigvals_only=True
            )
            value = min(max(theta, float(harmonic[-1])), theta * (1 + residual))
        return _Ritz(value, theta, c, residual)

    def pairs(self, k: int) -> list[tuple[float, Matrix, float]]:
        """Ritz values, coefficients of the Ritz vectors, and residuals relative to the largest; largest first."""
        thetas, vectors = np.linalg.eigh(self.vw)
        largest = float(np.abs(thetas).max()) or 1.0
        pairs = []
        for theta, c in list(zip(thetas, vectors.T, strict=True))[: -k - 1 : -1]:
            squared = float(c @ self.ww @ c) - theta**2
            pairs.append((float(theta), c, math.sqrt(abs(squared)) / largest))
        return pairs

    def ritz_vector(self, ritz: _Ritz) -> Vector:
        return combine(self.basis, [float(c) for c in ritz.coefficients])

    def extend(self, ritz: _Ritz) -> Vector:
        """The next basis vector, [] if there is none; a full basis restarts from its Ritz vector."""
        vector = self.products[-1]
        if len(self.basis) == _BASIS:
            coefficients = [float(c) for c in ritz.coefficients]
            top, vector = combine(self.basis, coefficients), combine(self.products, coefficients)
            self.basis, self.products = [], []
            self.vw, self.ww = np.zeros((0, 0)), np.zeros((0, 0))
            self.append(top, vector)
        return _orthogonal(vector, self.basis)


def _bordered(matrix: Matrix, column: list[Tensor]) -> Matrix:
    """The symmetric matrix with one more row and column (one transfer from the device)."""
    values = torch.stack(column).double().cpu().numpy()
    n = len(matrix)
    bordered = np.zeros((n + 1, n + 1))
    bordered[:n, :n] = matrix
    bordered[n, :] = bordered[:, n] = values
    return bordered


def _orthogonal(vector: Vector, basis: list[Vector]) -> Vector:
    """The unit vector left of `vector` after the basis is taken out, twice for rounding; [] if nothing is left."""
    length = float(norm(vector))
    for _ in range(2):
        overlaps = [-float(dot(v, vector)) for v in basis]
        vector = combine([vector, *basis], [1.0, *overlaps])
    rest = float(norm(vector))
    if not rest > 1e-5 * length:
        return []
    return scaled(vector, 1.0 / rest)


def _positive(length: float) -> float:
    if not (length > 0 and math.isfinite(length)):
        raise ValueError(f"start must be a finite, non-zero vector, its length is {length}")
    return length
