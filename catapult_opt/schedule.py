"""When to measure next: a fixed interval, what the policy asks for, and what measuring may cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .distributed import Group
from .observer import Observation
from .state import FieldsState, field_of, take_over

# What a measurement costs, in training steps: a curvature product, and the rest (benchmarks/curvature.py).
_PRODUCT, _MEASUREMENT = 1.3, 1.0
# So many steps' worth of measuring may be spent ahead of time: a training's first steps change the curvature most.
_ADVANCE = 5.0
# So much more may be spent where the loss rises though it should not.
_ALARM = 25.0


def measurement_cost(matvecs: int) -> float:
    """What a measurement with so many curvature products costs, in training steps (counted, not timed).

    Example:
        >>> round(measurement_cost(3), 1)
        4.9
    """
    return _MEASUREMENT + _PRODUCT * matvecs


class Clock:
    """How long a training has run since its first step, in seconds."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._lap = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the first step, 0.0 before it."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def start(self) -> None:
        """Called at every step; the clock runs from the first one."""
        if self._began is None:
            self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self._lap = self._lap, self.elapsed
        return self._lap - before


@dataclass
class _State(FieldsState):
    # Step of the next measurement asked for; None before the first one.
    due: int | None = field_of(None, least=1)
    # Training steps' worth of measuring so far, the first measurement left out.
    spent: float = field_of(0.0, least=0.0)
    # Did the policy say that the loss rises where it should not?
    alarm: bool = field_of(False)


class MeasurementSchedule:
    """Decides after every step whether the next one is measured.

    Args:
        every: measure at least every so many steps; None: only when asked to.
        overhead: share of the running time that measuring may take; None: no limit. What quiet phases leave of it is
            there for catapults, which want many measurements at once.
        share: of the steps' time that the measurements a policy asks for may take where batches differ, counted by
            `measurement_cost` so that a run measures on the same steps anywhere; inf: no limit.
        group: the processes that train together: all decide alike.
    """

    def __init__(self, *, every: int | None, overhead: float | None, share: float, group: Group) -> None:
        self._every, self._overhead, self._share, self._group = every, overhead, share, group
        self._state = _State()
        self._seconds = 0.0  # spent measuring in this process
        self.clock = Clock()

    def account(self, seen: Observation) -> dict[str, float]:
        """Charge what observing a step took; gives, for the log, the seconds since the last measured step."""
        self._state.spent += measurement_cost(seen.matvecs) if seen.matvecs else 0.0
        self._seconds += seen.seconds
        return {} if seen.critical is None else {"elapsed": self.clock.lap()}

    def ask(self, seen: Observation, measure_in: int, *, alarm: bool) -> None:
        """The policy, in the step observed, wants the next measurement in so many steps.

        A measurement already planned earlier stays: the intervals of a new phase do not push it out.
        """
        s, due = self._state, seen.step + measure_in
        s.due = due if seen.critical is not None else min(s.due or due, due)
        s.alarm = alarm
        if seen.step == 1 and self._every is None:
            s.due = 2  # is it the same batch again?

    def next_is_measured(self, step: int, repeated: bool) -> bool:
        """Is the step after this one to be measured? The first step of a training always is."""
        s, upcoming = self._state, step + 1
        wanted = s.due is not None and upcoming >= s.due and (repeated or self._allows(upcoming))
        wanted = wanted or (self._every is not None and step % self._every == 0)
        return step == 0 or (wanted and self._affordable)

    def state_dict(self) -> dict[str, Any]:
        return self._state.as_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return take_over(_State, state, "schedule")

    def take(self, state: FieldsState) -> None:
        assert isinstance(state, _State)
        self._state = state

    def _allows(self, step: int) -> bool:
        return self._state.spent <= self._share * step + _ADVANCE + self._state.alarm * _ALARM

    @property
    def _affordable(self) -> bool:
        return self._overhead is None or not self._group.any(self._seconds > self._overhead * self.clock.elapsed)
