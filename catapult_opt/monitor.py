"""Observe, measure, count and log the steps of a training; `CatapultMonitor` does only that."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .capture import Capture, LossCall, as_module
from .catapults import CatapultCounter, Event, is_super_critical
from .curvature.critical import sgd_critical_lr
from .curvature.operators import StepSize
from .curvature.vectors import Vector
from .measure import CriticalLR, MeasurementError, MeasurementWarning, measure, trainable
from .replay import is_measuring
from .runlog import RunLogWriter
from .trees import tensors_in

# Averages of mini-batch losses and curvatures run over about this many measured steps.
_MINI_BATCH_SMOOTHING = 50


@dataclass(frozen=True)
class Observation:
    """What a step saw before its update."""

    loss: float
    critical: CriticalLR | None  # eta_crit of the base update; None on a step that was not (or could not be) measured
    vector: Vector | None  # to start the next measurement from
    seconds: float  # spent measuring
    smoothing: int  # steps to average over: 1 where the batch is the same every step


class Session:
    """What all faces share around an update: observe the step, count, log.

    Args:
        face: name of the public class, for the log.
        optimizer: whose parameters are trained.
        model, criterion, outputs: see `CatapultSGD`.
        every: measure every so many steps.
        log: path of the run log, or None.
        settings: for the header of the log.
    """

    def __init__(
        self,
        face: str,
        optimizer: Optimizer,
        model: nn.Module,
        criterion: Any,
        *,
        outputs: Callable[[Any], Any] | None,
        every: int,
        log: str | os.PathLike[str] | None,
        settings: dict[str, Any],
    ) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        _check_model(model, params)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a whole number >= 1, got {every!r}")
        if outputs is not None and criterion is not None:
            raise ValueError(f"outputs picks the loss where criterion is None; got outputs={outputs!r} with a criterion")
        self.model = model
        self.criterion = None if criterion is None else as_module(criterion)
        self.params = [p for p in params if p.requires_grad]
        self.counter = CatapultCounter()
        self.step = 0
        self.last: CriticalLR | None = None
        self.step_size = StepSize()
        self._every = every
        self._outputs = outputs
        self._face, self._settings = face, settings
        self._writer = None if log is None else RunLogWriter(log)
        self._started = False
        self._repeated = False
        self._previous: Tensor | None = None
        self.capture = Capture(model, self.criterion, self.params, outputs)
        self.capture.arm()

    def saw_nothing(self) -> bool:
        """No forward pass since the last step: the call of an initialiser, or a mistake."""
        return self.capture.forwards_seen == 0 and not self.capture.pending

    def observe(
        self, start: Vector | None, scale: Sequence[float] | None, critical: Callable[[float], float]
    ) -> Observation:
        """Take the step's captured calls; on a measured step find its critical rate.

        Args:
            start: warm-start vector.
            scale: relative rate of each parameter.
            critical: lambda_max -> critical rate of the base update.

        Raises:
            RuntimeError: nothing was captured; says what to do.
        """
        problem = self.capture.problem()
        if problem:
            raise RuntimeError(problem)
        calls = self.capture.take()
        self.step += 1
        loss = float(torch.stack([c.value * c.weight for c in calls if c.weight is not None]).sum())
        found: CriticalLR | None = None
        vector: Vector | None = None
        begun = time.perf_counter()
        if self.capture.armed:
            self._start_log(calls)
            self._notice_repetition(calls)
            found, vector = self._measure(calls, start, scale, critical)
            self.last = found or self.last
        seconds = time.perf_counter() - begun
        return Observation(loss, found, vector, seconds, 1 if self._repeated else _MINI_BATCH_SMOOTHING)

    def record(self, seen: Observation, rate: float, phase: str | None, events: Sequence[Event] = ()) -> None:
        """Count and log the step just decided; then get ready for the next."""
        record: dict[str, Any] = {"loss": seen.loss, "effective_lr": rate}
        found = seen.critical
        events = list(events)
        if found is not None:
            record |= {
                "eta_crit": found.eta_crit,
                "lambda_max": found.lambda_max,
                "residual": found.residual,
                "matvecs": found.matvecs,
                "super_critical": is_super_critical(rate, found.eta_crit),
                "phase": phase or "watch",
                "probe_seconds": seen.seconds,
            }
            if found.ntk_lambda_max is not None:
                record["ntk_lambda_max"] = found.ntk_lambda_max
            events += self.counter.update(
                loss=seen.loss,
                lambda_max=found.lambda_max,
                rate=rate,
                eta_crit=found.eta_crit,
                smoothing=seen.smoothing,
            )
        if self._writer is not None:
            self._writer.step({"step": self.step, **record})
            for name, details in events:
                self._writer.event(self.step, name, **details)
        self.arm_next()

    def arm_next(self) -> None:
        self.capture.arm(self.step % self._every == 0)

    def log_metrics(self, values: dict[str, float]) -> None:
        """Write metrics of the user's own at the present step."""
        numbers = {}
        for name, value in values.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(f"metric {name} must be a number, got {value!r}") from error
        if self._writer is not None and self._started:
            self._writer.metrics(self.step, numbers)

    def detach(self) -> None:
        """Remove the hooks and close the log."""
        self.capture.detach()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that continue the session elsewhere."""
        return {
            "step": self.step,
            "counter": self.counter.state_dict(),
            "step_size": self.step_size.relative,
            "repeated": self._repeated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.counter.load_state_dict(state["counter"])
        self.step_size.relative = state["step_size"]
        self._repeated = state["repeated"]

    def _measure(
        self,
        calls: Sequence[LossCall],
        start: Vector | None,
        scale: Sequence[float] | None,
        critical: Callable[[float], float],
    ) -> tuple[CriticalLR | None, Vector | None]:
        try:
            found, vector = measure(
                self.model,
                self.criterion,
                self.params,
                calls,
                start=start,
                step=self.step_size,
                outputs=self._outputs,
                scale=scale,
            )
        except Exception as error:
            if self.last is None:
                raise
            warnings.warn(
                f"step {self.step} could not be measured, the last critical rate is kept: {error}",
                MeasurementWarning,
                stacklevel=4,
            )
            if self._writer is not None:
                self._writer.event(self.step, "measurement_failed", reason=str(error))
            return None, None
        eta_crit = critical(found.lambda_max)
        return CriticalLR(**{**vars(found), "eta_crit": eta_crit}), vector

    def _start_log(self, calls: Sequence[LossCall]) -> None:
        if self._started:
            return
        self._started = True
        if self._writer is None:
            return
        sizes = [f.batch_size for call in calls for f in call.forwards]
        header = {
            "name": self._writer.path.stem,
            "face": self._face,
            "settings": self._settings,
            "batch_size": sum(s for s in sizes if s is not None) or None,
            "parameters": sum(p.numel() for p in self.params),
        }
        self._writer.start(header, resumed_at=self.step - 1 if self.step > 1 else None)

    def _notice_repetition(self, calls: Sequence[LossCall]) -> None:
        """Is this batch the same as the last one measured (full-batch training)? Then nothing has to be averaged."""
        tensors = [t for call in calls for f in call.forwards for t in tensors_in((f.args, f.kwargs))]
        if not tensors:
            return
        batch = tensors[0]
        if self._previous is not None:
            same_kind = batch.shape == self._previous.shape and batch.dtype == self._previous.dtype
            self._repeated = batch is self._previous or (same_kind and torch.equal(batch, self._previous))
        self._previous = batch


class CatapultMonitor:
    """Watch a training: measure critical rates, count catapults, write the run log; change nothing.

    The training with a monitor is bit-identical to the one without. The measured steps cost about one to five extra
    training steps each, so `every` sets the price.

    Args:
        optimizer: the `torch.optim.SGD` whose steps are watched (`CatapultSGD` watches itself).
        model: the module whose outputs reach the criterion.
        criterion: the loss module called in the loop; a plain function must be called through `monitor.criterion`;
            None where the model returns the loss.
        every: measure every so many steps.
        log: path of the run log (JSON lines), or None.
        outputs: with criterion=None, picks the scalar loss from what the model returns.

    Raises:
        ValueError, TypeError: an argument is not usable; says which and why.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> criterion = torch.nn.MSELoss()
        >>> monitor = CatapultMonitor(optimizer, model=model, criterion=criterion)
        >>> criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
        >>> optimizer.step()
        >>> monitor.measured_steps, round(monitor.last.lambda_max, 3)
        (1, 6.0)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        criterion: Any,
        every: int = 1,
        log: str | os.PathLike[str] | None = None,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.SGD):
            raise TypeError(
                f"optimizer must be a torch.optim.SGD, whose critical rate is known, got {type(optimizer).__name__}"
            )
        self._optimizer = optimizer
        settings = {"every": every, "optimizer": type(optimizer).__name__, **_plain(optimizer.defaults)}
        self._session = Session(
            type(self).__name__,
            optimizer,
            model,
            criterion,
            outputs=outputs,
            every=every,
            log=log,
            settings=settings,
        )
        self._vector: Vector | None = None
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def criterion(self) -> nn.Module | None:
        """The criterion whose calls are observed: a plain function given as criterion must be called through this."""
        return self._session.criterion

    @property
    def last(self) -> CriticalLR | None:
        """The last measurement: of that step's batch, at the weights before its update."""
        return self._session.last

    @property
    def super_critical_steps(self) -> int:
        """Measured steps with eta - eta_crit > 1e-8: the thesis' count of catapults in SGD."""
        return self._session.counter.super_critical_steps

    @property
    def catapults(self) -> int:
        """Episodes completed: rise from a super-critical start, peak, return with a lower lambda_max."""
        return self._session.counter.catapults

    @property
    def collapses(self) -> int:
        """Times the curvature vanished (dead units)."""
        return self._session.counter.collapses

    @property
    def measured_steps(self) -> int:
        return self._session.counter.measured_steps

    def log_metrics(self, **values: float) -> None:
        """Log metrics at the present step, e.g. val_loss=0.3; names that start with `val` rank runs in the report."""
        self._session.log_metrics(values)

    def detach(self) -> None:
        """Stop watching: remove the hooks, close the log."""
        self._handle.remove()
        self._session.detach()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Observe now, or right after the closure where forward and backward run inside step(closure)."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._observe(optimizer)
            return None

        def observed() -> Any:
            loss = closure()
            with torch.no_grad():
                self._observe(optimizer)
            return loss

        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], observed), rest

    def _observe(self, optimizer: Optimizer) -> None:
        if self._session.saw_nothing():
            return
        groups = [g for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        rate, scale = relative_rates(groups)
        seen = self._session.observe(self._vector, scale, lambda lam: critical_rate(groups, lam))
        if seen.vector is not None:
            self._vector = seen.vector
        self._session.record(seen, rate, None)


def relative_rates(groups: Sequence[dict[str, Any]], key: str = "lr") -> tuple[float, list[float] | None]:
    """The largest rate of the parameters' groups, and each one's share of it (None where all are equal)."""
    rates = [float(g[key]) for g in groups]
    largest = max(rates)
    if all(r == largest for r in rates):
        return largest, None
    return largest, [r / largest for r in rates]


def critical_rate(groups: Sequence[dict[str, Any]], lambda_max: float) -> float:
    """Critical rate of torch.optim.SGD with the groups' settings: the smallest of theirs."""
    return min(
        sgd_critical_lr(
            lambda_max,
            momentum=g["momentum"],
            dampening=g["dampening"],
            nesterov=g["nesterov"],
            weight_decay=g["weight_decay"],
        )
        for g in {id(g): g for g in groups}.values()
    )


def _check_model(model: nn.Module, params: Sequence[Tensor]) -> None:
    known = {id(p) for p in trainable(model)}
    for i, p in enumerate(params):
        if p.requires_grad and id(p) not in known:
            raise ValueError(
                f"params: parameter {i} of shape {tuple(p.shape)} is not a parameter of model "
                f"({type(model).__name__}): pass the model that holds it"
            )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """What of the settings can stand in a log."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in settings.items()}
