"""When to measure next: at a fixed interval, when the policy asks for it, within a share of the time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .distributed import Group
from .observer import Observation
from .options import MeasuringOptions
from .state import FieldsState, field_of, take_over


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
    # Step of the next measurement that the policy asked for; 0 before it asked for any.
    due: int = field_of(0, least=0)


class MeasurementSchedule:
    """Decides after every step whether the next one is measured: the first one, and then by what is asked for.

    Args:
        options: `every`, the interval at which every run is measured, and `overhead`, the share of the running time
            that measuring may take. What quiet phases leave of it is there for catapults, which want many.
        group: the processes that train together: all decide alike.
    """

    def __init__(self, options: MeasuringOptions, group: Group) -> None:
        self._every, self._overhead, self._group = options.every, options.overhead, group
        self._state = _State()
        self._seconds = 0.0  # spent measuring in this process
        self.clock = Clock()

    def account(self, seen: Observation) -> dict[str, float]:
        """Charge what observing a step took; gives, for the log, the seconds since the last measured step."""
        self._seconds += seen.seconds
        return {} if seen.critical is None else {"elapsed": self.clock.lap()}

    def ask(self, step: int, measure_in: int) -> None:
        """The policy, at this step, wants the next measurement in so many steps."""
        self._state.due = step + measure_in

    def next_is_measured(self, step: int) -> bool:
        """Is the step after this one to be measured?"""
        due = self._state.due
        wanted = (0 < due <= step + 1) or (self._every is not None and step % self._every == 0)
        return step == 0 or (wanted and self._affordable)

    def state_dict(self) -> dict[str, Any]:
        return self._state.as_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return take_over(_State, state, "schedule")

    def take(self, state: FieldsState) -> None:
        assert isinstance(state, _State)
        self._state = state

    @property
    def _affordable(self) -> bool:
        return self._overhead is None or not self._group.any(self._seconds > self._overhead * self.clock.elapsed)
