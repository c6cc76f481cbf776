"""The largest eigenvalue of a symmetric operator from as few products as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..vectors import Layout, Total, Vector, add_, combine, dots, norm

Matrix = npt.NDArray[np.float64]

# A Krylov basis of this size restarts from its Ritz vector and keeps the last remainder's direction, so that little is
# lost: on the networks of benchmarks/models.py one that never restarts saves a twentieth of a cold start's products.
_BASIS = 4
# Ritz values below this fraction of the top one take no part in the improved estimate.
_SAFE = 0.02
# Less than this part of a product left outside of the basis is worth a second orthogonalisation, for its rounding.
_CANCELLED = 0.1
# The error of a Ritz value is about residual^2 / gap: this times sqrt(tol) is safe down to gaps of a sixteenth.
_RESIDUAL = 0.25
# What a Ritz value has still to grow, by its last two steps, is to be below this part of tol where v.A v alone tells;
# its growth shrinks by a factor of ten a step at best.
_STILL, _FASTEST = 0.05, 0.1
# For a tol from this on; a finer one is asked for to see the same value by whatever way.
_ROUGH = 5e-3


@dataclass(frozen=True)
class EigenEstimate:
    """The top eigenvalue of a symmetric operator and how far to trust it."""

    # A lower bound on the largest eigenvalue (up to the operator's own error).
    value: float
    # The unit Ritz vector: the warm start of the next call.
    vector: Vector
    # |A v - theta v| / theta at the Ritz pair (theta, v): some eigenvalue lies within residual * theta of theta.
    residual: float
    # The number of products.
    matvecs: int
    # False where the cap on products was reached first.
    converged: bool
    # The largest |v.A w - w.A v| / theta seen between basis vectors: how exact the products are.
    asymmetry: float


def top_eigenvalue(
    matvec: Callable[[Vector], Vector],
    start: Sequence[Tensor],
    *,
    tol: float = 0.02,
    max_matvecs: int = 5,
    semidefinite: bool = True,
    total: Total | None = None,
    quadratic: Callable[[Vector], float] | None = None,
) -> EigenEstimate:
    """Estimate the largest (algebraic) eigenvalue of a symmetric operator.

    Rayleigh-Ritz on a Krylov basis V with products W = A V. For a semidefinite operator the top generalized eigenvalue
    of (W^T W, V^T W) is used, which is still a lower bound and worth half an iteration more than the Ritz value; after
    one product it is |A v|^2 / v.A v. One vector a product is kept.

    Args:
        matvec: v -> A v; one tensor per parameter in, the same out.
        start: start vector, any length but zero.
        tol: relative accuracy asked for. Stop when the estimate grew by less than this fraction over the last product
            and the residual is below sqrt(tol)/4 (its square over the gap to the next eigenvalue is the error), or,
            for products with noise of their own, after three such products in a row; after the first product, when
            the residual is below 5 tol. Below 1e-3 the growth has to stay small twice in a row.
        max_matvecs: cap on the number of products, >= 1.
        semidefinite: False for an operator with negative eigenvalues (a full Hessian).
        total: where each process holds a part of every vector, the sum of inner products over the processes.
        quadratic: v -> v.A v, where that takes a part of a product (and spares the product with the same v that
            follows as much). With the vector that the last product left over it gives the Ritz value of one dimension
            more: where this shows that a twentieth of tol is left to gain, the rest of the product is not needed.

    Raises:
        FloatingPointError: a product was not finite.

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([4.0, 1.0, 0.5]))
        >>> e = top_eigenvalue(lambda v: [a @ v[0]], [torch.ones(3)], tol=1e-6, max_matvecs=20)
        >>> round(e.value, 4)
        4.0
    """
    layout, krylov = Layout(start), _Krylov(total)
    vector = _unit(layout.flat(start), total)
    ritz: _Ritz | None = None
    thetas, calm, done = [0.0], 0, 0
    while True:
        parts = layout.parts(vector)
        if quadratic and tol >= _ROUGH and ritz and done > 1 and ritz.residual <= math.sqrt(tol):
            theta, coefficients = krylov.bordered(quadratic(parts))
            if _still_to_grow([*thetas, theta]) < _STILL * tol:
                found = combine([*krylov.basis, vector], coefficients)
                value, asymmetry = max(theta, ritz.value), krylov.asymmetry / theta
                return EigenEstimate(value, layout.parts(found), ritz.residual, done, True, asymmetry)
        krylov.append(vector, layout.flat(matvec(parts)))
        done += 1
        previous, ritz = ritz.value if ritz else 0.0, krylov.ritz(semidefinite)
        thetas.append(ritz.theta)
        growth = abs(ritz.value - previous) / max(abs(ritz.value), 1e-300)
        calm = calm + 1 if done > 1 and growth < tol else 0
        first = done == 1 and ritz.residual <= 5 * tol
        exact = ritz.residual <= tol**2 or ritz.value == 0.0
        converged = first or exact or calm >= _calm_products(tol, ritz.residual)
        if not (converged or done >= max_matvecs):
            vector = krylov.extend(ritz)
            if not vector:  # the basis spans an invariant subspace: nothing is left to find from this start
                converged, ritz = True, krylov.ritz(semidefinite)
        if converged or done >= max_matvecs:
            asymmetry = krylov.asymmetry / abs(ritz.theta) if ritz.theta else 0.0
            found = krylov.ritz_vector(ritz)
            return EigenEstimate(ritz.value, layout.parts(found), ritz.residual, done, converged, asymmetry)


def _still_to_grow(thetas: list[float]) -> float:
    """What is left to the limit of a sequence whose steps shrink by a constant factor, relative to its last value."""
    before, last = thetas[-2] - thetas[-3], max(thetas[-1] - thetas[-2], 0.0)
    if not before > 0:
        return math.inf
    factor = min(max(last / before, _FASTEST), 0.95)
    return last * factor / (1 - factor) / thetas[-1]


def _calm_products(tol: float, residual: float) -> int:
    """How many products in a row have to change little: few eigenvalues fool a small residual, many a large one."""
    if residual > _RESIDUAL * math.sqrt(tol):
        return 3
    return 1 if tol >= 1e-3 else 2


@dataclass(frozen=True)
class EigenPairs:
    """The top eigenpairs of a symmetric operator, largest first."""

    # The k eigenvalues.
    values: list[float]
    # Their k unit vectors, orthogonal to each other.
    vectors: list[Vector]
    # |A v - theta v| / (largest theta) of each pair.
    residuals: list[float]
    # The number of products.
    matvecs: int
    # False where the cap on products was reached first.
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

    Keeps one vector a product. From one start vector an eigenvalue of multiplicity m shows once, not m times.

    Args:
        matvec, start: as for `top_eigenvalue`.
        k: number of pairs; fewer come back where the start spans fewer.
        tol: relative residual at which a pair counts as found.
        max_matvecs: cap on the number of products.

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
        >>> pairs = top_eigenpairs(lambda v: [a @ v[0]], [torch.ones(4)], 2)
        >>> [round(value, 3) for value in pairs.values]
        [4.0, 2.0]
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    layout, krylov = Layout(start), _Krylov()
    vector = _unit(layout.flat(start), None)
    while True:
        krylov.append(vector, layout.flat(matvec(layout.parts(vector))))
        pairs = krylov.pairs(k)
        found = len(pairs) == k and all(residual <= tol for _, _, residual in pairs)
        done = len(krylov.basis)
        if not (found or done >= max_matvecs):
            vector = krylov.rest
            found = not vector
        if found or done >= max_matvecs:
            return EigenPairs(
                [value for value, _, _ in pairs],
                [layout.parts(combine(krylov.basis, list(c))) for _, c, _ in pairs],
                [residual for _, _, residual in pairs],
                done,
                found,
            )


@dataclass(frozen=True)
class _Ritz:
    # The estimate of the largest eigenvalue.
    value: float
    # The Ritz value.
    theta: float
    # The coefficients of the Ritz vector in the basis.
    coefficients: Matrix
    # |A v - theta v| / theta.
    residual: float


class _Krylov:
    """An orthonormal basis V of a Krylov space, and the Hessenberg matrix H of A V = [V, rest] H.

    The products A V themselves are not kept: V^T A V and V^T A A V follow from H. The orthogonalisation is full, so
    this holds to rounding also where the products are only nearly symmetric.
    """

    def __init__(self, total: Total | None = None) -> None:
        self._total = total
        self.basis: list[Vector] = []
        self.rest: Vector = []  # unit vector, what the last product adds to the basis; [] if nothing
        self.hessenberg: Matrix = np.zeros((1, 0))
        self.asymmetry = 0.0

    @property
    def vw(self) -> Matrix:
        """V^T A V, symmetric by its upper triangle."""
        upper = np.triu(self.hessenberg[:-1])
        symmetric: Matrix = upper + np.triu(upper, 1).T
        return symmetric

    @property
    def ww(self) -> Matrix:
        """(A V)^T A V."""
        gram: Matrix = self.hessenberg.T @ self.hessenberg
        return gram

    def append(self, vector: Vector, product: Vector) -> None:
        """A vector orthogonal to the basis, and its product."""
        self.basis.append(vector)
        column, self.rest = _split(product, self.basis, self._total)
        if not np.isfinite(column).all():
            raise FloatingPointError("a curvature product was not finite")
        n = len(self.basis)
        grown = np.zeros((n + 1, n))
        grown[:n, : n - 1], grown[:, n - 1] = self.hessenberg, column
        self.hessenberg = grown
        if n > 1:
            self.asymmetry = max(self.asymmetry, float(np.abs(grown[: n - 1, n - 1] - grown[n - 1, : n - 1]).max()))

    def ritz(self, semidefinite: bool) -> _Ritz:
        thetas, vectors = np.linalg.eigh(self.vw)
        theta, c = float(thetas[-1]), vectors[:, -1]
        residual = self._residual(theta, c) / abs(theta) if theta else 0.0
        value = theta
        if semidefinite and theta > 0:
            # Dividing by v.A v is safe only where that is clear of the products' own error.
            safe = vectors[:, thetas > _SAFE * theta] / np.sqrt(thetas[thetas > _SAFE * theta])
            harmonic = np.linalg.eigvalsh(safe.T @ self.ww @ safe)
            value = min(max(theta, float(harmonic[-1])), theta * (1 + residual))
        return _Ritz(value, theta, c, residual)

    def pairs(self, k: int) -> list[tuple[float, Matrix, float]]:
        """Ritz values, coefficients of the Ritz vectors, and residuals relative to the largest; largest first."""
        thetas, vectors = np.linalg.eigh(self.vw)
        largest = float(np.abs(thetas).max()) or 1.0
        top = list(zip(thetas, vectors.T, strict=True))[: -k - 1 : -1]
        return [(float(theta), c, self._residual(theta, c) / largest) for theta, c in top]

    def _residual(self, theta: float, c: Matrix) -> float:
        """|A v - theta v| for the unit vector v = V c."""
        return float(np.linalg.norm(self.hessenberg @ c - theta * np.append(c, 0.0)))

    def ritz_vector(self, ritz: _Ritz) -> Vector:
        return combine(self.basis, [float(c) for c in ritz.coefficients])

    def bordered(self, quotient: float) -> tuple[float, list[float]]:
        """Top Ritz value and coefficients of the basis and `rest`, of which v.A v is given."""
        n = len(self.basis)
        matrix = np.zeros((n + 1, n + 1))
        matrix[:n, :n], matrix[n, n] = self.vw, quotient
        matrix[n, :n] = matrix[:n, n] = self.hessenberg[n]
        thetas, vectors = np.linalg.eigh(matrix)
        return float(thetas[-1]), [float(c) for c in vectors[:, -1]]

    def extend(self, ritz: _Ritz) -> Vector:
        """The next basis vector, [] if there is none; a full basis restarts from its Ritz vector."""
        if self.rest and len(self.basis) == _BASIS:
            top, image = self.ritz_vector(ritz), [float(x) for x in self.hessenberg @ ritz.coefficients]
            product = self.basis.pop()  # A v in the memory of one that goes
            add_(_scale(product, image[_BASIS - 1]), [*self.basis, self.rest], image[: _BASIS - 1] + image[_BASIS:])
            self.basis, self.rest, self.hessenberg = [], [], np.zeros((1, 0))
            self.append(top, product)
        return self.rest


def _split(left: Vector, basis: list[Vector], total: Total | None) -> tuple[Matrix, Vector]:
    """Coefficients of a vector in the basis and along the unit vector that is left, and that one ([]: nothing left).

    In the vector's own memory.
    """
    overlaps, rest = np.zeros(len(basis)), math.inf
    for _ in range(2):
        parts = _overlaps(basis, left, total)
        add_(left, basis, [-float(part) for part in parts])
        overlaps += parts
        rest = float(norm(left, total))
        if rest > _CANCELLED * float(np.linalg.norm(overlaps)):
            break
    column = np.append(overlaps, rest)
    if not rest > 1e-5 * float(np.linalg.norm(column)):
        return column, []
    return column, _scale(left, 1.0 / rest)


def _overlaps(basis: list[Vector], vector: Vector, total: Total | None) -> Matrix:
    inner = dots(basis, vector)
    found: Matrix = (inner if total is None else total(inner)).double().cpu().numpy()  # one transfer from the device
    return found


def _unit(vector: Vector, total: Total | None) -> Vector:
    """Scaled in place."""
    return _scale(vector, 1.0 / _positive(float(norm(vector, total))))


def _scale(vector: Vector, factor: float) -> Vector:
    for x in vector:
        x.mul_(factor)
    return vector


def _positive(length: float) -> float:
    if not (length > 0 and math.isfinite(length)):
        raise ValueError(f"start must be a finite, non-zero vector, its length is {length}")
    return length
