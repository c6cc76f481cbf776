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

# A basis that is full restarts from its Ritz vector. It may hold two vectors in any case (on the networks of
# benchmarks/models.py this costs a tenth more products than a basis that never restarts, to 1 %), and up to eight where
# they take no more than so many bytes.
_SMALLEST_BASIS, _LARGEST_BASIS, _BASIS_BYTES = 2, 8, 2**28
# From the first tol on the estimate may still be growing when it is taken; below the second two products must agree.
_ROUGH, _FINE = 0.1, 1e-3
# Ritz values below this fraction of the top one take no part in the improved estimate.
_SAFE = 0.02
# A product of which less than this part is left outside of the basis is orthogonalised twice, for its rounding.
_CANCELLED = 0.1
# The error of a Ritz value is about residual^2 / gap. It has to be below this part of tol (for a rough one the second),
# as the eigenvalue sought may be one that the start has little of.
_ERROR, _ROUGH_ERROR = 0.05, 0.2
# Where the estimate has stopped growing too, a residual below this times sqrt(tol) is enough, whatever the gap.
_RESIDUAL = 0.1


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
    memory: int = _BASIS_BYTES,
) -> EigenEstimate:
    """Estimate the largest (algebraic) eigenvalue of a symmetric operator.

    Rayleigh-Ritz on a Krylov basis V with products W = A V. For a semidefinite operator the top generalized eigenvalue
    of (W^T W, V^T W) is used, which is still a lower bound and worth half an iteration more than the Ritz value; after
    one product it is |A v|^2 / v.A v.

    The basis holds two to eight vectors, the product one more; they are combined in place.

    Args:
        matvec: v -> A v; one tensor per parameter in, the same out. The list that it returns is emptied.
        start: start vector, any length but zero.
        tol: relative accuracy asked for. Stop when residual^2 over the gap to the next Ritz value is below tol / 20
            (tol / 5 from 0.1 on); or when the last product changed the estimate by less than tol and the residual is
            below sqrt(tol) / 10; or, for products with noise of their own, when three in a row changed it by less than
            tol; or after the first product with a residual below tol. For tol below 0.1 the last product, and below
            1e-3 the last two, must have changed it by less than tol. No residual says that an eigenvalue is the
            largest: the start has to have a part along its eigenvector.
        max_matvecs: cap on the number of products, >= 1.
        semidefinite: False for an operator with negative eigenvalues (a full Hessian).
        total: where each process holds a part of every vector, the sum of inner products over the processes.
        memory: bytes that the basis may take, on each process; two vectors are kept in any case.

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
    del start  # its memory is needed, where nobody else holds it
    size = min(_LARGEST_BASIS, max(_SMALLEST_BASIS, memory // sum(x.numel() * x.element_size() for x in vector)))
    value, calm, done = 0.0, 0, 0
    while True:
        krylov.append(vector, layout.taken(matvec(layout.parts(vector))))
        done += 1
        ritz = krylov.ritz(semidefinite)
        growth = abs(ritz.value - value) / max(abs(ritz.value), 1e-300)
        value = ritz.value
        calm = calm + 1 if done > 1 and growth < tol else 0
        small = ritz.error <= (_ERROR if tol < _ROUGH else _ROUGH_ERROR) * tol
        settled = calm > 0 and ritz.residual <= _RESIDUAL * math.sqrt(tol)
        close = (small or settled) and done > 1 and calm >= (tol < _FINE) + (tol < _ROUGH)
        # Without a rest the basis spans an invariant subspace: nothing is left to find from this start.
        converged = (
            close
            or calm >= 3
            or ritz.residual <= tol**2
            or not krylov.rest
            or (done == 1 and tol >= _FINE and ritz.residual <= tol)
        )
        if converged or done >= max_matvecs:
            asymmetry = krylov.asymmetry / abs(ritz.theta) if ritz.theta else 0.0
            found = krylov.reduced_to(ritz)
            return EigenEstimate(value, layout.parts(found), ritz.residual, done, converged, asymmetry)
        if done > 1 and len(krylov.basis) == size:
            krylov.reduced_to(ritz)
        vector = krylov.rest


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
    # The estimated error of theta, relative to it: residual^2 over the gap to the next Ritz value.
    error: float


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
        self._second = -math.inf  # the highest second Ritz value so far: a lower bound on the second eigenvalue

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
        if theta == 0:
            return _Ritz(0.0, 0.0, c, 0.0, 0.0)
        residual = self._residual(theta, c) / abs(theta)
        if len(thetas) > 1:
            self._second = max(self._second, float(thetas[-2]))
        gap = max(theta - self._second, 0.0) / abs(theta)
        error = residual**2 / max(min(gap, 1.0), residual, 1e-300)
        value = theta
        if semidefinite and theta > 0:
            # Dividing by v.A v is safe only where that is clear of the products' own error.
            safe = vectors[:, thetas > _SAFE * theta] / np.sqrt(thetas[thetas > _SAFE * theta])
            harmonic = np.linalg.eigvalsh(safe.T @ self.ww @ safe)
            value = min(max(theta, float(harmonic[-1])), theta * (1 + residual))
        return _Ritz(value, theta, c, residual, error)

    def pairs(self, k: int) -> list[tuple[float, Matrix, float]]:
        """Ritz values, coefficients of the Ritz vectors, and residuals relative to the largest; largest first."""
        thetas, vectors = np.linalg.eigh(self.vw)
        largest = float(np.abs(thetas).max()) or 1.0
        top = list(zip(thetas, vectors.T, strict=True))[: -k - 1 : -1]
        return [(float(theta), c, self._residual(theta, c) / largest) for theta, c in top]

    def _residual(self, theta: float, c: Matrix) -> float:
        """|A v - theta v| for the unit vector v = V c."""
        return float(np.linalg.norm(self.hessenberg @ c - theta * np.append(c, 0.0)))

    def reduced_to(self, ritz: _Ritz) -> Vector:
        """Let the basis hold the Ritz vector alone, in the memory of its first vector; returns it.

        Its residual is along `rest`, which therefore goes on as the next vector of the basis.
        """
        c = [float(x) for x in ritz.coefficients]
        first = _scale(self.basis[0], c[0])
        add_(first, self.basis[1:], c[1:])
        self.basis = [_unit(first, self._total)]
        self.hessenberg = np.array([[ritz.theta], [float(self.hessenberg[-1] @ ritz.coefficients)]])
        if self.rest:  # from one restart to the next rounding would grow
            _, self.rest = _split(self.rest, self.basis, self._total)
        return first


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
