"""Counting catapults in any sequence of losses and critical rates, in the thesis' own terms."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

Event = tuple[str, dict[str, float]]

# The thesis' epsilon in eta - eta_crit(X_batch) > epsilon (Sec. 4.4).
_EPSILON = 1e-8
# A loss above this multiple of the level it rose from is a spike; below it a wiggle.
_SPIKE = 1.2
# A curvature below this fraction of the first one measured has collapsed (dead ReLUs), not dropped.
_COLLAPSED = 1e-6


def is_super_critical(rate: float, eta_crit: float) -> bool:
    """The thesis' count of catapults in SGD (Sec. 4.4): eta - eta_crit(X_batch) > 1e-8."""
    return rate - eta_crit > _EPSILON


@dataclass
class _State:
    super_critical: int = 0
    catapults: int = 0
    collapses: int = 0
    measured: int = 0
    first_curvature: float = 0.0
    low: float = math.inf  # level of the loss before the rise
    low_curvature: float = 0.0  # curvature there
    peak: float = 0.0
    spiking: bool = False
    peaked: bool = False
    collapsed: bool = False
    mean_loss: float = 0.0
    mean_curvature: float = 0.0


class CatapultCounter:
    """Counts super-critical steps, and catapults as episodes.

    An episode: the loss rises by more than a fifth from a super-critical start, peaks, and returns to the level before
    the rise with a lower curvature. A curvature that vanishes (dead ReLUs) is a collapse, not a catapult.

    Example:
        >>> counter = CatapultCounter()
        >>> for loss, lam in [(1.0, 4.0), (5.0, 4.0), (9.0, 3.0), (0.9, 1.0)]:
        ...     events = counter.update(loss=loss, lambda_max=lam, rate=1.0, eta_crit=2 / lam)
        >>> counter.catapults, counter.super_critical_steps
        (1, 3)
    """

    def __init__(self) -> None:
        self._state = _State()

    @property
    def super_critical_steps(self) -> int:
        return self._state.super_critical

    @property
    def catapults(self) -> int:
        return self._state.catapults

    @property
    def collapses(self) -> int:
        return self._state.collapses

    @property
    def measured_steps(self) -> int:
        return self._state.measured

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = _State(**state)

    def update(
        self, *, loss: float, lambda_max: float, rate: float, eta_crit: float, smoothing: int = 1
    ) -> list[Event]:
        """One measured step: its loss, curvature, rate and critical rate; gives the events it completes.

        With smoothing > 1 (mini-batches) episodes are read off running means; the super-critical count never is.
        """
        s = self._state
        s.measured += 1
        s.super_critical += is_super_critical(rate, eta_crit)
        if not math.isfinite(loss):
            return []
        weight = 1.0 / min(s.measured, smoothing)
        s.mean_loss += weight * (loss - s.mean_loss)
        s.mean_curvature += weight * (lambda_max - s.mean_curvature)
        s.first_curvature = s.first_curvature or lambda_max
        return self._collapse() or self._episode(is_super_critical(rate, eta_crit))

    def _collapse(self) -> list[Event]:
        s = self._state
        vanished = s.mean_curvature <= _COLLAPSED * s.first_curvature
        news = vanished and not s.collapsed
        s.collapsed = vanished
        if not news:
            return []
        s.collapses += 1
        s.spiking = False
        return [("collapse", {"lambda_max": s.mean_curvature, "loss": s.mean_loss})]

    def _episode(self, super_critical: bool) -> list[Event]:
        s = self._state
        loss, curvature = s.mean_loss, s.mean_curvature
        if not s.spiking:
            if loss > _SPIKE * s.low:
                s.spiking, s.peaked, s.peak = True, False, loss
                return [("catapult_started", {"loss": loss, "low": s.low})]
            # A rise counts from the lowest loss of the super-critical steps that led to it.
            if super_critical and loss <= s.low:
                s.low, s.low_curvature = loss, curvature
            elif loss <= s.low:
                s.low = math.inf
            return []
        if loss > s.peak:
            s.peak = loss
            return []
        events: list[Event] = []
        if not s.peaked:
            s.peaked = True
            events.append(("catapult_peaked", {"peak": s.peak}))
        if loss <= s.low:
            if curvature < s.low_curvature:
                s.catapults += 1
                ratio = curvature / s.low_curvature
                events.append(("catapult_recovered", {"loss": loss, "peak": s.peak, "curvature_ratio": ratio}))
            s.spiking, s.low = False, math.inf
        return events
