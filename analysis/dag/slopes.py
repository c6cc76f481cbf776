"""The exponent of a power law, with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

__all__ = ["Slope", "log_log_slope"]


@dataclass(frozen=True)
class Slope:
    """A least-squares line through log y against log x."""

    value: float
    low: float  # confidence interval
    high: float
    intercept: float  # log y at x = 1
    points: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def log_log_slope(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Slope:
    """The exponent a of a power law y ~ x^a with its confidence interval (Student's t), by least squares of the logs.

    Every run is a point of its own: the same x may stand several times.

    Raises:
        ValueError: fewer than 3 points or than 2 different x, a value that is not positive and finite, or a confidence
            outside (0, 1).

    >>> str(log_log_slope([1, 4, 16, 64], [8, 4, 2, 1]))
    '-0.500 [-0.500, -0.500]'
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 3 or len(np.unique(a)) < 2:
        raise ValueError(f"x and y must be 3 or more points at 2 or more different x, got shapes {a.shape}, {b.shape}")
    if not (np.isfinite(a) & np.isfinite(b) & (a > 0) & (b > 0)).all():
        raise ValueError(f"x and y must be positive and finite, got x = {a.tolist()}, y = {b.tolist()}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    fit = scipy.stats.linregress(np.log(a), np.log(b))
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, len(a) - 2) * fit.stderr)
    slope = float(fit.slope)
    return Slope(slope, slope - half, slope + half, float(fit.intercept), len(a))
