"""Gradient descent on quadratic models, in function space: exact maps of outputs and tangent kernel to the next step's.

Everywhere the loss is ``L = (1/2) sum_i (f_i - y_i)^2`` and the step ``w - eta dL/dw``, as in the thesis' Section 3.2.
``nn.MSELoss()`` over n samples of one output is 2/n of that L: its rate is n/2 times the eta meant here.

The steps are plain arithmetic: they take Python numbers, NumPy arrays and torch tensors alike, and broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "Trajectory",
    "matrix_step",
    "one_dimensional_step",
    "reduced",
    "reduced_step",
    "scalar_step",
    "scalar_step_jacobian",
    "scalar_trajectory",
]

Array = npt.NDArray[np.float64]


def scalar_step(g: Any, lam: Any, *, eta: Any, y: Any, c: Any) -> tuple[Any, Any]:
    """Output g and tangent kernel lambda of a quadratic model on one sample, after one more step.

    ``g' - y = (1 - eta lambda + c eta^2 (g - y) g) (g - y)`` and
    ``lambda' = lambda - c eta (4 g (g - y) - eta lambda (g - y)^2)``, which is Eq. 3.12 without its division by g - y.

    Args:
        c: ``|x|^2 / (m d)`` for `TwoLayerNQM`. With y = 0 and c = gamma^2 |x|^2 these are the dynamics of Appendix
            B.13, whose printed equations lost a factor gamma in both and eta in the second.

    Source: thesis Eq. 3.11 and 3.12.

    >>> scalar_step(1.0, 2.0, eta=0.5, y=0.0, c=0.0)  # linear: g shrinks by 1 - eta lambda
    (0.0, 2.0)
    """
    r = g - y
    return y + (1 - eta * lam + c * eta**2 * r * g) * r, lam - c * eta * (4 * g * r - eta * lam * r**2)


def scalar_step_jacobian(g: float, lam: float, *, eta: float, y: float, c: float) -> Array:
    """The 2 x 2 Jacobian of `scalar_step`, d(g', lambda')/d(g, lambda): its eigenvalues decide on stability.

    Source: thesis Theorem 3.3.4, which works in (u, v) and takes the sign of g - y as fixed (see `equilibria`).

    >>> float(scalar_step_jacobian(1.0, 2.0, eta=0.5, y=1.0, c=0.1)[0, 0])  # at g = y: 1 - eta lambda
    0.0
    """
    r, k = g - y, c * eta**2
    return np.array(
        [
            [1 - eta * lam + k * (2 * r * g + r**2), -eta * r],
            [-c * eta * (4 * r + 4 * g - 2 * eta * lam * r), 1 + k * r**2],
        ]
    )


@dataclass(frozen=True)
class Trajectory:
    """Outputs and tangent kernel of one sample, over steps 0..T."""

    g: Array  # (T + 1, ...)
    lam: Array  # (T + 1, ...)
    loss: Array  # (T + 1, ...), (1/2) (g - y)^2; inf or nan after a divergence


def scalar_trajectory(g: Any, lam: Any, *, eta: Any, y: Any, c: Any, steps: int) -> Trajectory:
    """`scalar_step` so many times, in float64; arguments are numbers or arrays that broadcast.

    Raises:
        ValueError: a negative number of steps.

    >>> scalar_trajectory(1.0, 2.5, eta=1.0, y=0.0, c=1e-3, steps=100).loss[[0, 100]].round(6).tolist()
    [0.5, 0.0]
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    present = np.broadcast_arrays(np.asarray(g, np.float64), np.asarray(lam, np.float64), eta, y, c)[:2]
    g_all, lam_all = (np.empty((steps + 1, *present[0].shape)) for _ in range(2))
    with np.errstate(over="ignore", invalid="ignore"):
        for t in range(steps + 1):
            g_all[t], lam_all[t] = present
            present = scalar_step(g_all[t], lam_all[t], eta=eta, y=y, c=c)
        return Trajectory(g_all, lam_all, 0.5 * (g_all - y) ** 2)


