"""Which of three ways gradient descent on a quadratic model goes, predicted from eta lambda_0 and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .dynamics import Array, scalar_step_jacobian, scalar_trajectory

__all__ = [
    "Equilibrium",
    "Observation",
    "PhaseDiagram",
    "Regime",
    "catapult_directions",
    "equilibria",
    "observe",
    "phase_diagram",
    "regime",
    "two_layer_start",
]

Regime = Literal["monotone", "catapult", "divergent", "undecided"]


def regime(eta: float, lambda0: float, *, width: float = math.inf) -> Regime:
    """The regime of a neural quadratic model: monotone below 2/lambda_0, catapult up to 4/lambda_0, then divergent.

    Args:
        eta: learning rate, for the loss (1/2) sum (f - y)^2. For the mean squared error of n outputs, give eta 2 / n.
        lambda0: largest eigenvalue of the tangent kernel at the start.
        width: m. The theorems leave open where eta lambda_0 is within epsilon = log(m) / sqrt(m) of 2 or 4 (they say
            Theta of it; here the factor is 1): "undecided".

    Raises:
        ValueError: a number that is not positive.

    Source: thesis Section 3.3, Theorems 3.3.1, B.3.1 and B.7.1.

    >>> [regime(eta, 2.0) for eta in (0.9, 1.5, 2.1)]
    ['monotone', 'catapult', 'divergent']
    >>> regime(1.01, 2.0, width=1000)
    'undecided'
    """
    for name, value in {"eta": eta, "lambda0": lambda0, "width": width}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    product = eta * lambda0
    epsilon = 0.0 if math.isinf(width) else math.log(width) / math.sqrt(width)
    if min(abs(product - 2), abs(product - 4)) < epsilon:
        return "undecided"
    return "monotone" if product < 2 else "catapult" if product < 4 else "divergent"


def catapult_directions(eta: float, eigenvalues: Sequence[float] | Array) -> list[int]:
    """The places i of the eigendirections p_i of the tangent kernel in which the loss catapults: eta lambda_i > 2.

    None where eta lambda_1 > 4: gradient descent then diverges.

    Source: thesis Theorem 3.3.6, for data of one dimension; Section 4.3 for wide networks.

    >>> catapult_directions(0.5, [5.0, 4.5, 1.0]), catapult_directions(1.0, [5.0, 4.5])
    ([0, 1], [])
    """
    products = eta * np.asarray(eigenvalues, np.float64)
    if products.max(initial=0.0) > 4:
        return []
    return [int(i) for i in np.flatnonzero(products > 2)]


@dataclass(frozen=True)
class Observation:
    """What a run did."""

    regime: Regime  # never "undecided"
    peak: float  # largest loss; inf where it diverged
    final: float  # last loss
    final_kernel: float  # last largest eigenvalue of the tangent kernel


def observe(losses: Sequence[float] | Array, kernels: Sequence[float] | Array, *, rise: float = 1.05) -> Observation:
    """The regime that a run's losses show.

    Divergent: a loss that is not finite, or that ends above where it began. Catapult: it rose above ``rise`` times the
    first and came back below it. Monotone: else. ``rise`` is lower than the spikes of `catapult_opt.catapults`, because
    these dynamics have no noise and Theorem 3.3.1's peaks are low just above 2/lambda.

    Raises:
        ValueError: no losses, or not as many kernels.

    >>> observe([1.0, 5.0, 0.1], [2.5, 2.4, 1.5])
    Observation(regime='catapult', peak=5.0, final=0.1, final_kernel=1.5)
    """
    values, lam = np.asarray(losses, np.float64), np.asarray(kernels, np.float64)
    if len(values) == 0 or len(values) != len(lam):
        raise ValueError(f"losses and kernels must be as many, at least 1, got {len(values)} and {len(lam)}")
    if not np.isfinite(values).all() or values[-1] > values[0]:
        return Observation("divergent", math.inf, float(values[-1]), float(lam[-1]))
    peak = float(values.max())
    kind: Regime = "catapult" if peak > rise * values[0] else "monotone"
    return Observation(kind, peak, float(values[-1]), float(lam[-1]))


def two_layer_start(m: int, *, norm: float = 1.0, d: int = 1, seed: int = 0) -> tuple[float, float]:
    """g(0) and lambda(0) of a fresh `TwoLayerReLU` on one sample x, without forming the network: up to any width.

    The weights enter through u_i^T x / sqrt(d) ~ N(0, |x|^2 / d) only. float64.

    Args:
        m: width.
        norm: |x|.

    Source: thesis Eq. 3.9 and 3.5.

    >>> g, lam = two_layer_start(10**6)
    >>> abs(lam - 1.0) < 0.01  # E lambda = |x|^2 / d
    True
    """
    if m < 1 or d < 1:
        raise ValueError(f"m and d must be at least 1, got m = {m}, d = {d}")
    rng = np.random.default_rng([seed, m, d])
    z = rng.normal(0.0, norm / math.sqrt(d), m)
    v = rng.choice(np.array([-1.0, 1.0]), m)
    hidden = np.maximum(z, 0.0)
    g = float(v @ hidden) / math.sqrt(m)
    lam = norm**2 / d * float(np.count_nonzero(z >= 0)) / m + float(hidden @ hidden) / m
    return g, lam


@dataclass(frozen=True)
class PhaseDiagram:
    """Runs of two-layer NQMs on one sample over a grid of eta lambda_0 (k of them), widths (l) and seeds (s)."""

    products: Array  # (k,), eta lambda_0
    widths: npt.NDArray[np.int64]  # (l,)
    predicted: list[list[Regime]]  # k x l, with the theorems' epsilon
    observed: list[list[list[Regime]]]  # k x l x s
    first: Array  # (k, l, s), loss at the start
    peak: Array  # (k, l, s), largest loss; inf where divergent
    final: Array  # (k, l, s), last loss
    final_kernel: Array  # (k, l, s), eta lambda at the end; nan or inf where divergent


def phase_diagram(
    products: Sequence[float],
    widths: Sequence[int],
    *,
    seeds: Sequence[int] = (0,),
    norm: float = 1.0,
    y: float = 1.0,
    d: int = 1,
    steps: int = 500,
) -> PhaseDiagram:
    """Gradient descent on two-layer NQMs with one sample (x, y) at rates eta = product / lambda_0, for every width.

    Starts are drawn by `two_layer_start`; the runs are `scalar_trajectory`, which is exact for these models.

    Source: thesis Theorems 3.3.1, B.3.1, B.7.1.

    >>> diagram = phase_diagram([1.0, 3.0, 5.0], [10_000])
    >>> [row[0][0] for row in diagram.observed]
    ['monotone', 'catapult', 'divergent']
    """
    starts = np.array([[two_layer_start(m, norm=norm, d=d, seed=seed) for seed in seeds] for m in widths])  # (l, s, 2)
    g0, lam0 = starts[..., 0], starts[..., 1]
    eta = np.asarray(products, np.float64)[:, None, None] / lam0
    c = norm**2 / (np.asarray(widths)[:, None] * d)
    run = scalar_trajectory(g0, lam0, eta=eta, y=y, c=c, steps=steps)
    shape = eta.shape
    seen = [
        [[observe(run.loss[:, i, j, n], run.lam[:, i, j, n]) for n in range(shape[2])] for j in range(shape[1])]
        for i in range(shape[0])
    ]

    def field(name: str) -> Array:
        return np.array([[[getattr(o, name) for o in row] for row in rows] for rows in seen], np.float64)

    return PhaseDiagram(
        np.asarray(products, np.float64),
        np.asarray(widths, np.int64),
        [[regime(product, 1.0, width=m) for m in widths] for product in products],
        [[[o.regime for o in row] for row in rows] for rows in seen],
        run.loss[0],
        field("peak"),
        field("final"),
        eta * field("final_kernel"),
    )


@dataclass(frozen=True)
class Equilibrium:
    """A fixed point of `scalar_step`."""

    g: float
    lam: float
    eigenvalues: tuple[complex, complex]  # of the step's Jacobian there

    @property
    def spectral_radius(self) -> float:
        """Largest |eigenvalue|: above 1, unstable."""
        return max(abs(value) for value in self.eigenvalues)


def equilibria(*, eta: float, y: float, c: float, products: Sequence[float] = ()) -> list[Equilibrium]:
    """All fixed points of the one-sample dynamics: those of zero loss at the given eta lambda, then the others.

    g = y is a fixed point at every lambda, with eigenvalues 1 - eta lambda and 1 (along the line itself): stable for
    0 < eta lambda < 2. Elsewhere the step's factor mu has to be 1, which leaves g = lambda = 0 (u = C^2/m, the thesis'
    case 2.2) with eigenvalues (1 +- eta y sqrt(c))^2, and the two points with c eta^2 (g - y)^2 = 4, with an eigenvalue
    of 9. The thesis also counts mu = -1 (its case 2.1): there u repeats, but g - y and with it w change sign at every
    step, so that v does not, and it is not a fixed point.

    Source: thesis Theorem 3.3.4 and Appendix B.6.

    >>> points = equilibria(eta=1.0, y=1.0, c=0.01, products=[1.5])
    >>> [round(point.spectral_radius, 2) for point in points]
    [1.0, 1.21, 9.0, 9.0]
    """
    if not (eta > 0 and c > 0):
        raise ValueError(f"eta and c must be positive, got eta = {eta!r}, c = {c!r}")
    places = [(y, product / eta) for product in products] + [(0.0, 0.0)]
    for r in (2 / (eta * math.sqrt(c)), -2 / (eta * math.sqrt(c))):
        places.append((y + r, 4 * (y + r) / (r * eta)))
    return [_equilibrium(g, lam, eta, y, c) for g, lam in places]


def _equilibrium(g: float, lam: float, eta: float, y: float, c: float) -> Equilibrium:
    first, second = np.linalg.eigvals(scalar_step_jacobian(g, lam, eta=eta, y=y, c=c))
    return Equilibrium(g, lam, (complex(first), complex(second)))
