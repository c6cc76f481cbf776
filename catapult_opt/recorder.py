"""Counts and logs the steps of a training, also those whose losses are still on the device."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .catapults import CatapultCounter, Event, is_super_critical
from .distributed import local
from .observer import Observation, Observer
from .options import MeasuringOptions
from .runlog import RunLogWriter
from .state import FieldsState
from .trees import read_numbers


@dataclass(frozen=True)
class _Entry:
    """A step to be counted and logged once its loss is known."""

    # What the step saw.
    seen: Observation
    # The rate of its update.
    rate: float
    # What happened in it.
    events: tuple[Event, ...]
    # What else the log holds of it.
    details: Mapping[str, Any]


class Recorder:
    """Counts what happens in a training and writes its log.

    Losses left on an accelerator are read, which waits for it, where somebody asks: with the loss of a measured step,
    for a count, or at the end. They are counted and logged in order.

    Args:
        face: name of the public class, for the header of the log.
        observer: of the training.
        options: where the log goes, and how often is measured.
        settings: what else the header of the log holds of the run's settings.
        copies: of the parameters that the face keeps, for the header of the log.
    """

    def __init__(
        self, face: str, observer: Observer, options: MeasuringOptions, settings: Mapping[str, Any], copies: int
    ) -> None:
        params = observer.params
        self._header = {
            "face": face,
            "settings": {"every": options.every, "overhead": options.overhead, **settings},
            "parameters": sum(p.numel() for p in params),
            "extra_bytes": copies * sum(local(p).numel() * p.element_size() for p in params),
        }
        writes = options.log is not None and observer.group.writes
        self._writer = RunLogWriter(options.log) if writes and options.log is not None else None
        self._counter = CatapultCounter()
        self._waiting: list[_Entry] = []
        self._finish = weakref.finalize(self, _finish, self._waiting, self._counter, self._writer)
        self._begun = self._rewound = False
        self._early: list[tuple[int, dict[str, float]]] = []  # metrics from before the log was begun

    @property
    def counter(self) -> CatapultCounter:
        """Counts up to the present step."""
        _read(self._waiting, self._counter, self._writer)
        return self._counter

    def read(self, loss: Tensor) -> float:
        """A loss from its device, in one transfer with those that wait there."""
        number = _read(self._waiting, self._counter, self._writer, loss)
        assert number is not None
        return number

    def begin(self, step: int, batch_size: int | None) -> None:
        """Begin the log, if there is one and it was not begun.

        Raises:
            FileExistsError, RunLogError, RuntimeError: see `RunLogWriter.start`; nothing was written.
        """
        if self._begun:
            return
        if self._writer is not None:
            header = {"name": self._writer.path.stem, **self._header, "batch_size": batch_size}
            self._writer.start(header, resumed_at=step if step > 0 or self._rewound else None)
            for early, numbers in self._early:
                self._writer.metrics(early, numbers)
            self._early = []
        self._begun = True

    def record(
        self,
        seen: Observation,
        rate: float,
        events: Sequence[Event] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Count and log a step; later, where its loss was not read.

        Args:
            seen: what the step saw.
            rate: of its update.
            events: what happened in it, beside what happened while measuring.
            details: what else the log holds of it, if it was measured.
        """
        entry = _Entry(seen, rate, (*seen.events, *events), details or {})
        if seen.loss is None:
            self._waiting.append(entry)
        else:
            _write(entry, seen.loss, self._counter, self._writer)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of the user's own at this step.

        Raises:
            TypeError: a value is not a number; names it.
        """
        numbers = {}
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"metric {name} must be a number, got {value!r}") from error
        if self._writer is not None and self._begun:
            _read(self._waiting, self._counter, self._writer)
            self._writer.metrics(step, numbers)
        elif self._writer is not None:
            self._early.append((step, numbers))

    def close(self) -> None:
        """Count and log the steps that wait, and close the log; the counts stay."""
        self._finish()
        self._writer = None

    def state_dict(self) -> dict[str, Any]:
        return self.counter.state_dict()

    def parse(self, state: object) -> FieldsState:
        """The state checked, to be given to `take`."""
        return self._counter.parse(state)

    def take(self, state: FieldsState) -> None:
        """Go on from a state; in a log already begun, what comes next supersedes the steps after it."""
        self._begun, self._rewound = False, self._begun or self._rewound
        self.counter.take(state)


def _read(
    waiting: list[_Entry], counter: CatapultCounter, writer: RunLogWriter | None, loss: Tensor | None = None
) -> float | None:
    """Read the losses left on the device and this one, all at once; count and log the steps that waited for theirs."""
    unread = [e.seen.unread_loss for e in waiting if e.seen.unread_loss is not None]
    unread += [] if loss is None else [loss]
    numbers = read_numbers(unread) if unread else []
    for entry, number in zip(waiting, numbers, strict=False):
        _write(entry, number, counter, writer)
    waiting.clear()
    return None if loss is None else numbers[-1]


def _write(entry: _Entry, loss: float, counter: CatapultCounter, writer: RunLogWriter | None) -> None:
    seen, found = entry.seen, entry.seen.critical
    events = counter.update(
        loss=loss,
        rate=entry.rate,
        lambda_max=None if found is None else found.lambda_max,
        eta_crit=None if found is None else found.eta_crit,
        window=seen.window,
    )
    if writer is None:
        return
    record: dict[str, Any] = {"step": seen.step, "loss": loss, "effective_lr": entry.rate}
    if found is not None:
        record |= {
            "eta_crit": found.eta_crit,
            "lambda_max": found.lambda_max,
            "residual": found.residual,
            "matvecs": found.matvecs,
            "super_critical": is_super_critical(entry.rate, found.eta_crit),
            "probe_seconds": seen.seconds,
            **entry.details,
        }
        if found.ntk_lambda_max is not None:
            record["ntk_lambda_max"] = found.ntk_lambda_max
    elif counter.age is not None:
        record["age"] = counter.age
    writer.step(record)
    for name, details in [*entry.events, *events]:
        writer.event(seen.step, name, **details)


def _finish(waiting: list[_Entry], counter: CatapultCounter, writer: RunLogWriter | None) -> None:
    """At `close`, when the recorder goes, or when the interpreter does."""
    _read(waiting, counter, writer)
    if writer is not None:
        writer.close()