def reduced(g: Any, lam: Any, *, eta: Any, y: Any, c: Any) -> tuple[Any, Any, Any]:
    """The variables without units ``u = c eta^2 (g - y)^2``, ``v = eta lambda`` and ``w = c eta^2 (g - y) y``.

    Source: thesis, proof of Theorem 3.3.1.
    """
    r = g - y
    return c * eta**2 * r**2, eta * lam, c * eta**2 * r * y


def reduced_step(u: Any, v: Any, w: Any) -> tuple[Any, Any, Any]:
    """`scalar_step` in the variables of `reduced`: u and v by Eq. 3.13 and 3.14.

    The thesis leaves w' to its definition; as w is proportional to g - y, it is mu w, with mu = 1 - v + u + w.

    Source: thesis Eq. 3.13 and 3.14; Eq. B.9 to B.12 are the same along an eigendirection.

    >>> reduced_step(0.25, 2.0, 0.0)
    (0.140625, 1.5, -0.0)
    """
    mu = 1 - v + u + w
    return mu**2 * u, v - u * (4 - v) - 4 * w, mu * w


def matrix_step(residual: Any, jacobian: Any, hessians: Any, *, eta: float) -> tuple[Any, Any, Any]:
    """Residuals, Jacobian and tangent kernel of any quadratic model on n samples, after one more step.

    With ``G_i = (f - y)^T J H_i`` as rows of G, ``r' = (I - eta K + (eta^2 / 2) G J^T) r``, ``J' = J - eta G`` and
    ``K' = K - eta (G J^T + J G^T) + eta^2 G G^T``. Eq. 3.16 as printed, ``K - (eta / 4)(4 G J^T - eta G G^T)``, is not
    symmetric and not exact; this is.

    Args:
        residual: f - y (n,), where n counts outputs.
        jacobian: (n, p).
        hessians: (n, p, p), constant along the trajectory.

    Returns:
        r' (n,), J' (n, p), K' (n, n), of the arguments' kind (NumPy or torch).

    Source: thesis Eq. 3.15 and 3.16, corrected.

    >>> r, j, k = matrix_step(np.ones(1), np.ones((1, 2)), np.zeros((1, 2, 2)), eta=0.5)
    >>> r, k
    (array([0.]), array([[2.]]))
    """
    kernel = jacobian @ jacobian.T
    g = hessians @ (jacobian.T @ residual)
    cross = g @ jacobian.T
    next_residual = residual - eta * (kernel @ residual) + 0.5 * eta**2 * (cross @ residual)
    return next_residual, jacobian - eta * g, kernel - eta * (cross + cross.T) + eta**2 * (g @ g.T)


def one_dimensional_step(g: Any, kernel: Any, *, x: Any, y: Any, eta: float, m: int) -> tuple[Any, Any]:
    """Outputs and tangent kernel of `TwoLayerNQM` on n samples of one dimension, after one more step; any width.

    Samples of different sign do not act on one another. For each sign s, with ``a`` = x where it has that sign and 0
    elsewhere, r = g - y and q_s the sum of r g over those samples,
    ``r' = r - eta K r + (eta^2 / m) sum_s q_s a_s (a_s^T r)`` and
    ``K' = K + sum_s ((eta^2 / m) r_s^T K r_s - (4 eta / m) q_s) a_s a_s^T``.

    Args:
        g, x, y: (n,).
        kernel: (n, n).
        m: width.

    Source: thesis Appendix B.2, "Multiple training examples" (its p_1 and p_2 stand for these a, not of unit length);
    Eq. B.7 and B.8.
    """
    r = g - y
    next_g = g - eta * (kernel @ r)
    next_kernel = kernel
    for active in (x >= 0, x < 0):
        a, r_s = x * active, r * active
        q = r_s @ g
        next_g = next_g + eta**2 / m * q * (a @ r) * a
        next_kernel = next_kernel + (eta**2 / m * (r_s @ kernel @ r_s) - 4 * eta / m * q) * (a[:, None] * a[None, :])
    return next_g, next_kernel
