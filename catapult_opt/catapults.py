"""Counting catapults in any sequence of losses and critical rates, in the thesis' own terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .state import FieldsState, field_of, take_over

Event = tuple[str, dict[str, Any]]

# The thesis' epsilon in eta - eta_crit(X_batch) > epsilon (Sec. 4.4).
_EPSILON = 1e-8
# A loss above this multiple of the level it rose from is a spike; below it a wiggle. What is counted is the thesis' own
# spike, by a fixed factor; the policy, which has to act before that, judges a rise by the spread of the losses.
SPIKE = 1.2
# A curvature below this fraction of the first one measured has collapsed (dead ReLUs), not dropped. The policy undoes a
# fall by 1e4 within one catapult already.
_COLLAPSED = 1e-6


def above(level: float, factor: float) -> float:
    """factor * level; of a negative loss, as far above it.

    >>> above(2.0, 1.5), above(-2.0, 1.5)
    (3.0, -1.0)
    """
    return level + (factor - 1) * abs(level)


def is_super_critical(rate: float, eta_crit: float) -> bool:
    """The thesis' count of catapults in SGD (Sec. 4.4): eta - eta_crit(X_batch) > 1e-8."""
    return rate - eta_crit > _EPSILON


@dataclass
class _State(FieldsState):
    # Measured steps with eta - eta_crit > 1e-8.
    super_critical: int = field_of(0, least=0)
    # Episodes completed, and times the curvature vanished.
    catapults: int = field_of(0, least=0)
    collapses: int = field_of(0, least=0)
    # Steps counted, those of them that were measured, and the last of these.
    steps: int = field_of(0, least=0)
    measured: int = field_of(0, least=0)
    measured_at: int = field_of(0, least=0)
    # Running means of loss and curvature: the last values where nothing is averaged.
    loss: float = field_of(0.0)
    curvature: float = field_of(0.0)
    # Critical rate and curvature as last and as first measured.
    eta_crit: float = field_of(0.0, infinite=True)
    first_curvature: float = field_of(0.0)
    # Level of the loss before the rise, and the curvature there.
    low: float = field_of(math.inf, infinite=True)
    low_curvature: float = field_of(0.0)
    # A rise is under way; its highest loss so far; it has passed that.
    spiking: bool = field_of(False)
    peak: float = field_of(0.0)
    peaked: bool = field_of(False)
    # A spike came back, and its curvature is not measured yet; the curvature before that spike.
    back: bool = field_of(False)
    risen_from: float = field_of(0.0)
    # The curvature has vanished.
    collapsed: bool = field_of(False)


class CatapultCounter:
    """Counts super-critical steps, and catapults as episodes.

    An episode: the loss rises by more than a fifth from a super-critical start, peaks, and returns to the level before
    the rise with a lower curvature. A curvature that vanishes (dead ReLUs) is a collapse, not a catapult.

    Example:
        >>> counter = CatapultCounter()
        >>> for loss, lam in [(1.0, 4.0), (5.0, 4.0), (9.0, 3.0), (0.9, 1.0), (0.8, 1.0)]:
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

    @property
    def age(self) -> int | None:
        """Steps since the last measurement; None before the first."""
        return self._state.steps - self._state.measured_at if self._state.measured else None

    def state_dict(self) -> dict[str, Any]:
        return self._state.as_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return take_over(_State, state, "counter")

    def take(self, state: FieldsState) -> None:
        assert isinstance(state, _State)
        self._state = state

    def update(
        self,
        *,
        loss: float,
        rate: float,
        lambda_max: float | None = None,
        eta_crit: float | None = None,
        window: int = 1,
    ) -> list[Event]:
        """One step: loss, rate, and where measured curvature and critical rate; gives the events it completes.

        Only measured steps are counted as super-critical; in between, episodes go by the last values known, and are
        counted once a measurement confirms that the curvature is lower. With a window above 1 (mini-batches) episodes
        are read off running means; the super-critical count never is.
        """
        s = self._state
        s.steps += 1
        if eta_crit is not None and lambda_max is not None:
            s.measured += 1
            s.measured_at = s.steps
            s.super_critical += is_super_critical(rate, eta_crit)
            s.eta_crit = eta_crit
            s.curvature += (lambda_max - s.curvature) / min(s.measured, window)
            s.first_curvature = s.first_curvature or lambda_max
        if not math.isfinite(loss) or s.measured == 0:
            return []
        s.loss += (loss - s.loss) / min(s.steps, window)
        events = self._collapse() or self._episode(is_super_critical(rate, s.eta_crit))
        return events + (self._confirm() if eta_crit is not None else [])

    def _confirm(self) -> list[Event]:
        """A spike that came back is a catapult if the curvature is lower than before it."""
        s = self._state
        if not s.back:
            return []
        s.back = False
        if not s.curvature < s.risen_from:
            return []
        s.catapults += 1
        return [("catapult_recovered", {"peak": s.peak, "curvature_ratio": s.curvature / s.risen_from})]

    def _collapse(self) -> list[Event]:
        s = self._state
        vanished = s.curvature <= _COLLAPSED * s.first_curvature
        news = vanished and not s.collapsed
        s.collapsed = vanished
        if not news:
            return []
        s.collapses += 1
        s.spiking = s.back = False
        return [("collapse", {"lambda_max": s.curvature, "loss": s.loss})]

    def _episode(self, super_critical: bool) -> list[Event]:
        s = self._state
        if s.spiking:
            return self._spike()
        if s.loss > above(s.low, SPIKE):
            s.spiking, s.peaked, s.peak = True, False, s.loss
            return [("catapult_started", {"loss": s.loss, "low": s.low})]
        # A rise counts from the lowest loss of the super-critical steps that led to it.
        if s.loss <= s.low:
            s.low, s.low_curvature = (s.loss, s.curvature) if super_critical else (math.inf, 0.0)
        return []

    def _spike(self) -> list[Event]:
        s = self._state
        if s.loss > s.peak:
            s.peak = s.loss
            return []
        events: list[Event] = [] if s.peaked else [("catapult_peaked", {"peak": s.peak})]
        s.peaked = True
        if s.loss <= s.low:
            s.spiking, s.back, s.risen_from, s.low = False, True, s.low_curvature, math.inf
        return events
