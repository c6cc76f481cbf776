"""Comparing two optimizers on the same seeds: differences, ratios and geometric means, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

LEVEL = 0.95
CLIP = 10.0  # no ratio counts as more than this, or as less than its inverse: that of a divergence is infinite
_RESAMPLES = 9_999
# A failed run (infinite) is worse than any other, whatever the scale: this stands for it where medians are taken.
_WORST = 1e12
_LEAST = 1e-12  # stands for a metric of zero where ratios are taken


@dataclass(frozen=True)
class Comparison:
    """Differences "ours minus theirs" of a metric of which less is better."""

    median: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> str:
        """ "win" or "loss" where the interval is clear of zero, else "tie"."""
        return "win" if self.high < 0 else "loss" if self.low > 0 else "tie"


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, which is nan where a single value gives none."""

    value: float
    low: float
    high: float


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison | None:
    """By seed, over the seeds that both have; None where there are none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [difference(ours[s], theirs[s]) for s in seeds]
    low, high = interval(differences)
    return Comparison(float(np.median(np.clip(differences, -_WORST, _WORST))), low, high, len(seeds))


def difference(ours: float, theirs: float) -> float:
    """Two failures are as bad as each other."""
    return 0.0 if math.isinf(ours) and math.isinf(theirs) else ours - theirs


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of the median; the median itself of a single value."""
    values = np.clip(np.asarray(differences, float), -_WORST, _WORST)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    return _interval((values,), np.median)


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Our median over theirs, over the seeds that both have; its interval resamples the seeds. None without any."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    pair = tuple(np.clip([values[s] for s in seeds], _LEAST, _WORST) for values in (ours, theirs))
    value = float(_of_medians(*pair))
    low, high = _interval(pair, _of_medians, paired=True) if len(seeds) > 1 else (math.nan, math.nan)
    return Estimate(value, low, high)


def _of_medians(ours: Any, theirs: Any, axis: int = -1) -> Any:
    return np.clip(np.median(ours, axis=axis) / np.median(theirs, axis=axis), 1 / CLIP, CLIP)


def geometric_mean(ratios: Sequence[float]) -> Estimate:
    """Of the ratios of at least one task; its interval resamples the tasks."""
    logs = np.log(np.clip(ratios, 1 / CLIP, CLIP))
    low, high = _interval((logs,), np.mean) if len(logs) > 1 else (math.nan, math.nan)
    return Estimate(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)))


def _interval(data: tuple[Any, ...], statistic: Callable[..., Any], paired: bool = False) -> tuple[float, float]:
    found = bootstrap(
        data, statistic, paired=paired, vectorized=True, n_resamples=_RESAMPLES, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
