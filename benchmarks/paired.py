"""Comparing two optimizers on the same seeds: paired differences, their median and its bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_RESAMPLES = 10_000
# A failed run (infinite) is worse than any other, whatever the scale: this stands for it where medians are taken.
_WORST = 1e12


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


def interval(differences: Sequence[float], level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median."""
    values = np.clip(np.asarray(differences, float), -_WORST, _WORST)
    draws = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
